"""Tar shards are read safely and completely, and written so that equal samples give equal bytes."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from afresh.errors import UsageError, UserError
from curate.reading import samples as shards
from curate.reading.captions import MAX_CAPTION_BYTES, MAX_JSON_BYTES
from curate.reading.members import MAX_NAME, split_name
from curate.reading.samples import BadSample, Sample, read_samples
from curate.reading.tar import MAX_MEMBER_BYTES
from curate.reading.urls import expand_shards, shard_names
from curate.reading.writing import write_shard

IMAGE = b"not decoded here"


def tar_bytes(*members: tuple[str, bytes] | tarfile.TarInfo) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    return buffer.getvalue()


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def read(tmp_path: Path, data: bytes) -> list[Sample | BadSample]:
    path = tmp_path / "shard.tar"
    path.write_bytes(data)
    return list(read_samples(str(path)))


def kinds(items: list[Sample | BadSample]) -> list[tuple[str, str]]:
    return [(item.key, "ok" if isinstance(item, Sample) else item.kind) for item in items]


def three_samples() -> bytes:
    return tar_bytes(
        *(
            (f"{key}.{ext}", data)
            for key in ("a", "b", "c")
            for ext, data in (("jpg", IMAGE), ("txt", b"words"))
        )
    )


def test_a_carried_shard_is_read_in_order_with_its_bytes(sample_shards):
    samples = list(read_samples(sample_shards[0]))
    assert all(isinstance(sample, Sample) for sample in samples)
    with tarfile.open(sample_shards[0]) as tar:
        names = tar.getnames()
        first = {name: tar.extractfile(name).read() for name in names[:3]}
    assert {f"{samples[0].key}.{ext}": data for ext, data in samples[0].members.items()} == first
    assert sum(len(sample.members) for sample in samples) == len(names)
    assert samples[0].shard == "000000.tar"
    assert samples[0].caption and samples[0].image_ext == "webp"


def test_written_samples_come_back_and_equal_samples_give_equal_bytes(tmp_path, sample_shards):
    samples = list(read_samples(sample_shards[0]))[:20]
    for name in ("one.tar", "two.tar"):
        assert write_shard(tmp_path / name, ((sample.key, sample.members) for sample in samples)) == 20
    assert (tmp_path / "one.tar").read_bytes() == (tmp_path / "two.tar").read_bytes()
    again = list(read_samples(str(tmp_path / "one.tar")))
    assert [(s.key, s.members) for s in again] == [(s.key, s.members) for s in samples]


def test_a_shard_has_the_bytes_that_tarfile_writes(tmp_path):
    keys = ["a", "folder/b", "k" * 96, "l" * 97, "folder/" + "m" * 150, "é"]
    sizes = [0, 1, 511, 512, 513, 70_000]
    samples = [(key, {"jpg": IMAGE, "txt": bytes(size)}) for key, size in zip(keys, sizes, strict=True)]
    write_shard(tmp_path / "ours.tar", samples)
    with tarfile.open(tmp_path / "theirs.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for key, members in samples:
            for ext, data in members.items():
                info = tarfile.TarInfo(f"{key}.{ext}")
                info.size, info.mode, info.mtime = len(data), 0o644, 0
                tar.addfile(info, io.BytesIO(data))
    assert (tmp_path / "ours.tar").read_bytes() == (tmp_path / "theirs.tar").read_bytes()


def test_webdataset_reads_what_is_written(tmp_path):
    import webdataset

    long_key = "folder/" + "k" * 150
    write_shard(tmp_path / "s.tar", [("é", {"jpg": IMAGE, "txt": b"1"}), (long_key, {"jpg": IMAGE})])
    read_back = list(webdataset.WebDataset(str(tmp_path / "s.tar"), shardshuffle=False))
    assert [sample["__key__"] for sample in read_back] == ["é", long_key]
    assert read_back[0]["jpg"] == IMAGE


def test_a_failed_write_leaves_nothing_behind(tmp_path):
    def samples():
        yield "a", {"jpg": IMAGE}
        raise RuntimeError("source failed")

    with pytest.raises(RuntimeError):
        write_shard(tmp_path / "s.tar", samples())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key", ["../up", "/etc/a", "dotted.key", "C:\\a", "", "k" * 5000])
def test_a_key_that_would_not_be_read_back_is_not_written(tmp_path, key):
    with pytest.raises(ValueError, match="read back"):
        write_shard(tmp_path / "s.tar", [(key, {"jpg": IMAGE})])


def test_a_key_written_twice_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="twice"):
        write_shard(tmp_path / "s.tar", [("a", {"jpg": IMAGE}), ("a", {"jpg": IMAGE})])


def test_captions_come_from_txt_then_json(tmp_path):
    items = read(
        tmp_path,
        tar_bytes(
            ("a.jpg", IMAGE),
            ("a.txt", "\ufeff ein Bär \n".encode()),
            ("b.jpg", IMAGE),
            ("b.json", b'{"caption": "from json"}'),
            ("c.jpg", IMAGE),
            ("c.txt", b"txt wins"),
            ("c.json", b'{"caption": "not this"}'),
            ("d.jpg", IMAGE),
            ("d.txt", b""),
        ),
    )
    assert [item.caption for item in items] == ["ein Bär", "from json", "txt wins", ""]
    assert all(item.caption_problem is None for item in items)


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({}, "neither a txt nor a json"),
        ({"txt": b"\xff\xfe\xfa"}, "not UTF-8"),
        ({"json": b"{"}, "not valid JSON"),
        ({"json": b"[1]"}, "no string 'caption'"),
        ({"json": b'{"caption": 3}'}, "no string 'caption'"),
    ],
)
def test_a_missing_caption_is_told_apart_by_its_reason(members, reason):
    sample = Sample("s.tar", "a", {"jpg": IMAGE, **members})
    assert sample.caption is None
    assert reason in sample.caption_problem


def test_an_empty_caption_is_a_caption_and_byte_order_marks_are_none_of_it():
    marked = {"json": "\ufeff".encode() + json.dumps({"caption": "words"}).encode()}
    for members, caption in (
        ({"txt": b""}, ""),
        ({"txt": b" \r\n"}, ""),
        ({"txt": "\ufeff".encode()}, ""),
        ({"json": b'{"caption": ""}'}, ""),
        (marked, "words"),
        ({"json": json.dumps({"caption": "words"}).encode("utf-16")}, "words"),
    ):
        sample = Sample("s.tar", "a", {"jpg": IMAGE, **members})
        assert (sample.caption, sample.caption_problem) == (caption, None)


@pytest.mark.parametrize(
    "data",
    [
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"caption": ' + b"[" * 90_000 + b"]" * 90_000 + b"}",
        b'{"n": ' + b"9" * 100_000 + b"}",
        b'{"caption": "cut',
        b"\xff\xfe\xfa",
        b"",
    ],
)
def test_a_hostile_json_ends_in_a_reason(data):
    sample = Sample("s.tar", "a", {"jpg": IMAGE, "json": data})
    assert sample.caption is None and "json" in sample.caption_problem


def test_a_json_or_caption_of_absurd_size_is_not_read(monkeypatch):
    huge = b'{"caption": "' + b"x" * MAX_JSON_BYTES + b'"}'
    tracemalloc.start()
    sample = Sample("s.tar", "a", {"jpg": IMAGE, "json": huge})
    assert sample.caption is None and f"more than {MAX_JSON_BYTES}" in sample.caption_problem
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()
    text = b"x" * (MAX_CAPTION_BYTES + 1)
    for members in ({"txt": text}, {"json": json.dumps({"caption": text.decode()}).encode()}):
        sample = Sample("s.tar", "a", {"jpg": IMAGE, **members})
        assert sample.caption is None and f"more than {MAX_CAPTION_BYTES}" in sample.caption_problem


def test_of_several_images_the_first_extension_is_the_image_and_the_others_travel_along(tmp_path):
    (item,) = read(tmp_path, tar_bytes(("a.webp", b"w"), ("a.PNG", b"p"), ("a.seg.png", b"s"), ("a.jpeg", b"j")))
    assert (item.image_ext, item.image, item.images) == ("jpeg", b"j", ["jpeg", "PNG", "webp"])
    assert list(item.members) == ["webp", "PNG", "seg.png", "jpeg"]


def test_extensions_are_matched_in_any_case_and_kept_as_spelled(tmp_path):
    (item,) = read(tmp_path, tar_bytes(("a.JPG", IMAGE), ("a.Txt", b"words")))
    assert (item.image_ext, item.caption, list(item.members)) == ("JPG", "words", ["JPG", "Txt"])


def test_pickle_members_travel_as_bytes(tmp_path):
    bomb = b"cos\nsystem\n(S'exit 1'\ntR."
    (item,) = read(tmp_path, tar_bytes(("a.jpg", IMAGE), ("a.pkl", bomb), ("a.pth", bomb)))
    assert item.members["pkl"] == bomb and item.members["pth"] == bomb


@pytest.mark.parametrize(
    "member",
    [
        special("b.txt", tarfile.SYMTYPE, "/etc/passwd"),
        special("b.txt", tarfile.LNKTYPE, "a.jpg"),
        special("b.txt", tarfile.CHRTYPE),
        special("b.txt", tarfile.FIFOTYPE),
    ],
)
def test_a_sample_with_a_link_or_device_is_refused_and_its_neighbours_are_kept(tmp_path, member):
    data = tar_bytes(("a.jpg", IMAGE), ("b.jpg", IMAGE), member, ("c.jpg", IMAGE))
    items = read(tmp_path, data)
    assert kinds(items) == [("a", "ok"), ("b", "refused_member"), ("c", "ok")]
    assert "b.txt" in items[1].reason


@pytest.mark.parametrize(
    "name", ["/etc/passwd.jpg", "../../up.jpg", "a/../../up.jpg", "C:\\up.jpg", "..\\up.jpg"]
)
def test_names_that_point_outside_are_refused_by_name(tmp_path, name):
    items = read(tmp_path, tar_bytes(("a.jpg", IMAGE), (name, IMAGE), ("c.jpg", IMAGE)))
    assert kinds(items) == [("a", "ok"), (name, "refused_member"), ("c", "ok")]
    assert not (tmp_path.parent / "up.jpg").exists()


def test_a_name_that_is_not_utf8_is_refused_with_a_printable_name(tmp_path):
    data = tar_bytes(("xyz.jpg", IMAGE)).replace(b"xyz.jpg", b"x\xffz.jpg")
    header = bytearray(data[:512])
    header[148:156] = b"        "
    header[148:156] = b"%06o\0 " % sum(header)
    (item,) = read(tmp_path, bytes(header) + data[512:])
    assert item.kind == "refused_member"
    item.key.encode()


def test_long_and_foreign_keys_are_kept_and_absurd_ones_refused(tmp_path):
    keys = ["k" * 255, "ordner/" * 40 + "schlüssel", "鍵", "e\u0301", "é", "a b", "line\nend"]
    items = read(tmp_path, tar_bytes(*((f"{key}.jpg", IMAGE) for key in keys)))
    assert kinds(items) == [(key, "ok") for key in keys]
    items = read(tmp_path, tar_bytes(("k" * 100_000 + ".jpg", IMAGE), ("b.jpg", IMAGE)))
    assert kinds(items) == [("k" * MAX_NAME, "refused_member"), ("b", "ok")]
    assert "100004 characters" in items[0].reason and len(items[0].reason) < 500


def test_a_name_cannot_write_to_the_terminal_through_a_reason(tmp_path):
    items = read(tmp_path, tar_bytes(("../\x1b[31m\n.jpg", IMAGE), ("\x1b[2J", IMAGE), ("a.\x1bc", b"?")))
    assert [item.kind for item in items] == ["refused_member", "stray_member", "no_image"]
    assert all(item.reason.isprintable() for item in items)


def test_a_sample_that_memory_should_not_hold_is_refused_and_its_neighbours_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "MAX_SAMPLE_BYTES", 10_000)
    many = [(f"b.{number}", bytes(1000)) for number in range(50)]
    items = read(tmp_path, tar_bytes(("a.jpg", IMAGE), ("b.jpg", IMAGE), *many, ("c.jpg", IMAGE)))
    assert kinds(items) == [("a", "ok"), ("b", "refused_member"), ("c", "ok")]


def test_a_member_that_is_too_large_is_refused_and_its_neighbours_are_kept(tmp_path):
    path = tmp_path / "shard.tar"
    with tarfile.open(path, "w") as tar, open(tmp_path / "hole", "wb+") as hole:
        hole.truncate(MAX_MEMBER_BYTES + 1)
        for name, size in (("a.jpg", 3), ("b.jpg", 3), ("b.bin", MAX_MEMBER_BYTES + 1), ("c.jpg", 3)):
            info = tarfile.TarInfo(name)
            info.size = size
            hole.seek(0)
            tar.addfile(info, hole)
    tracemalloc.start()
    items = list(read_samples(str(path)))
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()
    assert kinds(items) == [("a", "ok"), ("b", "refused_member"), ("c", "ok")]


def test_an_archive_cut_inside_a_member_is_truncated_and_earlier_samples_are_kept(tmp_path):
    data = tar_bytes(("a.jpg", IMAGE), ("a.txt", b"words"), ("b.jpg", IMAGE * 1000), ("b.txt", b"words"))
    items = read(tmp_path, data[: 4 * 512 + 512 + 700])
    assert kinds(items) == [("a", "ok"), ("b", "truncated")]
    assert "b.jpg" in items[1].reason


@pytest.mark.parametrize("blocks", [2, 4, 6, 8, 12])
def test_an_archive_cut_at_a_member_border_is_truncated_not_shorter(tmp_path, blocks):
    items = read(tmp_path, three_samples()[: blocks * 512])
    complete, rest = "abc"[: blocks // 4], "abc"[blocks // 4 : -(-blocks // 4)]
    assert kinds(items) == [*((key, "ok") for key in complete), (rest, "truncated")]


def test_images_without_captions_are_whole_where_none_has_any(tmp_path):
    cut = tar_bytes(*((f"{key}.jpg", IMAGE) for key in "abc"))[: 6 * 512]
    assert kinds(read(tmp_path, cut)) == [("a", "ok"), ("b", "ok"), ("c", "ok"), ("", "truncated")]
    cut = tar_bytes(*((f"{key}.{ext}", b"{}") for key in "ab" for ext in ("jpg", "json")))[: 8 * 512]
    assert kinds(read(tmp_path, cut)) == [("a", "ok"), ("b", "ok"), ("", "truncated")]
    assert "'b' may have followed" in read(tmp_path, cut)[-1].reason
    assert kinds(read(tmp_path, cut[: 6 * 512])) == [("a", "ok"), ("b", "truncated")]


def test_a_bad_sample_before_a_cut_keeps_its_own_reason(tmp_path):
    data = tar_bytes(("a.jpg", IMAGE), ("a.txt", b"w"), ("b.jpg", IMAGE), special("b.txt", tarfile.SYMTYPE, "a.txt"))
    assert kinds(read(tmp_path, data[: 7 * 512])) == [("a", "ok"), ("b", "refused_member"), ("", "truncated")]


def test_an_archive_cut_inside_a_header_is_truncated(tmp_path):
    items = read(tmp_path, three_samples()[: 4 * 512 + 100])
    assert kinds(items) == [("a", "ok"), ("", "truncated")]


def test_a_whole_archive_has_nothing_to_report_at_its_end(tmp_path):
    data = three_samples()
    assert kinds(read(tmp_path, data)) == [("a", "ok"), ("b", "ok"), ("c", "ok")]
    assert kinds(read(tmp_path, data[: 12 * 512 + 1024])) == [("a", "ok"), ("b", "ok"), ("c", "ok")]
    assert read(tmp_path, tar_bytes()) == []


@pytest.mark.parametrize("data", [b"", b"plainly no tar" * 100, b"\x1f\x8b gzip it is not"])
def test_a_file_that_is_no_archive_is_reported(tmp_path, data):
    (item,) = read(tmp_path, data)
    assert item.kind in ("corrupt_archive", "truncated") and item.key == ""


def test_a_broken_header_in_the_middle_is_reported(tmp_path):
    data = bytearray(three_samples())
    data[4 * 512 : 4 * 512 + 512] = b"\x07" * 512
    assert kinds(read(tmp_path, bytes(data))) == [("a", "ok"), ("", "corrupt_archive")]


def test_archives_joined_by_cat_are_reported_not_read_as_shorter(tmp_path):
    data = tar_bytes(("a.jpg", IMAGE)) + tar_bytes(("b.jpg", IMAGE))
    assert kinds(read(tmp_path, data)) == [("a", "ok"), ("", "trailing_data")]


def test_a_compressed_archive_is_read_and_a_cut_one_is_truncated(tmp_path):
    whole = gzip.compress(three_samples(), mtime=0)
    assert kinds(read(tmp_path, whole)) == [("a", "ok"), ("b", "ok"), ("c", "ok")]
    assert kinds(read(tmp_path, whole[: len(whole) // 2]))[-1][1] == "truncated"


def test_a_key_that_comes_again_is_bad_the_second_time(tmp_path):
    members = [("a.jpg", IMAGE), ("b.jpg", IMAGE), ("a.txt", b"late"), ("b.jpg", b"other")]
    items = read(tmp_path, tar_bytes(*members))
    assert kinds(items) == [("a", "ok"), ("b", "ok"), ("a", "repeated_key"), ("b", "repeated_key")]
    items = read(tmp_path, tar_bytes(("a.jpg", IMAGE), ("a.JPG", b"other")))
    assert kinds(items) == [("a", "ok"), ("a", "repeated_key")]


def test_members_without_key_or_image_are_reported(tmp_path):
    items = read(
        tmp_path, tar_bytes(("README", b"?"), ("a.txt", b"words"), (".DS_Store", b"?"), ("b.jpg", IMAGE))
    )
    expected = [("README", "stray_member"), ("a", "no_image"), (".DS_Store", "stray_member"), ("b", "ok")]
    assert kinds(items) == expected
    assert "(txt)" in items[1].reason


def test_folders_inside_an_archive_are_part_of_keys(tmp_path):
    items = read(
        tmp_path, tar_bytes(special("x.y", tarfile.DIRTYPE), ("x.y/a.jpg", IMAGE), ("x.y/a.txt", b"w"))
    )
    assert kinds(items) == [("x.y/a", "ok")]
    assert split_name("x.y/a.seg.png") == ("x.y/a", "seg.png")


def test_shards_are_expanded_from_folders_globs_and_braces(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.tar").touch()
    (tmp_path / "notes.txt").touch()
    all_three = [str(tmp_path / f"{number}.tar") for number in range(3)]
    assert expand_shards([str(tmp_path)]) == all_three
    assert expand_shards([f"{tmp_path}/*.tar"]) == all_three
    assert expand_shards(f"{tmp_path}/{{0..2}}.tar") == all_three
    assert expand_shards([all_three[2], str(tmp_path)]) == [all_three[2], *all_three[:2]]
    assert expand_shards([f"memory://x/{{0..1}}.tar"]) == ["memory://x/0.tar", "memory://x/1.tar"]  # noqa: F541


@pytest.mark.parametrize("pattern", ["nowhere/*.tar", "nowhere.tar", "nowhere-{0..2}.tar", "{0..", "."])
def test_a_pattern_that_names_nothing_is_bad_usage_and_named(tmp_path, monkeypatch, pattern):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="shards") as caught:
        expand_shards([pattern])
    assert pattern in str(caught.value)


def test_commands_as_shards_are_refused(tmp_path):
    ran = tmp_path / "ran"
    for refused in (expand_shards, lambda url: list(read_samples(url))):
        with pytest.raises(UsageError, match="pipe"):
            refused(f"pipe:touch {ran}")
    assert not ran.exists()


def extents(data: bytes) -> list[tuple[int, int]]:
    """Where each header block begins, and where its member ends, with its padding."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return [(member.offset, member.offset_data + -(-member.size // 512) * 512) for member in tar]


@pytest.fixture(scope="module")
def real_shard(sample_shards, tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("fuzz") / "real.tar"
    samples = list(read_samples(sample_shards[0]))[:12]
    write_shard(path, ((sample.key, sample.members) for sample in samples))
    return path.read_bytes()


def test_a_shard_cut_anywhere_gives_all_samples_before_the_cut_and_says_that_it_was_cut(real_shard, tmp_path):
    whole = read(tmp_path, real_shard)
    places = extents(real_shard)
    members = len(places) // len(whole)
    with tarfile.open(fileobj=io.BytesIO(real_shard)) as tar:
        ends = [member.offset_data + member.size for member in tar]
    end = ends[members - 1 :: members]  # of each sample, without the padding
    borders = [place for extent in places for place in extent]
    rng = np.random.default_rng(0)
    anywhere = rng.integers(0, places[-1][1] + 512, 200).tolist()
    for cut in {*borders, *(border + 1 for border in borders), *ends, *anywhere}:
        items = read(tmp_path, real_shard[:cut])
        complete = sum(place <= cut for place in end)
        assert items[:complete] == whole[:complete], cut
        assert [item.kind for item in items[complete:]] == ["truncated"], cut


def test_flipped_bytes_lose_no_sample_before_them_and_change_none_silently(real_shard, tmp_path):
    whole = read(tmp_path, real_shard)
    places = extents(real_shard)
    members = len(places) // len(whole)
    rng = np.random.default_rng(1)
    in_headers = [start + int(rng.integers(512)) for start, _ in places for _ in range(6)]
    for place in [*in_headers, *rng.integers(0, len(real_shard), 250).tolist()]:
        data = bytearray(real_shard)
        data[place] ^= int(rng.integers(1, 256))
        items = read(tmp_path, bytes(data))
        hit = next((n for n, (_, end) in enumerate(places) if place < end), len(places))
        before = hit // members
        assert items[:before] == whole[:before], place
        if hit == len(places) or place < places[hit][0] + 512:
            # A header has a checksum: what follows is what it was, or said to be lost.
            assert items == whole or isinstance(items[-1], BadSample), place
            assert all(item in whole for item in items if isinstance(item, Sample)), place
        else:
            # The contents of files have none; the damage stays within its member.
            assert [item.key for item in items] == [item.key for item in whole], place
            changed = [number for number, item in enumerate(items) if item != whole[number]]
            assert changed in ([], [before]), place


@pytest.mark.parametrize("seed", range(4))
def test_whatever_happens_to_a_shard_ends_in_samples_and_reasons(real_shard, tmp_path, seed):
    rng = np.random.default_rng(seed)
    for _ in range(60):
        data = bytearray(real_shard)
        for _ in range(int(rng.integers(1, 20))):
            data[int(rng.integers(len(data)))] = int(rng.integers(256))
        start, length = int(rng.integers(len(data))), int(rng.integers(2000))
        match int(rng.integers(4)):
            case 0:
                del data[start : start + length]
            case 1:
                data[start:start] = rng.bytes(length)
            case 2:
                data[start : start + length] = bytes(len(data[start : start + length]))
        packed = gzip.compress(bytes(data), 1, mtime=0) if seed % 2 else bytes(data)
        if seed == 3:
            packed = bytearray(packed)
            packed[int(rng.integers(10, len(packed)))] ^= 0xFF
        for item in read(tmp_path, bytes(packed)):
            assert isinstance(item, (Sample, BadSample))
            if isinstance(item, BadSample):
                assert item.reason and item.kind
                item.key.encode()


def test_a_compressed_shard_with_a_flipped_byte_says_so(real_shard, tmp_path):
    whole = read(tmp_path, real_shard)
    packed = gzip.compress(real_shard, mtime=0)
    rng = np.random.default_rng(2)
    for place in rng.integers(10, len(packed), 100):
        data = bytearray(packed)
        data[place] ^= int(rng.integers(1, 256))
        items = read(tmp_path, bytes(data))
        assert items == whole or isinstance(items[-1], BadSample)


def test_a_shard_that_cannot_be_read_to_its_end_is_an_error_and_not_taken_for_a_shorter_one(tmp_path, monkeypatch):
    class Flaky(io.BytesIO):
        def read(self, size=-1, /):
            if self.tell() >= 2048:
                raise OSError(5, "Input/output error")
            return super().read(size)

    monkeypatch.setattr("builtins.open", lambda *_: Flaky(three_samples()))
    with pytest.raises(UserError, match="cannot read shard far.tar: .*Input/output error"):
        list(read_samples("far.tar"))


def test_a_shard_that_cannot_be_opened_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere.tar"):
        list(read_samples(str(tmp_path / "nowhere.tar")))


def test_shards_are_read_from_urls(tmp_path):
    import fsspec

    with fsspec.open("memory://set/0.tar", "wb") as stream:
        stream.write(three_samples())
    assert kinds(list(read_samples("memory://set/0.tar"))) == [("a", "ok"), ("b", "ok"), ("c", "ok")]


def test_shard_names_are_file_names_and_longer_only_where_needed():
    assert shard_names(["/x/a/0.tar", "/x/b/1.tar"]) == ["0.tar", "1.tar"]
    assert shard_names(["/x/a/0.tar", "/x/b/0.tar", "s3://set/2.tar"]) == ["a/0.tar", "b/0.tar", "2.tar"]
