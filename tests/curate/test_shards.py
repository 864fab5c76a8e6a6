"""Tar shards are read safely and completely, and written so that equal samples give equal bytes."""

from __future__ import annotations

import gzip
import io
import tarfile
from pathlib import Path

import pytest

from curate.console import UsageError, UserError
from curate.shards import BadSample, Sample, expand_shards, read_samples, shard_names, split_name, write_shard

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


@pytest.mark.parametrize("key", ["../up", "/etc/a", "dotted.key", "C:\\a", ""])
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
