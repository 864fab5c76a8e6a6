"""What is written of a sample: its own bytes, and the account of its duplicates."""

from __future__ import annotations

import io
import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from curate.dedup import run_dedup
from curate.export import kept_samples
from curate.reading.captions import MAX_JSON_BYTES
from curate.reading.members import is_written_as
from curate.reading.samples import read_samples
from curate.reading.writing import write_shard
from curate.results.ledger import read_ledger
from curate.stages.write import Output, together, with_account
from tests.curate.made_mess import everything, promised, settings


def test_dropped_samples_are_written_when_asked_for(curated, mess, tmp_path):
    out = tmp_path / "out"
    run_dedup(settings(mess, out, write_dropped=True))
    came = everything(mess)
    rows = [row for row in read_ledger(out).to_pylist() if row["status"] == "dropped"]
    written = [sample for shard in sorted((out / "dropped").glob("*.tar")) for sample in read_samples(str(shard))]
    assert all(is_written_as(sample.key, row["key"]) for sample, row in zip(written, rows, strict=True))
    assert all(came[row["shard"], row["key"]].members == s.members for row, s in zip(rows, written, strict=True))
    of_shards = {k: v for k, v in promised(out).items() if k.startswith("shards")}
    assert of_shards == {k: v for k, v in promised(curated[0]).items() if k.startswith("shards")}
    run_dedup(settings(mess, out))  # and gone when they are no longer
    assert not (out / "dropped").exists()


def test_kept_samples_have_the_bytes_they_came_with(curated, mess):
    out, summary = curated
    came = everything(mess)
    rows = [row for row in read_ledger(out).to_pylist() if row["status"] == "kept"]
    written = [
        sample for shard in sorted((out / "shards").glob("*.tar")) for sample in read_samples(str(shard))
    ]
    assert all(is_written_as(sample.key, row["key"]) for sample, row in zip(written, rows, strict=True))
    pooled = 0
    for row, sample in zip(rows, written, strict=True):
        original = came[row["shard"], row["key"]]
        for ext in original.members:
            if ext != "json":
                assert sample.members[ext] == original.members[ext]
        fields = json.loads(sample.members.get("json", b"{}"))
        account = fields.pop("afresh", None)
        if account is None:
            assert sample.members == original.members
        else:
            assert fields == json.loads(original.members.get("json", b"{}"))
            assert account["duplicates"] >= 1 and account["captions"]
            pooled += 1
    assert pooled >= 15
    assert pooled == summary["captions_pooled"]


def test_a_key_that_repeats_across_shards_is_two_samples(curated, mess):
    out, _ = curated
    for shard in (out / "shards").glob("*.tar"):
        keys = [sample.key for sample in read_samples(str(shard))]
        assert len(keys) == len(set(keys))
    first_key = next(iter(read_samples(str(mess / "a.tar")))).key
    rows = [row for row in read_ledger(out).to_pylist() if row["key"] == first_key]
    assert [row["shard"] for row in rows] == ["a.tar", "c.tar"]


@pytest.fixture
def restarting(tmp_path):
    """Twenty shards of five images that all differ, whose keys begin anew in each."""
    rng, folder = np.random.default_rng(0), tmp_path / "restarting"
    folder.mkdir()

    def picture() -> bytes:
        buffer = io.BytesIO()
        small = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
        small.resize((64, 64), Image.Resampling.NEAREST).save(buffer, "PNG")
        return buffer.getvalue()

    for shard in range(20):
        samples = ((f"{key:04d}", {"png": picture(), "txt": f"{shard} {key}".encode()}) for key in range(5))
        write_shard(folder / f"{shard:03d}.tar", samples)
    return folder


def test_shards_hold_as_many_samples_as_asked_for_where_keys_begin_anew(restarting, tmp_path):
    out = tmp_path / "out"
    summary = run_dedup(settings(restarting, out, samples_per_shard=40, threshold=1.0))
    shards = [list(read_samples(str(shard))) for shard in sorted((out / "shards").glob("*.tar"))]
    assert summary["kept"] == 100 and summary["shards"] == 3 and [len(shard) for shard in shards] == [40, 40, 20]
    written = [sample for shard in shards for sample in shard]
    assert [sample.caption for sample in written] == [f"{shard} {key}" for shard in range(20) for key in range(5)]
    assert [sample.key for sample in shards[0][:6]] == ["0000", "0001", "0002", "0003", "0004", "001__0000"]
    rows = [row for row in read_ledger(out).to_pylist() if row["status"] == "kept"]
    assert all(is_written_as(sample.key, row["key"]) for sample, row in zip(written, rows, strict=True))
    exported = list(kept_samples(str(out)))
    assert [(shard, sample.key) for sample, shard in exported] == [(row["shard"], row["key"]) for row in rows]


@pytest.mark.parametrize("samples_per_shard", [1, 7, 1000])
def test_an_input_shard_is_read_once_whatever_it_feeds(restarting, tmp_path, monkeypatch, samples_per_shard):
    read = Counter()

    def counted(url, **options):
        read[url] += 1
        return read_samples(url, **options)

    monkeypatch.setattr("curate.stages.write.read_samples", counted)
    run_dedup(settings(restarting, tmp_path / "out", samples_per_shard=samples_per_shard, threshold=1.0))
    assert len(read) == 20 and set(read.values()) == {1}


def test_a_run_that_stopped_writes_the_missing_shards_alone(restarting, tmp_path):
    config = settings(restarting, tmp_path / "out", samples_per_shard=10, threshold=1.0)
    run_dedup(config)
    before = promised(tmp_path / "out")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out/shards").glob("*.tar")}
    gone = [tmp_path / "out/shards" / name for name in ("000003.tar", "000007.tar")]
    for path in gone:
        path.unlink()
    run_dedup(config)
    assert promised(tmp_path / "out") == before
    assert {path for path in times if path.stat().st_mtime_ns != times[path]} == set(gone)


@pytest.mark.parametrize("workers", [2, 3, 8])
def test_tasks_are_even_and_two_that_meet_inside_an_input_shard_are_few(workers):
    sizes = [int(size) for size in np.random.default_rng(workers).integers(1, 60, 200)]
    bounds = np.cumsum([0, *sizes])  # of the input shards
    outputs = [
        Output(f"{n:06d}.tar", at, at + 10, "", *(np.searchsorted(bounds, [at, at + 9], side="right") - 1).tolist())
        for n, at in enumerate(range(0, int(bounds[-1]) - 9, 10))
    ]
    tasks = together(outputs, workers)
    assert [output for task in tasks for output in task] == outputs
    readers = Counter(source for task in tasks for source in range(task[0].first, task[-1].last + 1))
    assert max(readers.values()) <= 2 and sum(count - 1 for count in readers.values()) < len(tasks)
    assert 4 * workers <= len(tasks) <= 8 * workers
    assert max(10 * len(task) for task in tasks) <= 2 * sum(sizes) / (4 * workers) + 60
    alone = Counter(source for task in together(outputs, 1) for source in range(task[0].first, task[-1].last + 1))
    assert set(alone.values()) == {1}


def test_an_account_goes_into_json_or_beside_it():
    account = {"duplicates": 2, "captions": ["ein Bär"]}
    kept = {"jpg": b"1", "txt": b"2"}
    assert json.loads(with_account(kept, account)["json"]) == {"afresh": account}
    inside = with_account({**kept, "json": b'{"a": 1}'}, account)
    assert json.loads(inside["json"]) == {"a": 1, "afresh": account} and inside["jpg"] == b"1"
    beside = with_account({**kept, "json": b"[1]"}, account)
    assert beside["json"] == b"[1]" and json.loads(beside["afresh.json"]) == account


def test_a_json_that_cannot_be_written_again_keeps_its_bytes():
    account = {"duplicates": 1, "captions": ["words"]}
    huge = b'{"a": "' + b"x" * MAX_JSON_BYTES + b'"}'
    for written in (b'{"a": 1e400}', b'{"a": NaN}', b'{"a": ' + b"9" * 5000 + b"}", huge):
        members = with_account({"jpg": b"1", "json": written}, account)
        assert members["json"] == written and json.loads(members["afresh.json"]) == account
    for depth in range(800, 1100):  # somewhere here it can be read, and is too deep to be written
        written = b'{"a": ' * depth + b"1" + b"}" * depth
        members = with_account({"jpg": b"1", "json": written}, account)
        assert members["json"] == written or "afresh.json" not in members
