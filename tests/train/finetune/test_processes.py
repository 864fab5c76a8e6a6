"""Several processes, started by launch.sh as users do: they train as one, end together, stop on a signal, go on."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from afresh.errors import UsageError
from tests.train.finetune.runs import (
    REPOSITORY,
    launch,
    launch_sh,
    log_lines,
    same,
    settings,
    wait_for_step,
    wait_for_torch,
    weights,
    workers_of,
)
from train.denoising.opening.adapters import WEIGHTS
from train.denoising.opening.config import LoRAConfig
from train.finetune.config import FilterConfig, ValidationConfig
from train.finetune.loop import run_finetune
from train.finetune.state.checkpoint import load_latest
from train.finetune.state.sharding import check_parallel

ACCELERATE = REPOSITORY / "configs" / "accelerate"
SGD = {"optimizer": "torch.optim.SGD", "optimizer_args": {"momentum": 0.9}, "learning_rate": 0.1}
"""Rounding stays rounding under it; Adam makes a step of full size of a gradient that is nothing but rounding."""


def finish(process: subprocess.Popen, code: int = 0) -> str:
    """What a process said on stderr, once it has ended as expected, without waiting for ever."""
    try:
        _, err = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert process.returncode == code, err
    return err


def verdicts(out: Path) -> list[dict]:
    return pq.read_table(out / "verdicts.parquet").to_pylist()


def median_magnitude(out: Path) -> float:
    found = sorted(m for row in verdicts(out) for m in row["magnitude_by_band"] if m is not None)
    return (found[len(found) // 2 - 1] + found[len(found) // 2]) / 2


def assert_alike(one: Path, two: Path) -> None:
    """Two runs saw and dropped the same and ended with the same weights, but for rounding."""
    for a, b in zip(log_lines(one), log_lines(two), strict=True):
        for name in ("step", "kept", "dropped", "skipped_steps"):
            assert a[name] == b[name]
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4, abs=1e-6)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3, abs=1e-6)
    for a, b in zip(verdicts(one), verdicts(two), strict=True):
        assert [a[name] for name in ("key", "seen", "dropped")] == [b[name] for name in ("key", "seen", "dropped")]
    mine, theirs = weights(one), weights(two)
    for name, weight in mine.items():
        torch.testing.assert_close(theirs[name], weight, rtol=1e-4, atol=1e-5)


@pytest.mark.timeout(900)
def test_two_processes_train_as_one_with_dropped_micro_batches_across_the_end_of_the_data(model, shards, tmp_path):
    # 20 samples in shards of 3, 12 and 5; a step takes 8, and the third begins in one epoch and ends in the next. With
    # one sample a micro-batch, every dropped one is a micro-batch without any weight, synchronized or not.
    changes = {"steps": 4, "caption_dropout": 0.0, "ema_decay": 0.9, **SGD}
    judge = FilterConfig("every_step", threshold=1e9)
    run_finetune(settings(model, shards, tmp_path / "judged", batch_size=8, filter=judge, **changes))
    changes["filter"] = FilterConfig("every_step", threshold=median_magnitude(tmp_path / "judged"))
    one = run_finetune(settings(model, shards, tmp_path / "one", batch_size=8, **changes))
    two = settings(model, shards, tmp_path / "two", batch_size=1, gradient_accumulation=4, **changes)
    finish(launch(two, processes=2))
    assert json.loads((tmp_path / "two" / "summary.json").read_text())["processes"] == 2
    assert 0 < one["dropped"] < 32 and one["samples_seen"] == 32
    assert_alike(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_processes_train_adapters_as_one(model, shards, tmp_path):
    changes = {"steps": 3, "caption_dropout": 0.0, "lora": LoRAConfig(rank=4, alpha=8), **SGD}
    changes |= {"filter": FilterConfig("every_step", threshold=1e9), "train_text_encoder": True}
    run_finetune(settings(model, shards, tmp_path / "one", batch_size=4, **changes))
    finish(launch(settings(model, shards, tmp_path / "two", batch_size=2, **changes), processes=2))
    assert json.loads((tmp_path / "two" / "summary.json").read_text())["processes"] == 2
    assert_alike(tmp_path / "one", tmp_path / "two")
    one, two = (load_file(tmp_path / name / "lora" / WEIGHTS) for name in ("one", "two"))
    assert one.keys() == two.keys() and {name.partition(".")[0] for name in one} == {"unet", "text_encoder"}
    # B starts at zero: what it is was learned
    assert all(one[name].any() for name in one if "lora_B" in name or "lora.up" in name)
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_steps_of_which_nothing_is_left_are_skipped_by_both_processes_and_counted(model, shards, tmp_path):
    # As everything is dropped after two steps, momentum and weight decay would still move the weights if one stepped.
    everything = FilterConfig("every_step", threshold=1e-9, warmup_steps=2)
    changes = {"steps": 5, "caption_dropout": 0.0, "filter": everything, **SGD}
    one = run_finetune(settings(model, shards, tmp_path / "one", batch_size=4, **changes))
    short = {**changes, "steps": 2}
    run_finetune(settings(model, shards, tmp_path / "short", batch_size=4, **short))
    two = settings(model, shards, tmp_path / "two", batch_size=1, gradient_accumulation=2, **changes)
    finish(launch(two, processes=2))
    assert one["skipped_steps"] == json.loads((tmp_path / "two" / "summary.json").read_text())["skipped_steps"] == 3
    assert_alike(tmp_path / "one", tmp_path / "two")
    assert same(weights(tmp_path / "one"), weights(tmp_path / "short"))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_when_one_of_two_processes_is_killed_the_other_ends_and_both_go_on_bit_for_bit(model, shards, tmp_path):
    changes = {"steps": 12, "batch_size": 2, "checkpoint_every": 2, "ema_decay": 0.9, "workers": 1}
    changes["filter"] = FilterConfig("every_step", threshold=2.6)
    finish(launch(settings(model, shards, tmp_path / "whole", **changes), processes=2))
    config = settings(model, shards, tmp_path / "cut", **changes)
    process = launch_sh(config, "--processes", "2")
    wait_for_step(tmp_path / "cut", random.randrange(3, 10), process)
    (launcher,) = workers_of(process.pid)
    os.kill(workers_of(launcher)[-1], signal.SIGKILL)
    finish(process, code=1)
    assert not (tmp_path / "cut" / "summary.json").exists()
    finish(launch(config, processes=2))
    assert log_lines(tmp_path / "cut") == log_lines(tmp_path / "whole")
    assert verdicts(tmp_path / "cut") == verdicts(tmp_path / "whole")
    assert same(weights(tmp_path / "cut"), weights(tmp_path / "whole"))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("options", "signals"),
    [
        (["--processes", "1"], [(os.kill, signal.SIGTERM), (os.kill, signal.SIGUSR1)]),
        (["--processes", "2"], [(os.kill, signal.SIGTERM), (os.kill, signal.SIGUSR1), (os.killpg, signal.SIGTERM)]),
        (["--accelerate", str(ACCELERATE / "one_gpu.yaml")], [(os.kill, signal.SIGTERM)]),
        (["--accelerate", str(ACCELERATE / "many_gpus.yaml"), "--processes", "2"], [(os.killpg, signal.SIGUSR1)]),
    ],
    ids=["one", "two", "one_gpu.yaml", "many_gpus.yaml"],
)
def test_a_signal_to_launch_sh_saves_after_the_step_and_ends_with_success(model, shards, tmp_path, options, signals):
    config = settings(model, shards, tmp_path / "run", steps=100_000, batch_size=1)
    done = 0
    for send, sent in signals:  # to launch.sh alone, or to its whole group as batch systems do
        process = launch_sh(config, *options)
        wait_for_step(tmp_path / "run", done + 3, process)
        send(process.pid, sent)
        assert "the same command goes on from there" in finish(process)
        before, (done, _) = done, load_latest(tmp_path / "run" / "checkpoints")
        assert done == len(log_lines(tmp_path / "run")) > before


def trainers_below(shell: int) -> list[int]:
    """The processes that a launcher below ``launch.sh`` has started to train."""
    found = []
    for launcher in workers_of(shell):
        try:
            if "torch.distributed.run" in Path(f"/proc/{launcher}/cmdline").read_text():
                found += workers_of(launcher)
        except OSError:  # gone
            continue
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGUSR1], ids=["SIGTERM", "SIGUSR1"])
def test_a_signal_to_launch_sh_while_two_processes_start_saves_after_the_first_step(model, shards, tmp_path, sent):
    config = settings(model, shards, tmp_path / "run", steps=100_000, batch_size=1)
    process = launch_sh(config, "--processes", "2")
    while len(workers := trainers_below(process.pid)) < 2:
        assert process.poll() is None
        time.sleep(0.02)
    for worker in workers:
        wait_for_torch(worker)
    process.send_signal(sent)
    assert "stopped after step 1 of" in finish(process)
    step, _ = load_latest(tmp_path / "run" / "checkpoints")
    assert step == len(log_lines(tmp_path / "run")) == 1


SPREAD = {"ema_decay": 0.9, "train_text_encoder": True, "filter": FilterConfig("every_step", threshold=2.6)}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["fsdp", "zero2"])
def test_spread_weights_train_as_whole_ones(model, shards, tmp_path, name):
    changes = {"steps": 4, "gradient_checkpointing": True, **SPREAD, **SGD}
    changes["validation"] = ValidationConfig(every=4, prompts=["a cat", "a dog"], steps=2)
    one = run_finetune(settings(model, shards, tmp_path / "one", **changes))
    assert 0 < one["dropped"] < 16
    two = settings(model, shards, tmp_path / "two", batch_size=1, gradient_accumulation=2, **changes)
    finish(launch_sh(two, "--accelerate", str(ACCELERATE / f"{name}.yaml"), "--processes", "2"))
    assert json.loads((tmp_path / "two" / "run.json").read_text())["fsdp"]
    assert_alike(tmp_path / "one", tmp_path / "two")
    for image in ("00000.png", "00001.png"):
        a, b = (pixels(tmp_path / out / "validation" / "step-000004" / image) for out in ("one", "two"))
        assert (a - b).abs().max() <= 1


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_with_spread_weights_goes_on_bit_for_bit(model, shards, tmp_path):
    changes = {"steps": 12, "batch_size": 1, **SPREAD}
    spread = ["--accelerate", str(ACCELERATE / "fsdp.yaml"), "--processes", "2"]
    finish(launch_sh(settings(model, shards, tmp_path / "whole", **changes), *spread))
    config = settings(model, shards, tmp_path / "cut", **changes)
    process = launch_sh(config, *spread)
    wait_for_step(tmp_path / "cut", 2, process)
    process.send_signal(signal.SIGUSR1)
    finish(process)
    assert 2 <= len(log_lines(tmp_path / "cut")) < 12
    finish(launch_sh(config, *spread))
    assert log_lines(tmp_path / "cut") == log_lines(tmp_path / "whole")
    assert same(weights(tmp_path / "cut"), weights(tmp_path / "whole"))


def pixels(path: Path) -> torch.Tensor:
    with Image.open(path) as image:
        return torch.tensor(list(image.convert("RGB").tobytes()))


@pytest.mark.parametrize(
    ("kind", "fsdp2", "changes", "needle"),
    [
        ("DEEPSPEED", False, {}, "distributed_type DEEPSPEED.*zero2.yaml"),
        ("FSDP", False, {}, "fsdp_version"),
        ("FSDP", True, {"mixed_precision": "fp16"}, "mixed_precision fp16"),
        ("FSDP", True, {"ema_decay": 0.9, "ema_device": "cpu"}, "ema_device"),
        ("FSDP", True, {"compile": True}, "compile"),
        ("FSDP", True, {"lora": LoRAConfig(rank=4)}, "lora.rank"),
        ("FSDP", True, {"optimizer": "accelerate.optimizer.AcceleratedOptimizer"}, "optimizer accelerate"),
    ],
)
def test_ways_of_sharing_the_work_that_would_train_wrongly_are_refused(kind, fsdp2, changes, needle):
    with pytest.raises(UsageError, match=needle):
        check_parallel(kind, fsdp2, settings("model", "shards", Path("run"), **changes))
    check_parallel("FSDP", True, settings("model", "shards", Path("run"), ema_device="cpu"))
