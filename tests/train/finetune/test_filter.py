"""The memorization filter: its verdicts, its record, and runs under it."""

from __future__ import annotations

import pyarrow.parquet as pq
import torch

from tests.train.finetune.runs import same, settings, weights
from train.components import load_pipeline
from train.finetune.config import FilterConfig
from train.finetune.filter import VerdictTable, filter_weights, is_judged
from train.finetune.loop import run_finetune


def test_filter_drops_exactly_the_judged_samples_at_or_above_the_threshold():
    eps_uncond = torch.zeros(4, 1, 2, 2)
    eps_cond = torch.zeros(4, 1, 2, 2)
    eps_cond[:, 0, 0, 0] = torch.tensor([1.0, 2.0, 3.0, 3.0])
    judged = torch.tensor([True, True, True, False])
    kept, magnitudes = filter_weights(eps_cond, eps_uncond, judged, FilterConfig("every_step", threshold=2.0))
    assert kept.tolist() == [1, 0, 0, 1]
    assert magnitudes[:3].tolist() == [1, 2, 3]
    assert magnitudes[3].isnan()


def test_samples_without_their_caption_are_not_judged_and_policies_choose_timesteps():
    t = torch.tensor([10, 600, 900])
    conditional = torch.tensor([True, True, False])
    assert is_judged(t, conditional, FilterConfig("every_step"), 0).tolist() == [True, True, False]
    assert is_judged(t, conditional, FilterConfig("noisy_steps", min_timestep=500), 0).tolist() == [False, True, False]
    assert not is_judged(t, conditional, FilterConfig("off"), 0).any()
    assert not is_judged(t, conditional, FilterConfig("every_step", warmup_steps=5), 4).any()


def test_verdict_table_counts_repeated_visits_by_band(tmp_path):
    table = VerdictTable(3)
    rows, t = torch.tensor([1, 1, 2]), torch.tensor([50, 950, 950])
    table.record(rows, t, torch.tensor([1.0, 0.0, 1.0]), torch.tensor([1.0, 3.0, float("nan")]))
    table.write(tmp_path / "v.parquet", [("s", "a"), ("s", "b"), ("s", "c")])
    written = pq.read_table(tmp_path / "v.parquet").to_pylist()
    assert [(row["key"], row["seen"], row["judged"], row["dropped"]) for row in written] == [
        ("b", 2, 2, 1),
        ("c", 1, 0, 0),
    ]
    assert written[0]["magnitude_by_band"] == [1.0] + [None] * 8 + [3.0]


def test_steps_on_which_everything_is_dropped_change_nothing_and_are_counted(model, shards, tmp_path):
    dropped_all = FilterConfig("every_step", threshold=1e-9)
    summary = run_finetune(
        settings(model, shards, tmp_path / "run", filter=dropped_all, caption_dropout=0.0, ema_decay=0.9)
    )
    assert summary["dropped"] == summary["judged"] == 16
    assert summary["skipped_steps"] == 4
    assert same(load_pipeline(model).unet.state_dict(), weights(tmp_path / "run"))


def test_a_filter_that_drops_nothing_gives_the_same_weights_as_none(model, shards, tmp_path):
    run_finetune(settings(model, shards, tmp_path / "off"))
    run_finetune(settings(model, shards, tmp_path / "on", filter=FilterConfig("every_step", threshold=1e9)))
    assert same(weights(tmp_path / "off"), weights(tmp_path / "on"))
