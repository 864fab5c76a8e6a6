"""Thresholds of the magnitude: at a false-positive rate, by band, in a file, and from the command line."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from afresh.errors import UsageError, UserError
from train.memorization.config import DetectConfig
from train.memorization.detection.job import run_detect
from train.memorization.thresholds import (
    BANDS,
    FILE,
    Thresholds,
    calibrate,
    read_thresholds,
    threshold_at_fpr,
    timestep_band,
)


def test_a_threshold_lets_as_many_false_positives_pass_as_wanted_and_no_more():
    rng = np.random.default_rng(0)
    for n in (1, 50, 99, 100, 101, 1000):
        scores = rng.random(n).astype(np.float32)
        for fpr in (0.0, 0.01, 0.1):
            threshold = threshold_at_fpr(scores, fpr)
            passed = (scores >= threshold).mean()
            assert passed <= fpr and (passed + 1 / n > fpr or passed == 1)
    assert (np.ones(9) >= threshold_at_fpr(np.ones(9), 0.5)).sum() == 0  # ties fall together
    with pytest.raises(ValueError):
        threshold_at_fpr([])


def test_timesteps_fall_into_ten_bands_whatever_their_number():
    assert timestep_band(torch.tensor([0, 99, 100, 999])).tolist() == [0, 0, 1, 9]
    assert timestep_band(torch.tensor([0, 3, 7]), timesteps=8).tolist() == [0, 3, 8]


def test_thresholds_come_back_from_their_file(tmp_path):
    path = tmp_path / FILE
    thresholds = Thresholds.of([None, 2.5, *[3.0] * 8], "rms")
    path.write_text(json.dumps({"form": "rms", "by_band": list(thresholds.by_band)}))
    assert read_thresholds(path) == thresholds
    assert thresholds.tensor().tolist()[:2] == [float("inf"), 2.5]
    assert Thresholds.of(2, "l2").by_band == (2.0,) * BANDS
    for content in ("{", "[]", '{"form": "l2"}', '{"form": "l1", "by_band": []}', '{"form": "l2", "by_band": [1]}'):
        path.write_text(content)
        with pytest.raises(UsageError, match=FILE):
            read_thresholds(path)
    with pytest.raises(UsageError, match="there are no thresholds"):
        read_thresholds(tmp_path / "nowhere.json")
    for value in (0.0, [None] * BANDS, [1.0], [float("nan")] * BANDS):
        with pytest.raises(UsageError):
            Thresholds.of(value, "l2")


def test_trajectories_give_a_threshold_of_their_mean_and_one_for_each_band_they_cross():
    magnitudes = np.arange(24, dtype=np.float32).reshape(4, 2, 3)  # prompts, seeds, steps
    found = calibrate(magnitudes, np.array([950, 920, 410]), fpr=0.25)
    of_prompts = magnitudes.mean(axis=(1, 2))
    assert (of_prompts >= found["threshold"]).sum() == 1
    assert (magnitudes[:, :, :2] >= found["by_band"][9]).sum() == 4  # a quarter of 16
    assert (magnitudes[:, :, 2] >= found["by_band"][4]).sum() == 2
    assert [band for band, one in enumerate(found["by_band"]) if one is not None] == [4, 9]


def test_detect_leaves_the_threshold_with_the_model(tiny_pipe, tmp_path):
    tiny_pipe.save_pretrained(tmp_path / "model")
    prompts = [{"caption": f"thing {n}", "label": int(n < 2)} for n in range(8)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    config = DetectConfig(
        model=str(tmp_path / "model"), prompts=str(tmp_path / "p.jsonl"), out=str(tmp_path / "s.parquet"),
        seeds=2, steps=3, num_inference_steps=10, calibrate=0.2, bootstrap=0,
    )  # fmt: skip
    summary = run_detect(config)
    found = json.loads((tmp_path / "model" / FILE).read_text())
    assert summary["calibrated"] == {"threshold": found["threshold"], "file": str(tmp_path / "model" / FILE)}
    assert (found["prompts"], found["false_positive_rate"], found["steps"]) == (6, 0.2, 3)
    assert [band for band, one in enumerate(read_thresholds(tmp_path / "model" / FILE).by_band) if one] == [7, 8, 9]
    (tmp_path / "p.jsonl").write_text(json.dumps({"caption": "a", "label": 1}) + "\n")
    with pytest.raises(UserError, match="none has label 0"):
        run_detect(config)
