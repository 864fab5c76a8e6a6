"""Shards are written so that equal samples give equal bytes, and never what would not be read back."""

from __future__ import annotations

import io
import tarfile

import pytest

from curate.reading.samples import read_samples
from curate.reading.writing import write_shard
from tests.curate.reading.made_shards import IMAGE


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
