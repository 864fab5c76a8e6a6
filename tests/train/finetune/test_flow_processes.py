"""A flow-matching transformer on several processes: they train as one, go on bit for bit, and spread its weights."""

from __future__ import annotations

import json
import os
import signal

import pytest
import torch

from tests.train.families import tiny_flux, tiny_sd3, tiny_xl, tiny_z_image
from tests.train.finetune.runs import launch, launch_sh, log_lines, same, settings, wait_for_step, weights, workers_of
from tests.train.finetune.test_processes import ACCELERATE, SGD, finish
from tests.train.finetune.test_stable_diffusion_3 import shards
from train.denoising.network import network_of
from train.finetune.config import FilterConfig
from train.finetune.loop import run_finetune
from train.finetune.state.sharding import layers_to_gather

__all__ = ["shards"]
JUDGED = {"filter": FilterConfig("every_step", threshold=1.0), "caption_dropout": 0.0, "resolution": 64}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("sd3")
    tiny_sd3().save_pretrained(folder)
    return str(folder)


def assert_alike(one, two) -> None:
    """Two runs saw and dropped the same and ended with the same weights, but for rounding."""
    for a, b in zip(log_lines(one), log_lines(two), strict=True):
        assert [a[name] for name in ("step", "kept", "dropped")] == [b[name] for name in ("step", "kept", "dropped")]
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4, abs=1e-6)
    mine, theirs = weights(one), weights(two)
    for name, weight in mine.items():
        torch.testing.assert_close(theirs[name], weight, rtol=1e-4, atol=1e-5)


@pytest.mark.timeout(600)
def test_two_processes_train_a_transformer_as_one(model, shards, tmp_path):
    changes = {"steps": 3, **JUDGED, **SGD}
    run_finetune(settings(model, shards, tmp_path / "one", batch_size=4, **changes))
    finish(launch(settings(model, shards, tmp_path / "two", batch_size=2, **changes), processes=2))
    assert json.loads((tmp_path / "two" / "summary.json").read_text())["processes"] == 2
    assert_alike(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_when_one_of_two_processes_is_killed_both_go_on_bit_for_bit(model, shards, tmp_path):
    changes = {"steps": 10, "batch_size": 2, "checkpoint_every": 2, "ema_decay": 0.9, "cache_text": "memory", **JUDGED}
    finish(launch(settings(model, shards, tmp_path / "whole", **changes), processes=2))
    config = settings(model, shards, tmp_path / "cut", **changes)
    process = launch(config, processes=2)
    wait_for_step(tmp_path / "cut", 4, process)
    os.kill(workers_of(process.pid)[-1], signal.SIGKILL)
    finish(process, code=1)
    assert not (tmp_path / "cut" / "summary.json").exists()
    finish(launch(config, processes=2))
    assert log_lines(tmp_path / "cut") == log_lines(tmp_path / "whole")
    assert same(weights(tmp_path / "cut"), weights(tmp_path / "whole"))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_spread_weights_of_a_transformer_train_as_whole_ones(model, shards, tmp_path):
    changes = {"steps": 3, "gradient_checkpointing": True, "ema_decay": 0.9, **JUDGED, **SGD}
    run_finetune(settings(model, shards, tmp_path / "one", batch_size=4, **changes))
    two = settings(model, shards, tmp_path / "two", batch_size=2, **changes)
    finish(launch_sh(two, "--accelerate", str(ACCELERATE / "fsdp.yaml"), "--processes", "2"))
    assert json.loads((tmp_path / "two" / "run.json").read_text())["fsdp"]
    assert_alike(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (tiny_xl, ["BasicTransformerBlock", "ResnetBlock2D"]),
        (tiny_sd3, ["JointTransformerBlock"]),
        (tiny_flux, ["FluxTransformerBlock", "FluxSingleTransformerBlock"]),
        (tiny_z_image, ["ZImageTransformerBlock"]),
    ],
)
def test_a_transformers_own_layers_come_together_where_the_settings_name_a_unets(kind, names):
    asked = ["BasicTransformerBlock", "ResnetBlock2D"]
    assert layers_to_gather(network_of(kind()), asked) == names
