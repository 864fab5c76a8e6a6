"""Runs that are killed or stopped and go on, and checkpoints that are not whole."""

from __future__ import annotations

import signal

import pytest
import torch

from tests.train.finetune.runs import launch, log_lines, same, settings, wait_for_step, weights
from train.finetune.checkpoint import load_latest, save_checkpoint
from train.finetune.loop import run_finetune


@pytest.mark.timeout(300)
def test_a_killed_run_goes_on_bit_for_bit(model, shards, tmp_path):
    changes = {"steps": 8, "ema_decay": 0.9, "checkpoint_every": 2, "workers": 1}
    run_finetune(settings(model, shards, tmp_path / "whole", **changes))
    config = settings(model, shards, tmp_path / "cut", **changes)
    process = launch(config)
    wait_for_step(tmp_path / "cut", 5, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    run_finetune(config)
    assert log_lines(tmp_path / "cut") == log_lines(tmp_path / "whole")
    assert same(weights(tmp_path / "cut"), weights(tmp_path / "whole"))


@pytest.mark.timeout(300)
def test_sigterm_saves_and_exits_cleanly_and_the_run_goes_on(model, shards, tmp_path):
    run_finetune(settings(model, shards, tmp_path / "whole", steps=60, batch_size=1))
    config = settings(model, shards, tmp_path / "cut", steps=60, batch_size=1)
    process = launch(config)
    wait_for_step(tmp_path / "cut", 3, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0
    assert "the same command goes on" in process.communicate()[1]
    assert not (tmp_path / "cut" / "summary.json").exists()
    run_finetune(config)
    assert same(weights(tmp_path / "cut"), weights(tmp_path / "whole"))


def test_a_checkpoint_cut_short_is_never_picked_up(tmp_path):
    save_checkpoint(tmp_path, 2, {"x": torch.ones(3)}, keep=2)
    save_checkpoint(tmp_path, 4, {"x": torch.zeros(3)}, keep=2)
    path = tmp_path / "step-000004.pt"
    path.write_bytes(path.read_bytes()[:200])
    (tmp_path / ".tmp-1-step-000006.pt").write_bytes(b"half")
    step, state = load_latest(tmp_path)
    assert step == 2 and state["x"].tolist() == [1, 1, 1]
    save_checkpoint(tmp_path, 6, {"x": torch.ones(1)}, keep=1)
    assert [p.name for p in sorted(tmp_path.glob("step-*"))] == ["step-000006.pt"]
