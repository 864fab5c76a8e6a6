"""Samples are read safely and completely: every member belongs to one, or is reported by name."""

from __future__ import annotations

import tarfile
import tracemalloc
from pathlib import PurePath

import pytest

from curate.reading import samples as shards
from curate.reading.members import MAX_NAME, split_name
from curate.reading.samples import Sample, read_samples
from curate.reading.tar import MAX_MEMBER_BYTES
from tests.curate.reading.made_shards import IMAGE, kinds, read, special, tar_bytes


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
    expected = [("README", "stray_member"), ("a", "no_image"), ("b", "ok")]
    assert kinds(items) == expected
    assert "(txt)" in items[1].reason


def test_folders_inside_an_archive_are_part_of_keys(tmp_path):
    items = read(
        tmp_path, tar_bytes(special("x.y", tarfile.DIRTYPE), ("x.y/a.jpg", IMAGE), ("x.y/a.txt", b"w"))
    )
    assert kinds(items) == [("x.y/a", "ok")]
    assert split_name("x.y/a.seg.png") == ("x.y/a", "seg.png")


def of_a_mac(*members: tuple[str, bytes]) -> bytes:
    """An archive as a Mac makes it: before each member one with its attributes, and a folder's view beside them."""
    doubled = [(str(PurePath(name).with_name(f"._{PurePath(name).name}")), b"\0\5\x16\7") for name, _ in members]
    pairs = [one for pair in zip(doubled, members, strict=True) for one in pair]
    return tar_bytes(*pairs[:3], (".DS_Store", b"?"), *pairs[3:], ("__MACOSX/._a.jpg", b"?"), ("__MACOSX/b.jpg", b"?"))


def test_an_archive_made_on_a_mac_is_read_as_if_it_were_not(tmp_path):
    members = [(f"{key}.{ext}", data) for key in ("a", "in/b") for ext, data in (("jpg", IMAGE), ("txt", b"words"))]
    items = read(tmp_path, of_a_mac(*members))
    assert kinds(items) == [("a", "ok"), ("in/b", "ok")]
    assert [(item.caption, list(item.members)) for item in items] == [("words", ["jpg", "txt"])] * 2


@pytest.mark.parametrize("stray", ["README", "/etc/passwd", "../b.txt", ".hidden"])
def test_what_is_no_part_of_a_sample_is_told_and_does_not_end_it(tmp_path, stray):
    data = tar_bytes(("a.jpg", IMAGE), (stray, b"?"), ("a.txt", b"words"), ("c.jpg", IMAGE))
    items = read(tmp_path, data)
    assert [item.key for item in items if isinstance(item, Sample)] == ["a", "c"]
    assert (items[0].caption, list(items[0].members)) == ("words", ["jpg", "txt"])
    assert kinds(items)[1][0] == stray


def test_stray_members_between_those_of_a_sample_are_not_held_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "MAX_BETWEEN", 10)
    strays = [(f"stray{number}", b"?") for number in range(25)]
    items = read(tmp_path, tar_bytes(("a.jpg", IMAGE), *strays, ("a.txt", b"late")))
    assert [item.key for item in items] == ["a", *(name for name, _ in strays), "a"]
    assert items[-1].kind == "repeated_key"


def test_a_name_that_was_cut_at_an_earlier_dot_is_told_so(tmp_path):
    items = read(tmp_path, tar_bytes(("22.5cm_a.jpg", IMAGE), ("p.left.jpg", IMAGE), ("q.seg.npy", IMAGE)))
    assert kinds(items) == [("22", "no_image"), ("p", "no_image"), ("q", "no_image")]
    assert "first dot of its name, here '22 . 5cm_a.jpg'" in items[0].reason and "'p . left.jpg'" in items[1].reason
    assert "dot" not in items[2].reason
