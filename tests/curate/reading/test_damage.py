"""Shards that are cut, flipped or otherwise damaged: no sample before the damage is lost, none changes silently."""

from __future__ import annotations

import gzip
import io
import tarfile

import numpy as np
import pytest

from curate.reading.samples import BadSample, Sample, Shard, read_samples
from curate.reading.writing import write_shard
from tests.curate.reading.made_shards import IMAGE, kinds, read, special, tar_bytes, three_samples


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


def test_zeros_are_not_an_end(tmp_path):
    """A copy that was never finished ends in zeros: what they hide is lost, and said to be."""
    data = tar_bytes(*((f"{number:03d}.jpg", IMAGE) for number in range(60)))
    lost = data[: len(data) // 2] + bytes(len(data) - len(data) // 2)
    *whole, last = read(tmp_path, lost)
    assert all(isinstance(item, Sample) for item in whole) and (last.kind, last.key) == ("truncated", "")
    assert "zero bytes stand behind its end" in last.reason
    for zeros, found in ((20 * 512, []), (50 * 512, [("", "truncated")])):
        assert kinds(read(tmp_path, three_samples() + bytes(zeros)))[3:] == found
    assert kinds(read(tmp_path, bytes(100_000))) == [("", "truncated")]


def test_a_shard_without_a_sample_says_so(tmp_path):
    folder = tarfile.TarInfo("folder")
    folder.type = tarfile.DIRTYPE
    for data in (tar_bytes(), tar_bytes(folder), tar_bytes(("._a.jpg", IMAGE)), bytes(1024)):
        (tmp_path / "s.tar").write_bytes(data)
        (item,) = Shard(str(tmp_path / "s.tar"), "s.tar").accounted()
        assert (item.key, item.kind, item.reason) == ("", "truncated", "archive holds no sample")
