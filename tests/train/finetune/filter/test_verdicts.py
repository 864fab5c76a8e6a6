"""The loop closes: what a run's filter always left out is excluded by the next curation and the next run."""

from __future__ import annotations

import pyarrow.parquet as pq
import pytest

from afresh.errors import UsageError, UserError
from curate.config import DedupConfig
from curate.decisions.sample_lists import read_ids
from curate.dedup import run_dedup
from curate.results.ledger import read_ledger
from tests.train.finetune.runs import settings
from train.finetune.config import FilterConfig
from train.finetune.filter.config import VerdictsConfig
from train.finetune.filter.verdicts import run_verdicts
from train.finetune.loop import run_finetune


def test_what_is_always_left_out_is_listed_and_excluded(model, shards, tmp_path):
    run_dedup(DedupConfig(shards=[shards], out=str(tmp_path / "curated"), workers=1, samples_per_shard=8))
    curated = str(tmp_path / "curated" / "shards")
    # A threshold that about half of the samples reach at each of their visits, in four epochs of a model that stands.
    changes = {"steps": 9, "batch_size": 8, "learning_rate": 1e-9, "caption_dropout": 0.0}
    watched = FilterConfig("every_step", threshold=1e9)
    run_finetune(settings(model, curated, tmp_path / "watched", filter=watched, **changes))
    rows = pq.read_table(tmp_path / "watched" / "verdicts.parquet").to_pylist()
    lowest = sorted(min(m for m in row["magnitude_by_band"] if m is not None) for row in rows)
    judged = FilterConfig("every_step", threshold=lowest[len(lowest) // 2])
    run_finetune(settings(model, curated, tmp_path / "run", filter=judged, **changes))
    rows = pq.read_table(tmp_path / "run" / "verdicts.parquet").to_pylist()
    always = {(row["shard"], row["key"]) for row in rows if row["judged"] >= 3 and row["reached"] == row["judged"]}

    summary = run_verdicts(VerdictsConfig(str(tmp_path / "run"), str(tmp_path / "always.tsv")))
    assert summary["listed"] == len(always) and set(read_ids(tmp_path / "always.tsv")) == always
    assert 0 < len(always) < len(rows)
    some = run_verdicts(VerdictsConfig(str(tmp_path / "run"), str(tmp_path / "some.tsv"), min_share=0.5))
    assert len(always) <= some["listed"] <= len(rows)

    again = DedupConfig(
        shards=[curated], out=str(tmp_path / "again"), workers=1, exclude=str(tmp_path / "always.tsv")
    )
    assert run_dedup(again)["reasons"]["excluded"] == len(always)
    ledger = read_ledger(tmp_path / "again").to_pylist()
    assert {(row["shard"], row["key"]) for row in ledger if row["reason"] == "excluded"} == always

    without = settings(model, curated, tmp_path / "next", exclude=str(tmp_path / "always.tsv"), **changes)
    run_finetune(without)
    seen = {(row["shard"], row["key"]) for row in pq.read_table(tmp_path / "next" / "verdicts.parquet").to_pylist()}
    assert seen == {(row["shard"], row["key"]) for row in rows} - always
    # The rest is what a run on the second curation's shards sees, in an order of its own.
    run_finetune(settings(model, str(tmp_path / "again" / "shards"), tmp_path / "last", **changes))
    last = pq.read_table(tmp_path / "last" / "verdicts.parquet")["key"].to_pylist()
    assert sorted(last) == sorted(key for _, key in seen)

    (tmp_path / "always.tsv").write_text("000000.tar\tgone\n")
    with pytest.raises(UserError, match="000000.tar has no sample gone"):
        run_finetune(settings(model, curated, tmp_path / "refused", exclude=str(tmp_path / "always.tsv"), **changes))


def test_verdicts_say_what_they_need(model, shards, tmp_path):
    with pytest.raises(UserError, match="there are no verdicts"):
        run_verdicts(VerdictsConfig(str(tmp_path), str(tmp_path / "ids")))
    run_finetune(settings(model, shards, tmp_path / "run", steps=1))
    with pytest.raises(UserError, match="the run had no filter"):
        run_verdicts(VerdictsConfig(str(tmp_path / "run"), str(tmp_path / "ids")))
    with pytest.raises(UsageError, match="min_share"):
        run_verdicts(VerdictsConfig(str(tmp_path / "run"), str(tmp_path / "ids"), min_share=0.0))
