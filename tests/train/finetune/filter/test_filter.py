"""The memorization filter: its verdicts, its record, and runs under it."""

from __future__ import annotations

import dataclasses
import json
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from afresh.errors import UsageError, UserError
from tests.train.finetune.runs import launch, log_lines, same, settings, wait_for_step, weights
from train.denoising.opening.loading import load_pipeline
from train.denoising.schedules import FlowSchedule, NoiseSchedule
from train.finetune.config import Calibration, FilterConfig, Flow, Timesteps
from train.finetune.filter.calibration import ENOUGH
from train.finetune.filter.filter import MemorizationFilter
from train.finetune.filter.policies import filter_weights, in_turn, is_judged
from train.finetune.filter.settings import with_lengths, with_min_timestep
from train.finetune.filter.table import VerdictTable
from train.finetune.loop import run_finetune
from train.finetune.model.diffusion import timesteps_of
from train.finetune.state.log import Tally
from train.memorization.thresholds import FILE, Thresholds

NAN = float("nan")


def judged_at(t, captioned, policy, rows=None, visits=None):
    n = len(t)
    rows = torch.arange(n) if rows is None else torch.tensor(rows)
    visits = torch.zeros(n, dtype=torch.int64) if visits is None else torch.tensor(visits)
    return is_judged(torch.tensor(t), torch.tensor(captioned), rows, visits, policy, seed=0).tolist()


class OneNumber:
    """A filter over predictions whose magnitude is given: ``ε(x, e_p)`` has it in one element, ``ε(x, ∅)`` is zero."""

    def __init__(self, policy: FilterConfig, samples: int = 8, thresholds: Thresholds | None = None, **options) -> None:
        schedule = SimpleNamespace(
            timesteps=1000, space="epsilon", prediction=lambda output, x_t, t: SimpleNamespace(compared=output)
        )
        self.asked: list[int] = []
        if thresholds is None and policy.threshold is not None:
            thresholds = Thresholds.of(policy.threshold, policy.form)
        self.filter = MemorizationFilter(policy, schedule, self.unconditional, samples, 0, thresholds, **options)
        self.step = 0

    def unconditional(self, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        self.asked.append(len(t))
        return torch.zeros_like(x_t)

    def __call__(self, rows, magnitudes, t=None, captioned=None, counted=None, captions=None) -> list[float]:
        """One step; the weights."""
        n = len(rows)
        output = torch.zeros(n, 1, 2, 2)
        output[:, 0, 0, 0] = torch.tensor(magnitudes)
        t = torch.tensor(t if t is not None else [900] * n)
        captioned = torch.tensor(captioned if captioned is not None else [True] * n)
        counted = torch.tensor(counted if counted is not None else [True] * n)
        texts = captions or [""] * n
        kept, _ = self.filter.weigh(output, output, t, torch.tensor(rows), texts, captioned, counted, self.step)
        self.filter.absorb(self.filter.records().flatten(0, 1), self.step)
        self.step += 1
        return kept.tolist()


# ---------------------------------------------------------------------------------------------------- the verdict


def test_a_sample_at_or_above_its_threshold_weighs_nothing():
    eps_cond = torch.zeros(3, 1, 2, 2)
    eps_cond[:, 0, 0, 0] = torch.tensor([1.0, 2.0, 3.0])
    kept, magnitudes = filter_weights(eps_cond, torch.zeros_like(eps_cond), torch.tensor([2.0, 2.0, 4.0]))
    assert kept.tolist() == [1, 0, 1] and magnitudes.tolist() == [1, 2, 3]
    kept, magnitudes = filter_weights(eps_cond, torch.zeros_like(eps_cond), torch.tensor([1.0, 1.0, 1.5]), form="rms")
    assert kept.tolist() == [1, 0, 0] and magnitudes.tolist() == [0.5, 1, 1.5]


def test_samples_without_their_caption_are_not_judged_and_policies_choose_timesteps():
    t, captioned = [10, 600, 900], [True, True, False]
    assert judged_at(t, captioned, FilterConfig("every_step")) == [True, True, False]
    assert judged_at(t, captioned, FilterConfig("noisy_steps", min_timestep=500)) == [False, True, False]
    assert judged_at(t, captioned, FilterConfig("off")) == [False] * 3
    assert judged_at(t, captioned, FilterConfig("one_in_k", k=1)) == [True, True, False]
    assert judged_at(t, captioned, FilterConfig("noisy_one_in_k", k=1, min_timestep=500)) == [False, True, False]


def test_each_sample_has_its_turn_at_one_visit_in_k_and_a_batch_holds_about_as_many():
    rows = torch.arange(6000)
    turns = torch.stack([in_turn(rows, torch.full_like(rows, visit), 4, seed=3) for visit in range(8)])
    assert (turns[:4].sum(dim=0) == 1).all() and torch.equal(turns[:4], turns[4:])
    assert turns[0].float().mean() == pytest.approx(0.25, abs=0.03)
    neighbours = turns[0].view(-1, 100).float().mean(dim=1)  # rows that stand side by side differ, too
    assert neighbours.min() > 0.1 and neighbours.max() < 0.4
    assert not torch.equal(turns[0], in_turn(rows, torch.zeros_like(rows), 4, seed=4))


def test_the_unconditional_pass_runs_on_the_judged_samples_alone():
    judge = OneNumber(FilterConfig("noisy_steps", threshold=2.0, min_timestep=500, expires=0))
    captioned = [True, True, True, False]
    assert judge([0, 1, 2, 3], [1.0, 3.0, 3.0, 3.0], t=[900, 900, 100, 900], captioned=captioned) == [1, 0, 1, 1]
    assert judge.asked == [2]
    judge([0, 1], [3.0, 3.0], t=[100, 100])
    assert judge.asked == [2]
    spread = OneNumber(FilterConfig("noisy_steps", threshold=2.0, min_timestep=500), together=True)
    assert spread([0, 1], [3.0, 3.0], t=[100, 100]) == [1, 1] and spread.asked == [1]  # all processes take part
    assert spread.filter.table.totals()["judged"] == 0


def test_a_stored_verdict_holds_for_as_many_visits_and_not_without_the_caption():
    judge = OneNumber(FilterConfig("noisy_steps", threshold=2.0, min_timestep=500, expires=2))
    assert judge([0, 1], [3.0, 1.0]) == [0, 1]
    assert judge([0, 1], [3.0, 3.0], t=[100, 100]) == [0, 1]
    assert judge([0], [3.0], t=[100], captioned=[False]) == [1]  # a visit, too
    assert judge([0], [3.0], t=[100]) == [1]
    assert judge([0], [3.0]) == [0]
    assert judge([0], [1.0]) == [1]  # a new verdict takes the place of the old one
    assert judge([0], [3.0], t=[100]) == [1]
    rows = {row["key"]: row for row in written(judge)}
    assert (rows["0"]["seen"], rows["0"]["judged"], rows["0"]["reached"], rows["0"]["dropped"]) == (7, 3, 2, 3)


def test_samples_under_one_caption_are_judged_by_each_other_where_that_is_asked_for():
    how = FilterConfig("noisy_steps", threshold=2.0, min_timestep=500, expires=2, verdict_of="caption")
    judge = OneNumber(how)
    assert judge([0, 1], [3.0, 1.0], captions=["a", "b"]) == [0, 1]
    assert judge([2, 3], [1.0, 1.0], t=[100, 100], captions=["a", "b"]) == [0, 1]
    restored = OneNumber(how)
    restored.filter.load_state_dict(judge.filter.state_dict())
    for one in (judge, restored):
        assert one([4, 5, 6], [1.0] * 3, t=[100] * 3, captions=["a", "a", "a"]) == [0, 0, 0]  # known before the step
        assert one([4], [1.0], t=[100], captions=["a"]) == [1]


def test_visits_in_the_window_add_up_to_a_verdict_that_none_of_them_reaches():
    how = FilterConfig(
        "noisy_steps", verdict_of="caption", evidence="window", calibrate=Calibration(20, 0.95, window=1000)
    )
    reference = torch.arange(100) < 90
    judge = OneNumber(how, 100, reference=reference)
    rng, outcomes = np.random.default_rng(0), []
    for step in range(60):  # 15 visits a step of the unique samples, each met six times; one of caption "copy"
        rows = [*((step * 15 + np.arange(15)) % 90).tolist(), 90 + step % 10]
        captions = [*(str(row) for row in rows[:-1]), "copy"]
        kept = judge(rows, [*rng.uniform(1, 2, 15).tolist(), 1.8], captions=captions)  # their quantile 0.8
        outcomes.append(kept[-1])
    assert outcomes[0] == 1 and outcomes[-1] == 0
    assert judge.filter.thresholds[9] > 1.9
    totals = judge.filter.table.totals()
    assert totals["dropped"] - outcomes.count(0) < 0.12 * 40 * 15  # of the unique samples' visits after calibration


def test_nothing_is_judged_before_the_warm_up_ends_nor_in_bands_without_a_threshold():
    judge = OneNumber(FilterConfig("every_step", threshold=1.0, warmup_steps=1))
    assert judge([0], [3.0]) == [1] and judge([0], [3.0]) == [0]
    by_band = [None] * 5 + [1.0] * 4 + [4.0]
    judge = OneNumber(FilterConfig("every_step", threshold=by_band))
    assert judge([0, 1, 2], [3.0, 3.0, 3.0], t=[100, 500, 900]) == [1, 0, 1]
    assert judge.asked == [2]


def test_an_image_that_cannot_be_read_is_no_evidence():
    judge = OneNumber(FilterConfig("every_step", threshold=2.0))
    assert judge([0, 1], [3.0, 3.0], counted=[True, False]) == [0, 1]
    assert judge.filter.table.totals() == {"judged": 1, "dropped": 1, "samples_dropped_at_least_once": 1}


# ------------------------------------------------------------------------------------- too much, or nothing at all


def test_a_calibration_whose_length_is_left_to_the_run_gives_each_threshold_enough_magnitudes():
    plain, noisy = FilterConfig("every_step"), FilterConfig("noisy_one_in_k", k=4)
    for policy, captioned, share in ((plain, 1.0, 0.1), (plain, 7.2, 0.1), (noisy, 0.9, 0.1 / 4), (plain, 400.0, 0.1)):
        how = with_lengths(policy, captioned).calibrate
        assert captioned * share * how.steps >= 2 * ENOUGH and how.steps >= 50 and how.window == 2 * how.steps
    together = dataclasses.replace(noisy, calibrate=Calibration(per_band=False))
    assert with_lengths(together, 0.9).calibrate.steps == pytest.approx(40 / (0.9 * 0.2 / 4), abs=1)
    given = dataclasses.replace(plain, calibrate=Calibration(steps=7, window=0))
    assert with_lengths(given, 1.0) == given


def test_the_noisy_steps_are_those_that_a_fifth_of_the_visits_reach_unless_a_timestep_is_named():
    def found(schedule, **options) -> int | None:
        config = settings("", "", Path(), filter=FilterConfig(preset="recommended"), **options)
        return with_min_timestep(config.filter.settled(), timesteps_of(schedule, config)).min_timestep

    uniform, flat, shifted = (
        NoiseSchedule(DDPMScheduler()),
        FlowSchedule(FlowMatchEulerDiscreteScheduler(shift=1.0)),
        FlowSchedule(FlowMatchEulerDiscreteScheduler(shift=3.0)),
    )
    assert found(uniform) == 800 and found(uniform, timesteps=Timesteps(highest=500)) == 400
    # u with Φ(z) = 0.8, z = 0.8416: sigmoid(z), and s u / (1 + (s − 1) u) at shift s
    assert found(flat) == pytest.approx(699, abs=10) and found(shifted) == pytest.approx(874, abs=10)
    assert found(flat, flow=Flow(density="uniform")) == 800
    named = FilterConfig("noisy_steps", min_timestep=555)
    assert with_min_timestep(named, timesteps_of(flat, settings("", "", Path()))) == named


def test_a_filter_that_leaves_out_more_than_it_is_meant_to_says_so_at_once_and_once(capsys):
    def said(policy: FilterConfig, dropped: int) -> list[str]:
        judge, lines = OneNumber(policy, 1000), []
        for _ in range(40):
            judge(range(10), [3.0] * dropped + [1.0] * (10 - dropped))
            lines.append(capsys.readouterr().err)
        return lines

    fixed = FilterConfig("every_step", threshold=2.0, most_dropped=0.3)
    lines = said(fixed, dropped=7)
    assert "leaves out 70 % of the latest" in lines[1] + lines[2] and "leave filter.threshold out" in "".join(lines)
    assert sum(map(bool, lines)) == 1
    assert not any(said(fixed, dropped=3))
    assert not any(said(dataclasses.replace(fixed, most_dropped=0.8), dropped=7))


def test_what_was_said_of_the_share_is_not_said_again_after_a_stop(capsys):
    policy = FilterConfig("every_step", threshold=2.0)
    judge, again = OneNumber(policy), OneNumber(policy)
    judge([0, 1, 2, 3], [3.0] * 4)
    judge([0, 1, 2, 3], [3.0] * 4)
    assert "more than filter.most_dropped" in capsys.readouterr().err
    again.filter.load_state_dict(judge.filter.state_dict())
    again([0, 1, 2, 3], [3.0] * 4)
    assert not capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------- the record


def written(judge: OneNumber) -> list[dict]:
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "verdicts.parquet"
        judge.filter.table.write(path, [("s", str(row)) for row in range(len(judge.filter.table.seen))])
        return pq.read_table(path).to_pylist()


def test_verdict_table_counts_repeated_visits_by_band(tmp_path):
    table = VerdictTable(3)
    rows, bands = torch.tensor([1, 1, 2]), torch.tensor([0, 9, 9])
    reached = torch.tensor([False, True, False])
    table.record(rows, bands, torch.tensor([1.0, 3.0, NAN]), reached, torch.tensor([False, True, True]))
    table.write(tmp_path / "v.parquet", [("s", "a"), ("s", "b"), ("s", "c")])
    rows = pq.read_table(tmp_path / "v.parquet").to_pylist()
    assert [(row["key"], row["seen"], row["judged"], row["reached"], row["dropped"]) for row in rows] == [
        ("b", 2, 2, 1, 1),
        ("c", 1, 0, 0, 1),
    ]
    assert rows[0]["magnitude_by_band"] == [1.0] + [None] * 8 + [3.0]
    assert rows[0]["judged_by_band"] == [1] + [0] * 8 + [1]


def test_the_table_grows_with_the_samples_that_were_judged_and_comes_back_from_a_checkpoint(tmp_path):
    rng, table, judged = np.random.default_rng(0), VerdictTable(100_000), {}
    tables = [table]
    for step in range(100):
        rows = torch.from_numpy(rng.integers(0, 100_000, 64))
        m = torch.where(torch.from_numpy(rng.random(64)) < 0.5, 1.0, NAN)
        for row in rows[~m.isnan()].tolist():
            judged[row] = judged.get(row, 0) + 1
        no = torch.zeros(64, dtype=torch.bool)
        for one in tables:
            one.record(rows, torch.full((64,), 3), m, no, no)
        if step == 50:  # in the middle, with places to spare
            tables.append(VerdictTable(100_000))
            tables[1].load_state_dict(table.state_dict())
    assert table.used == len(judged) and len(table.reached) < 3 * len(judged)
    for number, one in enumerate(tables):
        one.write(tmp_path / f"{number}.parquet", [("s", str(row)) for row in range(100_000)])
    first, second = (pq.read_table(tmp_path / f"{number}.parquet").to_pylist() for number in range(2))
    assert first == second
    assert {int(row["key"]): row["judged"] for row in first if row["judged"]} == judged


def test_what_processes_saw_is_exchanged_in_the_order_of_positions():
    # Two processes, two micro-steps of one sample: the gather of a launcher, done by hand.
    of_rank = [torch.tensor([[[0]], [[2]]], dtype=torch.int32), torch.tensor([[[1]], [[3]]], dtype=torch.int32)]
    one, tallies, packed = torch.tensor([1.0]), [], []
    for rank, records in enumerate(of_rank):
        tally, kept = Tally(torch.device("cpu"), 1000), torch.tensor([float(rank)])
        tally.add(torch.tensor(0.5), one, torch.tensor([950]), one.bool(), kept, kept, torch.tensor([NAN]))
        tally.exchange(SimpleNamespace(gather=lambda mine: packed.append(mine) or mine), records, asked=rank == 1)
        tallies.append(tally)
    totals, records = tallies[0].exchange(SimpleNamespace(gather=lambda _: torch.cat(packed)), of_rank[0], asked=False)
    assert records.flatten().tolist() == [0, 1, 2, 3]
    assert (totals.loss, totals.kept, totals.dropped, totals.asked) == (1.0, 1, 1, 1)
    assert totals.band_counts == [0.0] * 9 + [2.0]


# ----------------------------------------------------------------------------------------------------- whole runs


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


def test_the_first_steps_calibrate_the_filter_the_same_in_every_run(model, shards, tmp_path):
    # 20 samples of a random model: the median of all bands, so that about half are left out afterwards.
    how = FilterConfig("every_step", calibrate=Calibration(steps=8, quantile=0.5, per_band=False, window=0))
    for name in ("one", "two"):
        run_finetune(settings(model, shards, tmp_path / name, steps=16, batch_size=8, learning_rate=1e-6, filter=how))
    lines = log_lines(tmp_path / "one")
    assert lines == log_lines(tmp_path / "two")
    assert not any(line["dropped"] for line in lines[:8])
    assert 16 < sum(line["dropped"] for line in lines[8:]) < 48
    found = json.loads((tmp_path / "one" / "filter.json").read_text())
    assert found["by_band"] == lines[-1]["thresholds"] == lines[8]["thresholds"]
    # A later run takes the thresholds over from the file.
    again = FilterConfig("every_step", threshold=str(tmp_path / "one" / "filter.json"))
    summary = run_finetune(settings(model, shards, tmp_path / "again", steps=2, filter=again))
    assert summary["thresholds"] == found["by_band"]
    with pytest.raises(UsageError, match="form l2, but filter.form is rms"):
        other = FilterConfig("every_step", threshold=str(tmp_path / "one" / "filter.json"), form="rms")
        run_finetune(settings(model, shards, tmp_path / "other", filter=other))


def test_a_filter_without_a_threshold_leaves_a_clean_set_in(model, shards, tmp_path, capsys):
    # 20 different samples and a model that never saw them; 2.0, the published scale, is below all of their magnitudes.
    changes = {"steps": 80, "batch_size": 8, "learning_rate": 1e-6, "log_every": 80}
    summary = run_finetune(settings(model, shards, tmp_path / "found", filter=FilterConfig("every_step"), **changes))
    assert 0 < summary["dropped"] < 0.2 * summary["judged"] and 0 < summary["dropped_share"] < 0.15
    assert "most_dropped" not in capsys.readouterr().err
    by_hand = FilterConfig("every_step", threshold=2.0)
    summary = run_finetune(settings(model, shards, tmp_path / "by_hand", filter=by_hand, **changes | {"steps": 6}))
    assert summary["dropped"] > 0.6 * summary["judged"]
    assert "leave filter.threshold out" in capsys.readouterr().err


def test_a_run_that_is_too_short_for_its_warm_ups_says_so(model, shards, tmp_path, capsys):
    late = FilterConfig("every_step", threshold=1e9, warmup_steps=2)
    run_finetune(settings(model, shards, tmp_path / "late", steps=2, warmup_steps=4, filter=late))
    said = capsys.readouterr().err
    assert "warmup_steps is 4, and the run has 2 steps" in said and "smaller filter.warmup_steps" in said
    run_finetune(settings(model, shards, tmp_path / "found", steps=2, filter=FilterConfig("every_step")))
    assert "starts after 112 steps" in capsys.readouterr().err
    run_finetune(settings(model, shards, tmp_path / "right", steps=2, warmup_steps=2))
    assert "warmup" not in capsys.readouterr().err


def test_a_calibration_that_saw_too_little_says_what_to_change(model, shards, tmp_path):
    how = FilterConfig("every_step", calibrate=Calibration(steps=2))
    with pytest.raises(UserError, match=r"raise filter\.calibrate\.steps"):
        run_finetune(settings(model, shards, tmp_path / "run", filter=how))


def test_auto_takes_the_thresholds_that_lie_with_the_model(model, shards, tmp_path):
    auto = FilterConfig("every_step", threshold="auto")
    with pytest.raises(UsageError, match="train detect --calibrate"):
        run_finetune(settings(model, shards, tmp_path / "run", filter=auto))
    import shutil

    calibrated = tmp_path / "model"
    shutil.copytree(model, calibrated)
    (calibrated / FILE).write_text(json.dumps({"form": "l2", "by_band": [None] * 9 + [1e-9]}))
    summary = run_finetune(settings(str(calibrated), shards, tmp_path / "run", filter=auto, steps=10))
    assert summary["thresholds"][:9] == [None] * 9
    assert 0 < summary["judged"] == sum(row["judged_by_band"][9] for row in verdicts(tmp_path / "run")) < 20


STORED = FilterConfig(
    "one_in_k", k=2, expires=3, calibrate=Calibration(steps=9, quantile=0.5, per_band=False, window=40)
)
"""Everything that a checkpoint must hold: verdicts, turns, magnitudes, thresholds that move."""
SLOWLY = {"steps": 18, "learning_rate": 1e-5, "caption_dropout": 0.2, "filter": STORED}


def verdicts(out) -> list[dict]:
    return pq.read_table(out / "verdicts.parquet").to_pylist()


@pytest.mark.timeout(300)
def test_a_killed_run_goes_on_with_its_verdicts_and_thresholds(model, shards, tmp_path):
    policy = dataclasses.replace(STORED, evidence="window")
    changes = SLOWLY | {"batch_size": 16, "checkpoint_every": 5, "filter": policy}
    run_finetune(settings(model, shards, tmp_path / "whole", **changes))
    lines = log_lines(tmp_path / "whole")
    assert all(0 < line["judged"] < 16 for line in lines)
    stored = [row for row in verdicts(tmp_path / "whole") if row["dropped"] > row["reached"]]
    assert stored  # some were left out by an earlier visit's verdict
    config = settings(model, shards, tmp_path / "cut", **changes)
    process = launch(config)
    wait_for_step(tmp_path / "cut", 12, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    run_finetune(config)
    assert log_lines(tmp_path / "cut") == lines
    assert verdicts(tmp_path / "cut") == verdicts(tmp_path / "whole")
    assert same(weights(tmp_path / "cut"), weights(tmp_path / "whole"))


@pytest.mark.timeout(300)
def test_two_processes_reach_the_verdicts_of_one(model, shards, tmp_path):
    # A verdict of one process decides at the other one's next visit: 20 samples, of which each is met by both.
    run_finetune(settings(model, shards, tmp_path / "one", batch_size=16, **SLOWLY))
    process = launch(settings(model, shards, tmp_path / "two", batch_size=8, **SLOWLY), processes=2)
    assert process.wait(timeout=240) == 0, process.communicate()[1]
    one, two = log_lines(tmp_path / "one"), log_lines(tmp_path / "two")
    for name in ("kept", "judged", "dropped"):
        assert [line[name] for line in one] == [line[name] for line in two]
    assert one[-1]["thresholds"] == pytest.approx(two[-1]["thresholds"], rel=1e-3)
    counts = ("key", "seen", "judged", "reached", "dropped")
    of_one, of_two = ([[row[name] for name in counts] for row in verdicts(tmp_path / name)] for name in ("one", "two"))
    assert of_one == of_two


@pytest.mark.parametrize(
    ("policy", "word"),
    [
        (FilterConfig("every_step", threshold=0.0), "threshold must be positive"),
        (FilterConfig("every_step", threshold=[1.0, None]), "one a timestep band"),
        (FilterConfig("one_in_k", k=0), "filter.k"),
        (FilterConfig("every_step", calibrate=Calibration(steps=5, quantile=1.0)), "quantile"),
        (FilterConfig("every_step", evidence="window", calibrate=Calibration(window=0)), "calibrate.window"),
        (FilterConfig("every_step", evidence="window", threshold=2.0), "no filter.threshold beside it"),
        (FilterConfig("every_step", threshold=2.0, calibrate=Calibration(steps=5)), "exclude each other"),
        (FilterConfig("every_step", most_dropped=0.0), "filter.most_dropped"),
    ],
)
def test_settings_of_the_filter_out_of_range_are_named(model, shards, tmp_path, policy, word):
    with pytest.raises(UsageError, match=word):
        run_finetune(settings(model, shards, tmp_path / "run", filter=policy))
