"""What is written of a sample: its own bytes, and the account of its duplicates."""

from __future__ import annotations

import json

from curate.dedup import run_dedup
from curate.reading.captions import MAX_JSON_BYTES
from curate.reading.samples import read_samples
from curate.results.ledger import read_ledger
from curate.stages.write import with_account
from tests.curate.made_mess import everything, promised, settings


def test_dropped_samples_are_written_when_asked_for(curated, mess, tmp_path):
    out = tmp_path / "out"
    run_dedup(settings(mess, out, write_dropped=True))
    came = everything(mess)
    rows = [row for row in read_ledger(out).to_pylist() if row["status"] == "dropped"]
    written = [sample for shard in sorted((out / "dropped").glob("*.tar")) for sample in read_samples(str(shard))]
    assert [sample.key for sample in written] == [row["key"] for row in rows]
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
    assert [sample.key for sample in written] == [row["key"] for row in rows]
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
