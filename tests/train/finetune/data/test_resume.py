"""Buckets, streaming and caches under kill -9, on one process and two."""

from __future__ import annotations

import dataclasses
import os
import random
import signal
from pathlib import Path

import pytest

from tests.train.finetune.made_photos import children, photos
from tests.train.finetune.runs import launch, log_lines, same, settings, wait_for_step, weights
from train.finetune.config import Augmentation, Buckets, ShardGroup
from train.finetune.loop import run_finetune


def bucketed(model: str, shards: str, out: Path, **changes):
    """A run that passes its epochs' ends in uneven shards of images of many shapes."""
    config = settings(model, shards, out, batch_size=3, crop="random", checkpoint_every=3, resolution=64, **changes)
    parts = sorted(Path(shards).glob("*.tar"))
    groups = [str(parts[0]), ShardGroup(str(parts[1]), repeats=2), *map(str, parts[2:])]
    return dataclasses.replace(config, shards=groups, buckets=Buckets(step=16), shuffle_shards=2)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_run_killed_at_random_with_workers_and_buckets_goes_on_bit_for_bit(model, tmp_path):
    shards = photos(tmp_path / "in")
    run_finetune(bucketed(model, shards, tmp_path / "whole", steps=24))
    config = bucketed(model, shards, tmp_path / "cut", steps=24, workers=2)
    process = launch(config)
    wait_for_step(tmp_path / "cut", random.randint(1, 22), process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    run_finetune(dataclasses.replace(config, workers=1))
    assert log_lines(tmp_path / "cut") == log_lines(tmp_path / "whole")
    assert same(weights(tmp_path / "cut"), weights(tmp_path / "whole"))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_killed_worker_ends_the_run_with_one_line(model, tmp_path):
    process = launch(settings(model, photos(tmp_path / "in"), tmp_path / "run", steps=10**5, workers=1))
    wait_for_step(tmp_path / "run", 2, process)
    commands = {pid: Path(f"/proc/{pid}/cmdline").read_text() for pid in children(process.pid)}
    (worker,) = [pid for pid, command in commands.items() if "spawn_main" in command]
    os.kill(worker, signal.SIGKILL)
    assert process.wait(timeout=60) == 1
    last = process.communicate()[1].strip().splitlines()[-1]
    assert last.startswith("error: a data worker died") and "lower workers" in last


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_two_processes_share_caches_and_go_on_bit_for_bit_as_one_that_accumulates(model, tmp_path):
    shards = photos(tmp_path / "in", shards=3)
    changes = {
        "steps": 12,
        "augmentation": Augmentation(flip=0.5, variants=2),
        "cache_latents": "disk",
        "cache_text": "disk",
    }
    one = bucketed(model, shards, tmp_path / "one", gradient_accumulation=2, **changes)
    run_finetune(one)
    whole = launch(bucketed(model, shards, tmp_path / "whole", **changes), processes=2)
    assert whole.wait(timeout=200) == 0, whole.communicate()[1]
    cut = bucketed(model, shards, tmp_path / "cut", **changes)
    process = launch(cut, processes=2)
    wait_for_step(tmp_path / "cut", random.randint(1, 10), process)
    for pid in [*children(process.pid), process.pid]:
        os.kill(pid, signal.SIGKILL)
    process.wait()
    process = launch(cut, processes=2)
    assert process.wait(timeout=200) == 0, process.communicate()[1]
    assert log_lines(tmp_path / "cut") == log_lines(tmp_path / "whole")
    assert same(weights(tmp_path / "cut"), weights(tmp_path / "whole"))
    # A batch is of one bucket, and the processes of a step may have different ones: as micro-batches of one process.
    for a, b in zip(log_lines(tmp_path / "one"), log_lines(tmp_path / "whole"), strict=True):
        assert (a["kept"], a["learning_rate"]) == (b["kept"], b["learning_rate"])
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-2)
