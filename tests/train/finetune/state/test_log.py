"""The sums of a step, the log's lines, and the trackers that get them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from afresh.errors import UsageError
from tests.train.finetune.runs import log_lines, settings, stop_after
from train.finetune.config import ValidationConfig
from train.finetune.loop import run_finetune
from train.finetune.state.log import LossBands, Meter, RunLog, Tally, check_trackers, flat_numbers
from train.finetune.validation import send_images

NAN = float("nan")


def test_a_step_is_summed_by_sample_and_by_timestep_band():
    tally = Tally(torch.device("cpu"), timesteps=1000)
    tally.add(
        loss=torch.tensor(0.5, requires_grad=True),
        losses=torch.tensor([1.0, 2.0, 4.0, 8.0, NAN]),
        t=torch.tensor([0, 99, 100, 999, 500]),
        readable=torch.tensor([True, True, True, False, True]),
        weights=torch.tensor([1.0, 0.0, 3.0, 0.0, 1.0]),
        kept=torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0]),
        magnitudes=torch.tensor([0.1, 5.0, NAN, NAN, NAN]),
    )
    everything = torch.ones(1)
    tally.add(
        torch.tensor(NAN), everything, torch.tensor([150]), everything > 0, everything, everything, everything * NAN
    )
    records = torch.arange(4, dtype=torch.int32).view(1, 2, 2)
    totals, seen = tally.exchange(Accelerator(cpu=True), records, asked=True)
    assert seen.tolist() == [[0, 1], [2, 3]]
    assert (totals.kept, totals.judged, totals.dropped) == (4, 2, 1)
    assert (totals.loss, totals.not_finite, totals.asked) == (0.5, 1, 1)
    assert totals.magnitude == pytest.approx(5.1)  # of what was judged
    assert totals.band_losses == [3.0, 5.0] + [0.0] * 8  # neither the unreadable sample nor the NaN
    assert totals.band_counts == [2.0, 2.0] + [0.0] * 8
    bands = LossBands()
    bands.add(totals)
    bands.add(totals)
    assert bands.take() == [1.5, 2.5] + [None] * 8
    assert bands.take() == [None] * 10


def test_the_share_of_waiting_is_that_of_the_time_since_the_last_reading(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("train.finetune.state.log.time.monotonic", lambda: now[0])
    meter = Meter()
    with meter.waiting():
        now[0] += 3.0
    now[0] += 1.0
    meter.add(8)
    numbers = meter.read()
    assert (numbers["samples_per_second"], numbers["data_wait"]) == (2.0, 0.75)
    assert numbers["peak_memory_gib"] > 0.05  # torch alone takes more
    now[0] += 2.0
    assert meter.read()["data_wait"] == 0.0


def test_lines_that_a_resumed_run_repeats_are_cut_off_with_the_one_that_was_cut_short(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    RunLog(path, 2).add({"step": 3, "grad_norm": float("inf")})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1}, {"step": 2}, {"step": 3, "grad_norm": None},
    ]  # fmt: skip


def test_trackers_get_numbers_under_flat_names():
    line = {"step": 3, "loss": 1.0, "loss_by_band": [None, 2.0], "not_finite": ["a/b"], "filter": {"policy": "off"}}
    assert flat_numbers(line) == {"loss": 1.0, "loss_by_band/1": 2.0}


def test_a_run_logs_losses_by_band_and_its_speed_the_same_after_a_resumption(model, shards, tmp_path, monkeypatch):
    changes = {"log_every": 3, "steps": 6, "checkpoint_every": 1}
    run_finetune(settings(model, shards, tmp_path / "whole", **changes))
    line = json.loads((tmp_path / "whole" / "log.jsonl").read_text().splitlines()[0])
    assert line["samples_per_second"] > 0 and 0 < line["data_wait"] < 1 and line["peak_memory_gib"] > 0
    assert sum(loss is not None for loss in line["loss_by_band"]) >= 4  # of 12 samples
    stop_after(monkeypatch, 3)  # and so between two lines of the log
    assert run_finetune(settings(model, shards, tmp_path / "cut", **changes))["steps"] == 4
    run_finetune(settings(model, shards, tmp_path / "cut", **changes))
    assert log_lines(tmp_path / "cut") == log_lines(tmp_path / "whole")


def test_tensorboard_gets_every_line_and_the_validation_images(model, shards, tmp_path):
    run_finetune(
        settings(
            model, shards, tmp_path / "run", steps=2, trackers=["tensorboard"],
            validation=ValidationConfig(every=2, prompts=["a", "b"], steps=1),
        )
    )  # fmt: skip
    events = EventAccumulator(str(tmp_path / "run" / "afresh")).Reload()
    lines = log_lines(tmp_path / "run")
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [
        (line["step"], pytest.approx(line["loss"])) for line in lines
    ]
    assert {"grad_norm", "samples_per_second", "dropped"} <= set(events.Tags()["scalars"])
    assert any(tag.startswith("loss_by_band/") for tag in events.Tags()["scalars"])
    images = [event for tag in events.Tags()["images"] for event in events.Images(tag)]
    assert [(image.step, image.width, image.height) for image in images] == [(2, 128, 64)]  # side by side


def test_other_trackers_get_images_as_they_are_and_those_that_take_none_are_passed_over():
    class Tracker:
        name = "wandb"

        def log_images(self, values, step):
            self.got = values, step

    class Plain:
        name = "mlflow"

    image = Image.fromarray(np.zeros((4, 4, 3), np.uint8))
    tracker = Tracker()
    send_images([Plain(), tracker], [image], 7)
    assert tracker.got == ({"validation": [image]}, 7)


def test_a_tracker_that_cannot_be_had_is_named(monkeypatch):
    with pytest.raises(UsageError, match="unknown 'tensorbored'"):
        check_trackers(["tensorboard", "tensorbored"])
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", list)
    with pytest.raises(UsageError, match="tensorboard is not installed"):
        check_trackers(["tensorboard"])
