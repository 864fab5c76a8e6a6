"""Running out of memory: the message, and the same step in smaller passes."""

from __future__ import annotations

import json
import weakref

import pytest
import torch

from afresh.errors import UserError
from tests.train.finetune.runs import launch, log_lines, same, settings, stop_after, weights
from train.denoising.families.stable_diffusion import StableDiffusionDenoiser
from train.denoising.opening.config import LoRAConfig
from train.finetune.config import FilterConfig, FinetuneConfig
from train.finetune.loop import run_finetune
from train.finetune.state.memory import is_out_of_memory, memory_advice, smaller_batch


def config(**changes) -> FinetuneConfig:
    return FinetuneConfig(model="", out="", shards=[], **changes)


@pytest.fixture
def full_above(monkeypatch):
    """Call with a number of samples: a forward pass of more runs out of memory, from then on."""
    forward = StableDiffusionDenoiser.forward

    def limit(most: int) -> None:
        def limited(self, x_t, *arguments):
            if len(x_t) > most:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return forward(self, x_t, *arguments)

        monkeypatch.setattr(StableDiffusionDenoiser, "forward", limited)

    return limit


def test_what_torch_says_of_full_memory_is_told_from_other_failures():
    with pytest.raises(RuntimeError) as failure:
        torch.empty(1 << 60)
    assert is_out_of_memory(failure.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert not is_out_of_memory(RuntimeError("shapes differ"))
    assert not is_out_of_memory(ValueError(" out of memory."))


@pytest.mark.parametrize(("batch", "smaller"), [((8, 1), (4, 2)), ((6, 2), (3, 4)), ((3, 4), (1, 12))])
def test_a_smaller_batch_leaves_the_step_the_same_samples(batch, smaller):
    before = config(batch_size=batch[0], gradient_accumulation=batch[1])
    after = smaller_batch(before)
    assert (after.batch_size, after.gradient_accumulation) == smaller
    assert after.batch_size * after.gradient_accumulation == batch[0] * batch[1]


def test_the_advice_names_what_is_not_in_use_yet():
    advice = memory_advice(config(batch_size=8, ema_decay=0.9, mixed_precision="no"))
    for setting in ("gradient_checkpointing", "mixed_precision", "batch_size: 4", "auto_batch_size", "ema_device: cpu"):
        assert setting in advice
    spare = config(
        batch_size=1, gradient_checkpointing=True, mixed_precision="bf16", ema_decay=0.9, ema_device="cpu",
        optimizer="adamw8bit", lora=LoRAConfig(rank=4),
    )  # fmt: skip
    for setting in ("gradient_checkpointing", "mixed_precision", "batch_size", "ema_device", "adamw8bit", "lora"):
        assert setting not in memory_advice(spare)


def test_out_of_memory_is_one_line_with_advice_and_other_settings_may_begin_in_the_folder(
    model, shards, tmp_path, full_above
):
    full_above(2)
    with pytest.raises(UserError, match="out of memory.*gradient_checkpointing: true.*batch_size: 2"):
        run_finetune(settings(model, shards, tmp_path / "run"))
    assert run_finetune(settings(model, shards, tmp_path / "run", batch_size=2))["steps"] == 4


def test_out_of_memory_in_mid_run_a_run_goes_on_from_its_checkpoint_with_the_batch_that_fits(
    model, shards, tmp_path, full_above, monkeypatch
):
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        run_finetune(settings(model, shards, tmp_path / "run"))
    full_above(2)
    with pytest.raises(UserError, match="only auto_batch_size may change"):
        run_finetune(settings(model, shards, tmp_path / "run"))
    assert run_finetune(settings(model, shards, tmp_path / "run", auto_batch_size=True))["samples_seen"] == 16
    assert [line["step"] for line in log_lines(tmp_path / "run")] == [1, 2, 3, 4]


def test_the_batch_that_fits_is_found_kept_and_trains_as_if_it_had_been_asked_for(
    model, shards, tmp_path, full_above, monkeypatch
):
    changes = {"filter": FilterConfig("every_step", threshold=1.9), "steps": 3, "ema_decay": 0.9}
    asked = {"batch_size": 2, "gradient_accumulation": 4}
    run_finetune(settings(model, shards, tmp_path / "asked", **asked, **changes))
    full_above(3)
    found = settings(model, shards, tmp_path / "found", batch_size=8, auto_batch_size=True, **changes)
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        assert run_finetune(found)["stopped"]
    assert json.loads((tmp_path / "found" / "batch.json").read_text()) == asked
    full_above(100)  # it stays with what it found
    run_finetune(found)
    assert log_lines(tmp_path / "found") == log_lines(tmp_path / "asked")
    assert same(weights(tmp_path / "found"), weights(tmp_path / "asked"))


def test_a_failed_attempt_is_gone_before_the_next_one_begins(model, shards, tmp_path, monkeypatch):
    forward, attempts, alive = StableDiffusionDenoiser.forward, [], []

    def watched(self, x_t, *arguments):
        if len(x_t) > 2:
            attempts.append(weakref.ref(self))
            raise torch.OutOfMemoryError("CUDA out of memory.")
        alive.append(attempts[0]() is not None)
        return forward(self, x_t, *arguments)

    monkeypatch.setattr(StableDiffusionDenoiser, "forward", watched)
    run_finetune(settings(model, shards, tmp_path / "run", steps=1, auto_batch_size=True, ema_decay=0.9))
    assert attempts and not any(alive)


def test_when_not_even_one_sample_fits_the_run_says_so(model, shards, tmp_path, full_above):
    full_above(0)
    with pytest.raises(UserError, match="out of memory.*gradient_checkpointing"):
        run_finetune(settings(model, shards, tmp_path / "run", batch_size=2, auto_batch_size=True))


FULL_ON_ONE = """
import os, sys
import torch
from train.cli import main
from train.denoising.families.stable_diffusion import StableDiffusionDenoiser

forward = StableDiffusionDenoiser.forward

def limited(self, x_t, *arguments):
    if os.environ["RANK"] == "1" and len(x_t) > 1:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    return forward(self, x_t, *arguments)

StableDiffusionDenoiser.forward = limited
sys.exit(main())
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_one_of_two_processes_without_memory_stops_both_and_the_next_start_takes_the_smaller_batch(
    model, shards, tmp_path
):
    program = tmp_path / "full_on_one.py"
    program.write_text(FULL_ON_ONE)
    config = settings(model, shards, tmp_path / "run", steps=2, batch_size=2, auto_batch_size=True)
    process = launch(config, processes=2, program=program)
    assert process.wait(timeout=120) == 1
    assert "started again, the run takes batch_size 1 and gradient_accumulation 2" in process.communicate()[1]
    process = launch(config, processes=2, program=program)
    assert process.wait(timeout=120) == 0, process.communicate()[1]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["samples_seen"] == 8
