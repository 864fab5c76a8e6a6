"""What is high: the summary says it of every signal, by labels or by the model's calibrated threshold."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from afresh.files import write_json
from afresh.summaries import format_summary
from train.memorization.config import DetectConfig
from train.memorization.detection.job import run_detect
from train.memorization.detection.separation import high_of
from train.memorization.thresholds import FILE


@pytest.fixture
def config(tiny_pipe, tmp_path) -> DetectConfig:
    tiny_pipe.save_pretrained(tmp_path / "model")
    (tmp_path / "p.txt").write_text("".join(f"thing {n}\n" for n in range(8)))
    model, prompts, out = (str(tmp_path / name) for name in ("model", "p.txt", "s.parquet"))
    return DetectConfig(model, prompts, out, seeds=2, signals=["magnitude", "anisotropy"], bootstrap=0, device="cpu")


def test_every_signal_stands_in_the_list_with_the_prompts_that_are_high_by_it(config):
    summary = run_detect(config)
    rows = summary["highest"]
    for name in config.signals:
        values = sorted((row[name] for row in rows), reverse=True)
        assert len(values) >= 5 and all({"magnitude", "anisotropy", "caption"} <= row.keys() for row in rows)
    assert all("not known" in summary["high"][name] for name in config.signals)
    assert "anisotropy" in format_summary(summary).splitlines()[0]  # a column of the table


def test_labels_say_what_is_high():
    labels = np.array([0] * 200 + [1] * 4)
    values = np.concatenate([np.arange(200.0), [150.0, 198.5, 250.0, 300.0]]).astype(np.float32)
    high = high_of(values, labels)
    assert 197 < high["threshold"] < 198  # two of the 200 reach it, 1 %, and three of the others
    assert high["prompts"] == 2 + 3
    assert high_of(values, labels, known=299.0)["prompts"] == 1


def test_the_models_threshold_says_it_where_it_was_found_in_the_same_way(config):
    run_detect(replace(config, calibrate=0.25))
    summary = run_detect(config)
    high = summary["high"]["magnitude"]
    assert (high["found"], high["prompts"]) == ("the model's calibrated threshold", 2)
    path = Path(config.model) / FILE
    found = json.loads(path.read_text())
    assert high["threshold"] == found["threshold"]
    write_json(path, found | {"steps": 5})
    assert "not known" in run_detect(config)["high"]["magnitude"]
