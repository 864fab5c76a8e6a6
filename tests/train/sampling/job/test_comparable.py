"""A magnitude is compared with thresholds that were found against the same prompt, on latents of the same size."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as parquet
import pytest

from afresh.errors import UsageError
from afresh.files import write_json
from train.memorization.config import DetectConfig
from train.memorization.detection.job import run_detect
from train.memorization.thresholds import FILE, read_thresholds
from train.sampling.config import BasinConfig, SampleConfig
from train.sampling.job.job import run_sample


@pytest.fixture
def job(tiny_pipe, tmp_path) -> SampleConfig:
    tiny_pipe.save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("red apple\n")
    model, prompts, out = (str(tmp_path / name) for name in ("model", "prompts.txt", "out"))
    return SampleConfig(model, prompts, out, seeds=1, steps=2, device="cpu")


def calibrated(config: SampleConfig, **found: object) -> None:
    """A threshold that every magnitude of the first step reaches."""
    bands = {"form": "l2", "by_band": [None] * 5 + [1e-6] + [None] * 4}
    write_json(Path(config.model) / FILE, bands | found)


def memorized(config: SampleConfig) -> list[bool | None]:
    run_sample(config)
    return parquet.read_table(Path(config.out) / "samples.parquet")["memorized"].to_pylist()


@pytest.mark.parametrize(
    ("found", "negative_prompt", "expected"),
    [
        ({}, "", True),  # a file from before this was written down: against the empty prompt
        ({"against": "", "elements": 1024}, "", True),
        ({"against": ""}, "blurry", None),
        ({"against": "blurry"}, "blurry", True),
        ({"against": "blurry"}, "", None),
        ({"elements": 256}, "", None),
        ({"elements": 256, "form": "rms"}, "", True),
    ],
)
def test_an_image_is_called_memorized_by_a_threshold_of_its_own_kind(job, capsys, found, negative_prompt, expected):
    calibrated(job, **found)
    assert memorized(replace(job, negative_prompt=negative_prompt)) == [expected]
    said = capsys.readouterr().err
    assert ("no image is called memorized" in said) == (expected is None)


def test_auto_is_refused_at_once_where_the_thresholds_are_of_another_prompt(job):
    calibrated(job, against="")
    config = replace(job, guidance="basin", basin=BasinConfig(least="auto"), negative_prompt="blurry")
    with pytest.raises(UsageError, match="found against the empty prompt, and magnitudes here are against .*'blurry'"):
        run_sample(replace(config, model=job.model))
    calibrated(job, elements=256)
    with pytest.raises(UsageError, match=r"--basin.least auto: .* do not hold here"):
        run_sample(replace(config, negative_prompt=""))


def test_the_filter_takes_no_thresholds_that_were_found_against_a_negative_prompt(job):
    calibrated(job, against="blurry")
    with pytest.raises(UsageError, match="against the negative prompt 'blurry', and magnitudes here .* empty prompt"):
        read_thresholds(Path(job.model) / FILE)


def test_detection_against_a_negative_prompt_writes_it_down_and_has_the_samplers_magnitudes(job, tmp_path):
    config = DetectConfig(
        job.model, job.prompts, str(tmp_path / "scores.parquet"), negative_prompt="blurry", num_inference_steps=2,
        seeds=1, calibrate=0.5, bootstrap=0, device="cpu",
    )  # fmt: skip
    run_detect(config)
    thresholds = read_thresholds(Path(job.model) / FILE, against="blurry")
    assert (thresholds.against, thresholds.elements) == ("blurry", 4 * 16 * 16)
    run_sample(replace(job, negative_prompt="blurry"))
    drawn = parquet.read_table(Path(job.out) / "samples.parquet")["magnitude"].to_pylist()
    scored = parquet.read_table(tmp_path / "scores.parquet")["magnitude"].to_pylist()
    assert scored == pytest.approx(drawn, rel=1e-4)
