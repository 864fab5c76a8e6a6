"""What is known of the shards of a run: read once, kept beside it, the same rows whatever becomes of the shards."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import zlib
from pathlib import Path

import pytest
from PIL import Image

from afresh.errors import UsageError, UserError
from curate.reading.samples import Sample, read_samples
from curate.reading.writing import write_shard
from curate.sample_set import load_part
from train.finetune.config import ShardGroup
from train.finetune.data import scan as scan_module
from train.finetune.data.scan import scan


def image(width: int, height: int, **options) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), (9, 99, 199)).save(file, **{"format": "JPEG", **options})
    return file.getvalue()


def samples(*sizes: tuple[int, int]) -> list[tuple[str, dict[str, bytes]]]:
    return [(f"{w}x{h}", {"jpg": image(w, h), "txt": f"{w} by {h}".encode()}) for w, h in sizes]


def test_captions_pooled_by_curation_are_trained_on_too():
    sample = load_part("finetune")[0]
    pooled = {"afresh": {"duplicates": 2, "captions": ["another", sample.caption]}}
    members = {**sample.members, "json": json.dumps(pooled).encode()}
    assert Sample(sample.shard, sample.key, members).captions == (sample.caption, "another")


def test_a_scan_finds_keys_captions_sizes_and_where_each_image_lies(tmp_path, shards):
    shard_set = scan([shards], tmp_path / "samples.arrow")
    row = 0
    for number, url in enumerate(shard_set.urls):
        data = Path(url).read_bytes()
        for sample in read_samples(url):
            assert shard_set.identity(row) == shard_set.ids[row] == (Path(url).name, sample.key)
            assert shard_set.captions(row) == (sample.caption,)
            start, size = shard_set.value(row, "offset"), shard_set.value(row, "bytes")
            assert data[start : start + size] == sample.image
            assert shard_set.value(row, "crc32") == zlib.crc32(sample.image)
            assert shard_set.locate(row)[0] == number
            row += 1
    assert row == len(shard_set) == len(shard_set.ids) == 20 and shard_set.left_out == 0


def test_sizes_are_upright_and_what_is_no_image_is_left_out_and_counted(tmp_path, capsys):
    exif = Image.Exif()
    exif[0x0112] = 6
    members = [
        *samples((80, 40)),
        ("turned", {"jpg": image(80, 40, exif=exif), "txt": b"turned"}),
        ("no", {"jpg": b"no image", "txt": b"no"}),
        ("cut", {"jpg": image(80, 40)[:40], "txt": b"cut"}),
    ]
    write_shard(tmp_path / "a.tar", members)
    shard_set = scan([str(tmp_path / "a.tar")], tmp_path / "samples.arrow")
    assert [(shard_set.value(row, "width"), shard_set.value(row, "height")) for row in (0, 1)] == [(80, 40), (40, 80)]
    assert len(shard_set) == 2 and shard_set.left_out == 2
    assert "a.tar: no: not a JPEG" in capsys.readouterr().err


def test_workers_are_given_the_path_and_not_the_samples(tmp_path, shards):
    shard_set = scan([shards], tmp_path / "samples.arrow")
    pickled = pickle.dumps(shard_set)
    assert len(pickled) < 500
    assert pickle.loads(pickled).identity(7) == shard_set.identity(7)


def test_a_second_scan_reads_no_shard_and_keeps_the_rows_though_shards_come_change_and_go(tmp_path, capsys):
    for name in "bcd":
        write_shard(tmp_path / "in" / f"{name}.tar", samples((20, 20), (30, 20)))
    first = scan([str(tmp_path / "in")], tmp_path / "samples.arrow")
    ids = list(first.ids)
    assert scan([str(tmp_path / "in")], tmp_path / "samples.arrow").urls == first.urls
    assert capsys.readouterr().err == ""
    write_shard(tmp_path / "in" / "a.tar", samples((20, 20)))
    write_shard(tmp_path / "in" / "c.tar", samples((20, 30)))
    (tmp_path / "in" / "d.tar").unlink()
    again = scan([str(tmp_path / "in")], tmp_path / "samples.arrow")
    assert list(again.ids) == ids
    said = capsys.readouterr().err
    assert "a.tar: came after the run was begun" in said
    assert "c.tar: changed since" in said
    assert "d.tar: cannot be opened" in said


def test_an_interrupted_scan_goes_on_and_several_processes_find_the_same(tmp_path, monkeypatch):
    for name in "abc":
        write_shard(tmp_path / "in" / f"{name}.tar", samples((20, 20), (30, 20)))
    whole = scan([str(tmp_path / "in")], tmp_path / "whole.arrow")
    read = []

    def interrupted(task) -> None:
        if len(read) == 2:
            raise KeyboardInterrupt
        read.append(task.name)
        scan_shard(task)

    scan_shard = scan_module._scan_shard
    with monkeypatch.context() as patch:
        patch.setattr(scan_module, "_scan_shard", interrupted)
        with pytest.raises(KeyboardInterrupt):
            scan([str(tmp_path / "in")], tmp_path / "samples.arrow")
    assert not (tmp_path / "samples.arrow").exists()
    read.clear()
    monkeypatch.setattr(scan_module, "_scan_shard", interrupted)
    again = scan([str(tmp_path / "in")], tmp_path / "samples.arrow")
    assert read == ["c.tar"]
    assert list(again.ids) == list(whole.ids)
    assert not (tmp_path / "samples.arrow.parts").exists()
    monkeypatch.setattr(scan_module, "_scan_shard", scan_shard)
    monkeypatch.setattr(scan_module, "ALONE_BYTES", 0)
    assert list(scan([str(tmp_path / "in")], tmp_path / "two.arrow", workers=2).ids) == list(whole.ids)


def test_a_compressed_shard_has_no_places_and_shards_of_one_name_are_told_apart(tmp_path):
    write_shard(tmp_path / "one" / "a.tar", samples((20, 20)))
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "a.tar").write_bytes(gzip.compress((tmp_path / "one" / "a.tar").read_bytes()))
    shard_set = scan([str(tmp_path / "one"), str(tmp_path / "two")], tmp_path / "samples.arrow")
    assert list(shard_set.ids) == [("one/a.tar", "20x20"), ("two/a.tar", "20x20")]
    assert shard_set.value(0, "offset") == 512 and shard_set.value(1, "offset") == -1


def test_weights_come_from_the_json_and_a_negative_one_is_refused_by_name(tmp_path):
    heavy = [(key, {**members, "json": json.dumps({"w": w}).encode()}) for (key, members), w in zip(
        samples((20, 20), (30, 20), (40, 20)), (2.5, 0, "much"), strict=True
    )]  # fmt: skip
    write_shard(tmp_path / "a.tar", heavy)
    shard_set = scan([str(tmp_path / "a.tar")], tmp_path / "samples.arrow", weight_field="w")
    assert [shard_set.value(row, "weight") for row in range(3)] == [2.5, 0.0, 1.0]
    write_shard(tmp_path / "b.tar", [("bad", {**heavy[0][1], "json": b'{"w": -1}'})])
    with pytest.raises(UserError, match=r"b.tar: bad: w is -1"):
        scan([str(tmp_path / "b.tar")], tmp_path / "other.arrow", weight_field="w")


def test_groups_of_shards_have_repeats_and_a_contradiction_is_refused(tmp_path):
    for name in "abc":
        write_shard(tmp_path / f"{name}.tar", samples((20, 20)))
    groups = [str(tmp_path / "a.tar"), ShardGroup(str(tmp_path / "[bc].tar"), repeats=3)]
    assert scan(groups, tmp_path / "samples.arrow").repeats == [1, 3, 3]
    with pytest.raises(UsageError, match="given twice, with repeats 1 and 3"):
        scan([str(tmp_path), *groups], tmp_path / "other.arrow")
    with pytest.raises(UsageError, match="repeats must be 1 or more"):
        scan([ShardGroup(str(tmp_path), repeats=0)], tmp_path / "other.arrow")


def test_shards_without_an_image_are_refused(tmp_path):
    write_shard(tmp_path / "a.tar", [("a", {"txt": b"a"})])
    with pytest.raises(UserError, match="no sample with an image"):
        scan([str(tmp_path)], tmp_path / "samples.arrow")
