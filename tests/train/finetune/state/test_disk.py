"""What a disk does to checkpoints: those that some process cannot read, the memory of reading them, other processes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from afresh.errors import UsageError, UserError
from tests.train.finetune.runs import REPOSITORY, launch, log_lines, same, settings, stop_after, weights
from tests.train.finetune.test_processes import SGD, assert_alike, finish
from train.finetune.batches.faults import FaultLog
from train.finetune.config import FilterConfig
from train.finetune.data.images import Fault
from train.finetune.loop import run_finetune
from train.finetune.state.checkpoint import list_checkpoints, load_latest, restore_state, save_checkpoint
from train.finetune.state.optimizer import make_optimizer


def damage(path: Path) -> None:
    """Turn a byte in the middle, as a disk does that fails: the file's size and ends stay."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


def test_a_run_none_of_whose_checkpoints_can_be_read_stops_and_leaves_its_log(model, shards, tmp_path, monkeypatch):
    config = settings(model, shards, tmp_path / "run", checkpoint_every=1)
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        run_finetune(config)
    before = log_lines(tmp_path / "run")
    for _, path in list_checkpoints(tmp_path / "run" / "checkpoints"):
        damage(path)
    with pytest.raises(UserError, match="step-000003.pt: neither this checkpoint nor an older one can be read.*remove"):
        run_finetune(config)
    assert log_lines(tmp_path / "run") == before and len(before) == 3


def test_a_run_whose_checkpoints_are_gone_says_that_it_begins_anew(model, shards, tmp_path, monkeypatch, capsys):
    config = settings(model, shards, tmp_path / "run", steps=3)
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        run_finetune(config)
    assert "begins anew" not in capsys.readouterr().err
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    run_finetune(config)
    assert "log.jsonl: there is no checkpoint to go on from: the run begins anew" in capsys.readouterr().err
    assert [line["step"] for line in log_lines(tmp_path / "run")] == [1, 2, 3]


def test_a_damaged_byte_is_noticed_and_the_older_checkpoint_taken(tmp_path):
    for step in (2, 4):
        save_checkpoint(tmp_path, step, {"x": torch.full((10_000,), step)}, keep=2)
    damage(tmp_path / "step-000004.pt")
    step, state = load_latest(tmp_path)
    assert step == 2 and state["x"].unique().tolist() == [2]


def test_a_damaged_line_of_the_log_does_not_keep_a_run_from_going_on(model, shards, tmp_path, monkeypatch):
    run_finetune(settings(model, shards, tmp_path / "whole"))
    config = settings(model, shards, tmp_path / "cut")
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        run_finetune(config)
    log = tmp_path / "cut" / "log.jsonl"
    log.write_bytes(log.read_bytes() + bytes(40) + b"\n")  # what a crash of the machine leaves on some file systems
    run_finetune(config)
    assert log_lines(tmp_path / "cut") == log_lines(tmp_path / "whole")


def test_a_run_that_was_begun_before_an_option_came_goes_on(model, shards, tmp_path, monkeypatch):
    config = settings(model, shards, tmp_path / "run")
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        run_finetune(config)
    path = tmp_path / "run" / "run.json"
    before = json.loads(path.read_text())
    for name in ("huber_c", "tags", "timesteps", "clip_skip"):
        before.pop(name)
    path.write_text(json.dumps(before))
    with pytest.raises(UsageError, match="other settings .huber_c.:"):
        run_finetune(settings(model, shards, tmp_path / "run", huber_c=0.1))
    assert run_finetune(config)["steps"] == 4


ONE_CANNOT_READ = """
import os, sys
import torch
from train.cli import main
from train.finetune.state import checkpoint

read = checkpoint._read

def unreadable(path):
    lost = os.environ["LOST"].split(",")
    return ({}, "Input/output error") if os.environ["RANK"] == "1" and path.stem in lost else read(path)

checkpoint._read = unreadable
sys.exit(main())
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_processes_of_which_one_cannot_read_the_newest_checkpoint_go_on_from_an_older_one_together(
    model, shards, tmp_path, monkeypatch
):
    changes = {"steps": 5, "batch_size": 2, "checkpoint_every": 1, "ema_decay": 0.9}
    finish(launch(settings(model, shards, tmp_path / "whole", **changes), processes=2))
    config = settings(model, shards, tmp_path / "cut", **changes)
    program = tmp_path / "one_cannot_read.py"
    program.write_text(ONE_CANNOT_READ)
    finish(launch(settings(model, shards, tmp_path / "cut", **changes | {"steps": 3}), processes=2))
    (tmp_path / "cut" / "summary.json").unlink()
    save = tmp_path / "cut" / "checkpoints"
    # An older one, as it stands beside the newest while a run is under way.
    finish(launch(settings(model, shards, tmp_path / "older", **changes | {"steps": 2}), processes=2))
    (tmp_path / "older" / "checkpoints" / "step-000002.pt").rename(save / "step-000002.pt")
    before = log_lines(tmp_path / "cut")
    monkeypatch.setenv("LOST", "step-000003,step-000002")
    said = finish(launch(config, processes=2, program=program), code=1)
    assert "neither this checkpoint nor an older one can be read" in said and log_lines(tmp_path / "cut") == before
    monkeypatch.setenv("LOST", "step-000003")
    said = finish(launch(config, processes=2, program=program))
    assert "step-000003.pt: unreadable checkpoint left out (Input/output error)" in said
    assert log_lines(tmp_path / "cut") == log_lines(tmp_path / "whole")
    assert same(weights(tmp_path / "cut"), weights(tmp_path / "whole"))


# ------------------------------------------------------------------------------------------------------- memory

MEASURE = """
import sys
from pathlib import Path
from train.finetune.state.checkpoint import load_latest

def own():
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("RssAnon"))
    return int(line.split()[1]) * 1024

before = own()
_, state = load_latest(Path(sys.argv[1]))
assert float(state["x"].sum()) == 0
print(own() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_a_checkpoint_is_mapped_and_not_held_in_memory(tmp_path):
    save_checkpoint(tmp_path, 1, {"x": torch.zeros(50_000_000)}, keep=1)  # 200 MB
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 50_000_000


def test_nothing_of_a_checkpoint_stays_once_the_parts_have_it(tmp_path):
    config = settings("", "", tmp_path)
    weight = torch.nn.Parameter(torch.ones(1000))
    optimizer = make_optimizer([weight], config, fused=False)
    weight.grad = torch.ones(1000)
    optimizer.step()
    save_checkpoint(tmp_path, 1, {"optimizer": optimizer.state_dict()}, keep=1)
    _, state = load_latest(tmp_path)
    mapped = {t.untyped_storage().data_ptr() for t in state["optimizer"]["state"][0].values()}
    again = make_optimizer([weight], config, fused=False)
    restore_state(state, {"optimizer": again})
    assert not state
    held = dict(again.state[weight])
    assert same(held, optimizer.state[weight])
    assert not mapped & {t.untyped_storage().data_ptr() for t in held.values()}


# ---------------------------------------------------------------------------------------------- other processes


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_goes_on_with_another_number_of_processes_at_the_same_positions(model, shards, tmp_path, monkeypatch):
    changes = {"caption_dropout": 0.0, "ema_decay": 0.9, "filter": FilterConfig("every_step", threshold=2.6), **SGD}
    one = {"batch_size": 2, "gradient_accumulation": 2, **changes}
    run_finetune(settings(model, shards, tmp_path / "one", steps=6, **one))
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        run_finetune(settings(model, shards, tmp_path / "moved", steps=6, **one))
    with pytest.raises(UsageError, match="processes 1 and gradient_accumulation 2, 2 batches a step.*gradient_acc"):
        run_finetune(settings(model, shards, tmp_path / "moved", steps=6, **one | {"gradient_accumulation": 1}))
    two = settings(model, shards, tmp_path / "moved", steps=6, **one | {"gradient_accumulation": 1})
    finish(launch(two, processes=2))
    assert json.loads((tmp_path / "moved" / "run.json").read_text())["processes"] == 2
    assert_alike(tmp_path / "one", tmp_path / "moved")


def test_faults_of_processes_that_a_run_no_longer_has_are_taken_over(tmp_path):
    faults = [Fault(position, "s.tar", "k", "gone", "s.tar/other") for position in range(6)]
    for rank in range(3):
        FaultLog(tmp_path, rank, 0, 3).add(faults[rank::3])
    logs = [FaultLog(tmp_path, rank, 5, 2) for rank in range(2)]
    assert [log.count for log in logs] == [3, 2]  # 0, 3, 2; 1, 4; 5 comes again
    assert sorted(path.name for path in tmp_path.glob("faults*")) == ["faults-1.jsonl", "faults.jsonl"]
