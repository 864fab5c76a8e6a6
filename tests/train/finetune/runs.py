"""Small runs for the tests beside this file: settings, launched processes, and what they leave."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from train.denoising.network import network_of
from train.denoising.opening.loading import load_pipeline
from train.finetune.config import Buckets, FilterConfig, FinetuneConfig
from train.finetune.loop import run_finetune
from train.finetune.state.log import MEASURED, RunLog

REPOSITORY = Path(__file__).parents[3]


def settings(model: str, shards: str, out: Path, **changes) -> FinetuneConfig:
    values = {
        "steps": 4,
        "batch_size": 4,
        "learning_rate": 1e-3,
        "workers": 0,
        "log_every": 1,
        "checkpoint_every": 0,
        "mixed_precision": "no",
        "crop": "none",
        "buckets": Buckets(step=0),
        "filter": FilterConfig("off"),
    }
    return FinetuneConfig(model=model, shards=[shards], out=str(out), **values | changes)


def log_lines(out: Path) -> list[dict]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in MEASURED} for line in lines]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return network_of(load_pipeline(str(out / "model"))).state_dict()


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Send this process a SIGTERM, once, when a run has logged a step: it stops after the next one."""
    add, sent = RunLog.add, []

    def add_and_stop(self: RunLog, line: dict) -> None:
        add(self, line)
        if line["step"] == step and not sent:
            sent.append(step)
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(RunLog, "add", add_and_stop)


def launch(config: FinetuneConfig, *, processes: int = 1, program: Path | None = None) -> subprocess.Popen:
    """The command as users start it, with one process or two; ``program`` is a script in the place of ``-m train``."""
    file = Path(config.out).with_suffix(".json")  # JSON is YAML
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(dataclasses.asdict(config)))
    arguments = [*([str(program)] if program else ["-m", "train"]), "finetune", f"--config={file}"]
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    env = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen(start + arguments, env=env, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def make_environment(folder: Path) -> None:
    """An environment in which ``launch.sh`` finds the interpreter of the tests, and this checkout installed."""
    modules = {"torchrun": "torch.distributed.run", "accelerate": "accelerate.commands.accelerate_cli"}
    programs = {"python": ""} | {name: f"-m {module}" for name, module in modules.items()}
    (folder / "bin").mkdir(parents=True)
    for name, words in programs.items():
        program = folder / "bin" / name
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" {words} "$@"\n')
        program.chmod(0o755)
    digest = hashlib.sha256(str(REPOSITORY).encode())
    for name in ("pyproject.toml", "constraints.txt"):
        digest.update((REPOSITORY / name).read_bytes())
    (folder / ".afresh-installed").write_text(f"{digest.hexdigest()}\nextra:\n")


def launch_sh(config: FinetuneConfig, *options: str) -> subprocess.Popen:
    """``./launch.sh CONFIG`` as users start it, in a process group of its own."""
    file = Path(config.out).with_suffix(".yaml")
    file.parent.mkdir(parents=True, exist_ok=True)
    keys = "".join(f"{key}: {json.dumps(value)}\n" for key, value in dataclasses.asdict(config).items())
    file.write_text("job: train finetune\n" + keys)
    folder = file.parent / "environment"
    if not folder.exists():
        make_environment(folder)
    env = os.environ | {"VIRTUAL_ENV": str(folder), "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = [str(REPOSITORY / "launch.sh"), str(file), *options]
    return subprocess.Popen(
        command, env=env, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )


def workers_of(launcher: int) -> list[int]:
    """Process ids of what a launcher has started, as the kernel lists them."""
    return [int(pid) for pid in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()]


def wait_for_torch(process: int) -> None:
    """Until a process loads torch: it has begun, and is far from its first step."""
    for _ in range(6000):
        if "libtorch" in Path(f"/proc/{process}/maps").read_text():
            return
        time.sleep(0.01)
    pytest.fail(f"process {process} does not load torch")


def wait_for_step(out: Path, step: int, process: subprocess.Popen) -> None:
    while process.poll() is None:
        path = out / "log.jsonl"
        if path.is_file() and path.read_text().count("\n") >= step:
            return
        time.sleep(0.02)
    pytest.fail(f"the run ended before step {step}: {process.communicate()[1]}")


def killed_run_ends_the_same(model: str, shards: str, folder: Path, **options) -> list[dict]:
    """A run, and one that is killed on its way and run again, end with the same weights and log to the bit; the log."""
    run_finetune(settings(model, shards, folder / "whole", **options))
    config = settings(model, shards, folder / "killed", **options)
    process = launch(config)
    wait_for_step(folder / "killed", 3, process)
    process.kill()
    process.communicate()
    assert not (folder / "killed" / "summary.json").exists()
    run_finetune(config)
    assert same(weights(folder / "killed"), weights(folder / "whole"))
    assert log_lines(folder / "killed") == log_lines(folder / "whole")
    return log_lines(folder / "whole")


def assert_ends_with(expected: dict[str, torch.Tensor], model: str, out: Path) -> None:
    """A run's network has the expected weights, which lie much farther from where it began than is allowed between."""
    before = network_of(load_pipeline(model)).state_dict()
    for name, value in weights(out).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5, msg=name)
    assert max(float((expected[name] - before[name]).abs().max()) for name in expected) > 1e-3


def assert_adapters_load(stock: Callable[[], Any], out: Path, **call: Any) -> None:
    """A run's adapters in the stock pipeline draw what its saved model draws, and not what the base draws."""

    def draw(pipe: Any) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return pipe("red apple", num_inference_steps=2, output_type="latent", generator=generator, **call).images

    base, adapted = stock(), stock()
    adapted.load_lora_weights(str(out / "lora"))
    torch.testing.assert_close(draw(load_pipeline(str(out / "model"))), draw(adapted), rtol=1e-3, atol=1e-3)
    assert (draw(base) - draw(adapted)).abs().max() > 1e-2
