"""Lists of samples by identity, and curation that leaves them out."""

from __future__ import annotations

import numpy as np
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


def review(tmp_path, samples, **settings) -> tuple[dict, dict[str, dict]]:
    """A curation of samples under a review's lists; the summary, and the ledger's rows by key."""
    write_shard(tmp_path / "in" / "000000.tar", samples)
    shards = [str(tmp_path / "in")]
    summary = run_dedup(DedupConfig(shards=shards, out=str(tmp_path / "out"), workers=1, **settings))
    return summary, {row["key"]: row for row in read_ledger(tmp_path / "out").to_pylist()}


@pytest.mark.parametrize("rule", ["greedy", "components", "tests.curate.decisions.test_sample_lists:first_of_all"])
def test_what_a_list_keeps_stays_and_stands_for_its_copies(rule, tmp_path):
    first, other, *_ = load_part("finetune")
    copies = [(name, dict(first.members)) for name in ("one", "two", "three", "four")]
    write_ids(tmp_path / "keep", [("000000.tar", "two"), ("000000.tar", "four")])
    samples = [*copies, (other.key, dict(other.members))]
    quota = {} if ":" in rule else {"max_per_caption": 1}
    summary, rows = review(tmp_path, samples, rule=rule, keep=str(tmp_path / "keep"), **quota)
    assert [key for key, row in rows.items() if row["status"] == "kept"] == ["two", "four", other.key]
    assert {rows[key]["kept_key"] for key in ("one", "three")} == {"two"}
    assert {rows[key]["group"] for key in ("one", "two", "three")} == {rows["two"]["group"]}
    assert summary["reasons"] == {"exact_image": 2}


def first_of_all(near, captions, order):
    """A rule of one's own: the first row stands for all that have its image."""
    stand_in = np.full(len(captions), -1, np.int64)
    same = near.image_of == near.image_of[order[0]]
    stand_in[same] = order[0]
    stand_in[order[0]] = -1
    return stand_in


def test_what_a_list_keeps_stays_though_a_filter_and_another_set_leave_it_out(tmp_path):
    samples = [(one.key, dict(one.members)) for one in load_part("finetune")[:3]]
    kept = samples[1][0]
    write_shard(tmp_path / "held_out.tar", samples)
    run_dedup(DedupConfig(shards=[str(tmp_path / "held_out.tar")], out=str(tmp_path / "other"), workers=1))
    write_ids(tmp_path / "keep", [("000000.tar", kept)])
    for settings in (
        {"against": [str(tmp_path / "other")]},
        {"steps": ["tests.curate.decisions.test_sample_lists:leave_out"]},
    ):
        _, rows = review(tmp_path, samples, keep=str(tmp_path / "keep"), **settings)
        assert [key for key, row in rows.items() if row["status"] == "kept"] == [kept]
        row = rows[kept]
        assert (row["reason"], row["kept_shard"], row["kept_key"], row["image_similarity"]) == (None,) * 4


def leave_out(sample) -> bool:
    """A filter that leaves out everything."""
    return False


def test_a_review_is_read_anew_and_must_not_contradict_itself(tmp_path):
    first = load_part("finetune")[0]
    samples = [("one", dict(first.members)), ("two", dict(first.members)), ("torn", {"png": b"?", "txt": b"a"})]
    for name in ("one", "two"):
        write_ids(tmp_path / "keep", [("000000.tar", name)])
        _, rows = review(tmp_path, samples, keep=str(tmp_path / "keep"))
        assert [key for key, row in rows.items() if row["status"] == "kept"] == [name]
    write_ids(tmp_path / "drop", [("000000.tar", "two")])
    with pytest.raises(UsageError, match="000000.tar: two stands in .*drop and in .*keep"):
        review(tmp_path, samples, keep=str(tmp_path / "keep"), exclude=str(tmp_path / "drop"))
    write_ids(tmp_path / "keep", [("000000.tar", "unheard of")])
    with pytest.raises(UserError, match="has no sample unheard of"):
        review(tmp_path, samples, keep=str(tmp_path / "keep"))


def test_a_sample_to_keep_that_cannot_be_read_is_told(tmp_path, capsys):
    first = load_part("finetune")[0]
    samples = [("one", dict(first.members)), ("torn", {"png": b"?", "txt": b"a"})]
    write_ids(tmp_path / "keep", [("000000.tar", "one"), ("000000.tar", "torn")])
    _, rows = review(tmp_path, samples, keep=str(tmp_path / "keep"))
    assert rows["torn"]["status"] == "unreadable" and rows["one"]["status"] == "kept"
    assert "1 of the samples to keep cannot be read" in capsys.readouterr().err


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
