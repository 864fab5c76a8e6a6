"""Archives of every common make are read as the standard library reads them, hostile ones to a plain reason."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import random
import shutil
import subprocess
import tarfile
import tracemalloc

import pytest

from curate.reading import tar
from curate.reading.tar import Archive, Member, ReadError
from tests.curate.reading.made_shards import tar_bytes

COMPRESS = {"gzip": lambda data: gzip.compress(data, mtime=0), "bzip2": bz2.compress, "xz": lzma.compress}


def archive(*members: tuple[str, bytes] | tarfile.TarInfo, form: int = tarfile.GNU_FORMAT, **options) -> bytes:
    return tar_bytes(*members, format=form, **options)


def block(name: bytes, size: bytes | int = 0, kind: bytes = b"0", magic: bytes = b"ustar\x0000") -> bytearray:
    """A header by hand, for what no writer would write."""
    header = bytearray(512)
    header[: len(name)] = name
    header[100:108] = b"0000644\0"
    header[124:136] = b"%011o\0" % size if isinstance(size, int) else size
    header[156:157] = kind
    header[257 : 257 + len(magic)] = magic
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return header


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


END = bytes(1024)


def read(data: bytes) -> tuple[list[Member], tar.Failure | None]:
    reader = Archive(io.BytesIO(data))
    members = list(reader)
    return members, reader.failure


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_that_the_standard_library_finds(form):
    folder = tarfile.TarInfo("folder")
    folder.type = tarfile.DIRTYPE
    link = tarfile.TarInfo("folder/link.txt")
    link.type, link.linkname = tarfile.SYMTYPE, "x" * (90 if form == tarfile.USTAR_FORMAT else 190)
    names = ["a.jpg", "folder/ä ß.txt", "empty.txt", f"{'d' * 80}/{'n' * 90}.jpg", "block.bin", "x" * 100]
    if form != tarfile.USTAR_FORMAT:
        names += [f"{'深' * 100}/{'n' * 300}.jpg"]
    sizes = [3, 700, 0, 1, 512, 511, 1025]
    files = [(name, bytes([65 + i]) * size) for i, (name, size) in enumerate(zip(names, sizes, strict=False))]
    data = archive(folder, *files, link, form=form)
    members, failure = read(data)
    with tarfile.open(fileobj=io.BytesIO(data)) as expected:
        handles = [(m, expected.extractfile(m) if m.isreg() else None) for m in expected]
        assert [(m.name, m.data) for m in members] == [
            (m.name + "/" * m.isdir(), handle.read() if handle else None) for m, handle in handles
        ]
    assert [m.kind for m in members] == ["folder", *["file"] * len(files), "link"]
    assert failure is None


@pytest.mark.parametrize("compress", COMPRESS.values(), ids=COMPRESS)
def test_compressed_archives_are_read_and_known_to_be_whole_only_at_the_end_of_their_stream(compress):
    plain = archive(("a.jpg", bytes(range(256)) * 40), ("a.txt", b"words"))
    members, failure = read(compress(plain))
    assert [m.name for m in members] == ["a.jpg", "a.txt"] and failure is None
    for lost in (1, 3, 9):
        members, failure = read(compress(plain)[:-lost])
        assert failure is not None and failure.kind == "truncated"
    members, failure = read(compress(plain) + compress(bytes(10240)))
    assert failure is None
    members, failure = read(compress(plain[:512]) + compress(plain[512:]))  # as parallel compressors write it
    assert [m.name for m in members] == ["a.jpg", "a.txt"] and failure is None


def test_a_member_is_given_whose_stream_is_damaged_behind_it():
    plain = archive(("a.jpg", random.Random(0).randbytes(4000)), ("b.jpg", random.Random(1).randbytes(4000)))
    for end in (512 + 4000, 512 + 4096, 1024 + 4096):  # behind the data, behind the padding, behind the next header
        first, rest = gzip.compress(plain[:end], mtime=0), bytearray(gzip.compress(plain[end:], mtime=0))
        rest[10] = 0xFF  # no valid block of deflate
        members, failure = read(first + bytes(rest))
        assert [m.name for m in members] == ["a.jpg"] and failure.kind == "corrupt_archive"
        assert failure.cut_member == ("b.jpg" if end > 512 + 4096 else None)


def test_a_gzip_stream_whose_checksum_does_not_match_is_corrupt():
    data = bytearray(gzip.compress(archive(("a.jpg", b"picture")), mtime=0))
    data[-5] ^= 1
    members, failure = read(bytes(data))
    assert members[0].data == b"picture"
    assert failure is not None and failure.kind == "corrupt_archive" and "CRC" in failure.reason


def test_a_member_is_given_where_only_its_padding_was_cut():
    whole = archive(("a.jpg", b"picture"))
    members, failure = read(whole[: 512 + 7])
    assert members[0].data == b"picture" and failure.kind == "truncated"
    members, failure = read(whole[: 512 + 6])
    assert members == [] and failure.cut_member == "a.jpg"


@pytest.mark.parametrize("size", [1 << 27, 8**11 - 1, b"\x80" + b"\xff" * 11, tar.MAX_MEMBER_BYTES + 1])
def test_memory_is_not_taken_on_the_word_of_a_header(size):
    data = bytes(block(b"a.jpg", size)) + b"only this"
    tracemalloc.start()
    members, failure = read(data)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4_000_000
    assert members == [] and failure.kind == "truncated" and failure.cut_member == "a.jpg"


@pytest.mark.parametrize(
    "size", [b"\xff" * 12, b"-0000000001\0", b"0o000000017\0", b"1_000\0", b"        9\0", b"12 34\0"]
)
def test_a_size_that_is_none_is_a_corrupt_header(size):
    members, failure = read(bytes(block(b"a.jpg", size.ljust(12, b"\0"))) + END)
    assert members == [] and failure.kind == "corrupt_archive" and "size" in failure.reason


def pax(*records: tuple[bytes, bytes], kind: bytes = b"x") -> bytes:
    data = b""
    for keyword, value in records:
        body = b" %s=%s\n" % (keyword, value)
        length = len(body) + 1
        while len(b"%d" % length) + len(body) != length:
            length = len(b"%d" % length) + len(body)
        data += b"%d" % length + body
    return extended(data, kind)


def extended(data: bytes, kind: bytes = b"x") -> bytes:
    return bytes(block(b"extended", len(data), kind)) + padded(data)


def test_extended_headers_name_and_size_their_member():
    file = bytes(block(b"short", 0)) + padded(b"1234567")
    named = (b"path", "grün/é.txt".encode())
    members, failure = read(pax((b"mtime", b"1.5"), named, (b"size", b"7")) + file + END)
    assert (members[0].name, members[0].data, failure) == ("grün/é.txt", b"1234567", None)
    members, failure = read(pax((b"hdrcharset", b"BINARY"), (b"path", b"\xff.jpg")) + bytes(block(b"short")) + END)
    assert members[0].name == "\udcff.jpg" and failure is None


@pytest.mark.parametrize(
    "header",
    [
        extended(b"no records"),
        extended(b"99 path=x\n"),
        extended(b"9 path=xy\n"),
        extended(b"6 path\n"),
        extended(b"0 path=x\n"),
        extended(b"1" * 100_000),
        pax((b"size", b"-1")),
        pax((b"size", b"1e3")),
        pax((b"size", b"1" * 5000)),
        bytes(block(b"x", tar.MAX_EXTENDED_HEADER_BYTES + 1, b"x")) + padded(bytes(tar.MAX_EXTENDED_HEADER_BYTES + 1)),
        bytes(block(b"L", tar.MAX_EXTENDED_HEADER_BYTES + 1, b"L")) + padded(bytes(tar.MAX_EXTENDED_HEADER_BYTES + 1)),
    ],
)
def test_a_bad_extended_header_spoils_its_own_member_alone(header):
    good = archive(("b.jpg", b"good"))
    members, failure = read(header + bytes(block(b"a.jpg", 3)) + padded(b"bad") + good)
    assert [(m.name, m.data) for m in members] == [("a.jpg", None), ("b.jpg", b"good")]
    assert "extended header" in members[0].problem and failure is None


def test_a_name_or_size_for_all_members_is_refused_and_a_comment_is_not():
    good = archive(("b.jpg", b"good"))
    members, _ = read(pax((b"comment", b"of an archive made from a commit"), kind=b"g") + good)
    assert members[0].data == b"good"
    for record in ((b"path", b"c.jpg"), (b"size", b"4")):
        members, failure = read(pax(record, kind=b"g") + good)
        assert members[0].data is None and "global header" in members[0].problem and failure is None


def test_a_long_chain_of_extended_headers_is_read_without_recursion():
    chain = bytes(block(b"L", 6, b"L")) + padded(b"a.jpg\0")
    members, failure = read(chain * 5000 + archive(("b.jpg", b"good")))
    assert members[0].name == "a.jpg" and members[0].data == b"good" and failure is None
    members, failure = read(chain * 3 + END)
    assert members == [] and failure.kind == "corrupt_archive"
    members, failure = read(chain * 3)
    assert members == [] and failure.kind == "truncated"


def sparse_old(blocks_after: int) -> bytes:
    header = block(b"sparse.jpg", 5, b"S", b"ustar  \0")
    header[482] = blocks_after > 0
    header[483:495] = b"%011o\0" % 1_000_000_000
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    more = [bytes(504) + bytes([i < blocks_after - 1]) + bytes(7) for i in range(blocks_after)]
    return bytes(header) + b"".join(more) + padded(b"holes")


@pytest.mark.parametrize(
    "sparse",
    [
        sparse_old(0),
        sparse_old(3),
        pax((b"GNU.sparse.map", b"0,5"), (b"GNU.sparse.size", b"99"), (b"GNU.sparse.name", b"sparse.jpg"))
        + bytes(block(b"GNUSparseFile.1/x", 5))
        + padded(b"holes"),
        pax(
            (b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0"), (b"GNU.sparse.name", b"sparse.jpg"),
            (b"GNU.sparse.realsize", b"99999999999999"),
        )  # fmt: skip
        + bytes(block(b"GNUSparseFile.1/x", 517))
        + padded(b"1\n0\n5\n" + bytes(506) + b"holes"),
    ],
)
def test_sparse_files_are_named_and_passed_over(sparse):
    members, failure = read(sparse + archive(("b.jpg", b"good")))
    assert [(m.name, m.kind, m.data) for m in members] == [("sparse.jpg", "other", None), ("b.jpg", "file", b"good")]
    assert failure is None
    members, failure = read(sparse[:-600] if len(sparse) > 1100 else sparse[:600])
    assert failure.kind == "truncated"


@pytest.mark.skipif(shutil.which("tar") is None, reason="needs the tar command")
@pytest.mark.parametrize("form", ["v7", "ustar", "oldgnu", "gnu", "posix"])
def test_archives_of_the_tar_command_are_read_with_links_pipes_and_sparse_files_named(tmp_path, form):
    (tmp_path / "a.jpg").write_bytes(b"picture" * 1000)
    (tmp_path / "b.txt").symlink_to("a.jpg")
    long = "n" * (60 if form in ("v7", "ustar") else 230) + ".jpg"
    (tmp_path / long).write_bytes(b"long")
    with open(tmp_path / "sparse.jpg", "wb") as file:
        for place in range(0, 60_000_000, 3_000_000):
            file.seek(place)
            file.write(b"data" * 1024)
    names, options = ["a.jpg", "b.txt", long], [f"--format={form}"]
    if form not in ("v7", "ustar"):  # which have no sparse files
        names, options = [*names, "sparse.jpg"], [*options, "--sparse"]
    command = ["tar", "--create", *options, "--file=-", f"--directory={tmp_path}", *names]
    made = subprocess.run(command, capture_output=True)
    if made.returncode:
        pytest.skip(f"this tar does not write {form}: {made.stderr.decode(errors='replace')}")
    members, failure = read(made.stdout)
    assert failure is None
    assert [(m.name, m.kind) for m in members] == [
        *(("a.jpg", "file"), ("b.txt", "link"), (long, "file")),
        *([("sparse.jpg", "other")] if "sparse.jpg" in names else []),
    ]
    assert members[0].data == b"picture" * 1000 and members[2].data == b"long"


def test_a_sparse_map_without_end_is_truncated():
    header = sparse_old(1)[:512]
    members, failure = read(header + (bytes(504) + b"\1" + bytes(7)) * 50)
    assert members == [] and (failure.kind, failure.cut_member) == ("truncated", "sparse.jpg")


def test_an_error_of_the_stream_is_no_damage_of_the_archive():
    class Flaky(io.BytesIO):
        def read(self, size=-1, /):
            if self.tell() > 1000:
                raise ConnectionResetError("connection reset")
            return super().read(size)

    for compress in (bytes, *COMPRESS.values()):
        data = compress(archive(*((f"{i}.bin", random.Random(i).randbytes(4000)) for i in range(99))))
        with pytest.raises(ReadError, match="connection reset"):
            list(Archive(Flaky(data)))
