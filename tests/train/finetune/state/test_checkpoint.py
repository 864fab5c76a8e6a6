"""Runs that are killed or stopped and go on, and checkpoints that are not whole."""

from __future__ import annotations

import os
import resource
import signal

import pytest
import torch

from afresh.errors import UsageError, UserError
from tests.train.finetune.runs import (
    launch,
    log_lines,
    same,
    settings,
    stop_after,
    wait_for_step,
    wait_for_torch,
    weights,
    workers_of,
)
from train.finetune.config import Calibration, FilterConfig
from train.finetune.loop import run_finetune
from train.finetune.state.checkpoint import list_checkpoints, load_latest, remove_partial, save_checkpoint


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
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGUSR1], ids=["SIGTERM", "SIGUSR1"])
def test_a_signal_saves_within_a_step_and_exits_cleanly_and_the_run_goes_on(model, shards, tmp_path, sent):
    changes = {"steps": 60, "batch_size": 1}
    run_finetune(settings(model, shards, tmp_path / "whole", **changes))
    config = settings(model, shards, tmp_path / "cut", **changes)
    process = launch(config)
    wait_for_step(tmp_path / "cut", 3, process)
    process.send_signal(sent)
    assert process.wait(timeout=60) == 0
    assert "the same command goes on" in process.communicate()[1]
    assert not (tmp_path / "cut" / "summary.json").exists()
    step, _ = load_latest(tmp_path / "cut" / "checkpoints")
    assert step == len(log_lines(tmp_path / "cut")) < 60
    run_finetune(config)
    assert log_lines(tmp_path / "cut") == log_lines(tmp_path / "whole")
    assert same(weights(tmp_path / "cut"), weights(tmp_path / "whole"))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGUSR1], ids=["SIGTERM", "SIGUSR1"])
def test_a_signal_while_a_run_starts_saves_after_its_first_step(model, shards, tmp_path, sent):
    config = settings(model, shards, tmp_path / "run", steps=1000, batch_size=1)
    process = launch(config)
    wait_for_torch(process.pid)
    process.send_signal(sent)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0 and "stopped after step 1 of 1000; the same command goes on" in said
    step, _ = load_latest(tmp_path / "run" / "checkpoints")
    assert step == len(log_lines(tmp_path / "run")) == 1


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_signal_to_one_of_two_processes_stops_both_at_the_same_step(model, shards, tmp_path):
    changes = {"steps": 40, "batch_size": 1}
    whole = launch(settings(model, shards, tmp_path / "whole", **changes), processes=2)
    assert whole.wait(timeout=120) == 0, whole.communicate()[1]
    config = settings(model, shards, tmp_path / "cut", **changes)
    process = launch(config, processes=2)
    wait_for_step(tmp_path / "cut", 3, process)
    os.kill(workers_of(process.pid)[-1], signal.SIGUSR1)
    assert process.wait(timeout=60) == 0
    assert "the same command goes on" in process.communicate()[1]
    assert not (tmp_path / "cut" / "summary.json").exists()
    # The launcher hands SIGTERM on to its workers; its own exit code is its own affair.
    process = launch(config, processes=2)
    wait_for_step(tmp_path / "cut", len(log_lines(tmp_path / "cut")) + 3, process)
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=60)
    assert "the same command goes on" in process.communicate()[1]
    step, _ = load_latest(tmp_path / "cut" / "checkpoints")
    assert step == len(log_lines(tmp_path / "cut")) < 40
    process = launch(config, processes=2)
    assert process.wait(timeout=120) == 0, process.communicate()[1]
    assert log_lines(tmp_path / "cut") == log_lines(tmp_path / "whole")
    assert same(weights(tmp_path / "cut"), weights(tmp_path / "whole"))


def test_a_full_disk_stops_the_run_with_its_reason_and_it_goes_on_from_the_older_checkpoint(
    model, shards, tmp_path, monkeypatch
):
    changes = {"steps": 5, "checkpoint_every": 1}
    run_finetune(settings(model, shards, tmp_path / "whole", **changes))
    config = settings(model, shards, tmp_path / "cut", **changes)
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        run_finetune(config)
    folder = tmp_path / "cut" / "checkpoints"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:  # no file may be larger than half a checkpoint: writing fails as it does on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (list_checkpoints(folder)[-1][1].stat().st_size // 2, hard))
        with pytest.raises(UserError, match="step-000003.pt: .*could not be written.*goes on from step 2"):
            run_finetune(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in sorted(folder.iterdir())] == ["step-000001.pt", "step-000002.pt"]
    (folder / ".tmp-123-step-000003.pt").write_bytes(b"left by a writer that was killed")
    run_finetune(config)
    assert log_lines(tmp_path / "cut") == log_lines(tmp_path / "whole")
    assert same(weights(tmp_path / "cut"), weights(tmp_path / "whole"))


# ------------------------------------------------------------------------------------------------- other steps


def test_a_finished_run_goes_on_to_more_steps_as_one_that_had_them_from_the_start(model, shards, tmp_path):
    judge = FilterConfig("one_in_k", k=2, calibrate=Calibration(steps=4, quantile=0.5, per_band=False))
    changes = {"ema_decay": 0.9, "warmup_steps": 6, "filter": judge, "batch_size": 16, "log_every": 3}
    run_finetune(settings(model, shards, tmp_path / "whole", steps=8, **changes))
    assert run_finetune(settings(model, shards, tmp_path / "more", steps=4, **changes))["steps"] == 4
    config = settings(model, shards, tmp_path / "more", steps=8, **changes)
    summary = run_finetune(config)
    assert summary["steps"] == 8 and run_finetune(config) == summary
    # The first end has a line of its own.
    assert [line for line in log_lines(tmp_path / "more") if line["step"] != 4] == log_lines(tmp_path / "whole")
    assert same(weights(tmp_path / "more"), weights(tmp_path / "whole"))
    assert len(list_checkpoints(tmp_path / "more" / "checkpoints")) == 1


def test_a_stopped_run_may_have_other_steps_but_not_fewer_than_it_made(model, shards, tmp_path, monkeypatch):
    run_finetune(settings(model, shards, tmp_path / "whole", steps=5))
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        run_finetune(settings(model, shards, tmp_path / "run", steps=50))
    with pytest.raises(UsageError, match="steps cannot become 2, after 50: 4 are made already"):
        run_finetune(settings(model, shards, tmp_path / "run", steps=2))
    run_finetune(settings(model, shards, tmp_path / "run", steps=5))
    assert same(weights(tmp_path / "run"), weights(tmp_path / "whole"))


def test_a_run_whose_steps_would_have_been_others_is_not_extended_and_says_why(model, shards, tmp_path):
    run_finetune(settings(model, shards, tmp_path / "cosine", steps=2, lr_schedule="cosine"))
    assert not list_checkpoints(tmp_path / "cosine" / "checkpoints")
    with pytest.raises(UsageError, match="steps cannot become 4, after 2: with lr_schedule cosine.*--model"):
        run_finetune(settings(model, shards, tmp_path / "cosine", steps=4, lr_schedule="cosine"))
    run_finetune(settings(model, shards, tmp_path / "none", steps=2, keep_checkpoints=0))
    assert not (tmp_path / "none" / "checkpoints").exists()
    with pytest.raises(UsageError, match="the state after the last step was not kept"):
        run_finetune(settings(model, shards, tmp_path / "none", steps=4, keep_checkpoints=0))
    with pytest.raises(UsageError, match="other settings .learning_rate.:"):  # steps may differ, the others not
        run_finetune(settings(model, shards, tmp_path / "none", steps=4, learning_rate=1e-2))


# --------------------------------------------------------------------------------------------- parts of checkpoints


def test_what_a_killed_writer_left_behind_is_removed(tmp_path):
    save_checkpoint(tmp_path, 2, {"x": torch.ones(3)}, keep=2)
    (tmp_path / ".tmp-1-step-000004.pt").write_bytes(b"half")
    remove_partial(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000002.pt"]
    remove_partial(tmp_path / "not there yet")


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
