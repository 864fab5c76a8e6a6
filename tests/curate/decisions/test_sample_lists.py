"""Lists of samples by identity, and curation that leaves them out."""

from __future__ import annotations

import pytest

from afresh.errors import UsageError, UserError
from curate.config import DedupConfig
from curate.decisions.sample_lists import ids_digest, listed_keys, read_ids, write_ids
from curate.dedup import run_dedup
from curate.reading.urls import find_shards, shard_names
from curate.reading.writing import write_shard
from curate.results.ledger import read_ledger
from curate.sample_set import load_part


def test_a_list_comes_back_as_it_was_written_sorted_and_without_repeats(tmp_path):
    ids = [("b.tar", "x y"), ("a/000000.tar", "é/1"), ("b.tar", "x y")]
    assert write_ids(tmp_path / "ids", ids) == 2
    assert read_ids(tmp_path / "ids") == [("a/000000.tar", "é/1"), ("b.tar", "x y")]
    (tmp_path / "again").write_text("b.tar\tx y\r\n\na/000000.tar\té/1")  # another order, another system's lines
    assert ids_digest(tmp_path / "again") == ids_digest(tmp_path / "ids")
    with pytest.raises(UserError, match="tab or line end"):
        write_ids(tmp_path / "ids", [("b.tar", "x\ty")])
    (tmp_path / "again").write_text("b.tar/x")
    with pytest.raises(UsageError, match="again, line 1: expected a shard's name, a tab and a key"):
        read_ids(tmp_path / "again")
    with pytest.raises(UsageError, match="cannot be read"):
        read_ids(tmp_path / "nowhere")


def test_a_shard_is_found_by_the_name_that_a_ledger_gave_it():
    urls = ["/data/a/0.tar", "/data/b/0.tar", "s3://bucket/b/1.tar"]
    for names in (shard_names(urls), ["a/0.tar", "data/b/0.tar", "1.tar"]):  # among others, and alone
        assert [find_shards([name], urls, "list")[name] for name in names] == [0, 1, 2]
    assert find_shards(["2.tar", "ta/b/0.tar"], urls, "list") == {}
    with pytest.raises(UsageError, match="list: the shard 0.tar may be any of /data/a/0.tar, /data/b/0.tar"):
        find_shards(["0.tar"], urls, "list")


def test_a_list_of_other_shards_is_refused(tmp_path):
    write_ids(tmp_path / "ids", [("a.tar", "x"), ("b.tar", "y")])
    assert listed_keys(tmp_path / "ids", ["/data/b.tar", "/data/c.tar"]) == [{"y"}, set()]
    with pytest.raises(UsageError, match="names none of the shards"):
        listed_keys(tmp_path / "ids", ["/data/c.tar"])


def test_listed_samples_are_dropped_whatever_else_they_are(tmp_path):
    samples = load_part("finetune")[:6]
    copies = [(f"{s.key}-copy", dict(s.members)) for s in samples[:2]]
    write_shard(tmp_path / "in" / "000000.tar", [*((s.key, dict(s.members)) for s in samples), *copies])
    config = DedupConfig(
        shards=[str(tmp_path / "in")], out=str(tmp_path / "out"), workers=1, exclude=str(tmp_path / "ids")
    )
    write_ids(tmp_path / "ids", [("000000.tar", samples[0].key), ("000000.tar", samples[5].key)])
    summary = run_dedup(config)
    rows = {row["key"]: row for row in read_ledger(tmp_path / "out").to_pylist()}
    assert summary["reasons"] == {"exact_image": 1, "excluded": 2} and summary["kept"] == 5
    for sample in (samples[0], samples[5]):
        row = rows[sample.key]
        assert (row["status"], row["reason"], row["kept_key"]) == ("dropped", "excluded", None)
    assert rows[copies[0][0]]["status"] == "kept"  # what is excluded stands for nothing
    assert rows[copies[1][0]]["kept_key"] == samples[1].key
    assert "excluded" in (tmp_path / "out" / "report.html").read_text()

    write_ids(tmp_path / "ids", [("000000.tar", samples[5].key)])  # the file has the same name, and another content
    assert run_dedup(config)["reasons"] == {"exact_image": 2, "excluded": 1}
    write_ids(tmp_path / "ids", [("000000.tar", "unheard of")])
    with pytest.raises(UserError, match="000000.tar has no sample unheard of"):
        run_dedup(config)
