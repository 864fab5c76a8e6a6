"""The local engine runs a function over tasks, in this process or in several, with the same results."""

from __future__ import annotations

import multiprocessing
import os
import signal

import pytest

from afresh.cores import cpu_count
from afresh.errors import UserError
from curate.engines.local import LocalEngine
from tests.curate.engines.deadly import OnGpu, die_at_three, die_once, fail_at_two, process_id, seen_gpus, square


def die(_: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_the_order_of_the_tasks(workers):
    assert LocalEngine(workers).map(square, range(7), desc="squaring") == [0, 1, 4, 9, 16, 25, 36]
    assert LocalEngine(workers).map(square, [], desc="squaring") == []


def test_one_worker_is_this_process_and_several_are_others():
    assert set(LocalEngine(1).map(process_id, [0, 1], desc="asking")) == {os.getpid()}
    assert os.getpid() not in LocalEngine(2).map(process_id, [0, 1], desc="asking")


def test_processes_stay_for_the_block_and_no_longer():
    with LocalEngine(2) as engine:
        first = set(engine.map(process_id, range(8), desc="asking"))
        with pytest.raises(UserError, match="shard two"):
            engine.map(fail_at_two, range(5), desc="failing")
        after = [set(engine.map(process_id, range(8), desc="asking")) for _ in range(2)]
        assert len(after[0] | after[1]) <= 2 and not after[0] & first  # an error ends them
        running = {child.pid for child in multiprocessing.active_children()}
        assert after[0] | after[1] <= running
    assert not running & {child.pid for child in multiprocessing.active_children()}


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_is_raised_as_it_was(workers):
    with pytest.raises(UserError, match="shard two"):
        LocalEngine(workers).map(fail_at_two, range(5), desc="failing")


def test_a_killed_worker_is_one_clear_error_not_a_hang():
    with pytest.raises(UserError, match="killed while reading"):
        LocalEngine(2).map(die, [0, 1], desc="reading")


def test_a_task_whose_process_is_killed_is_run_again(tmp_path):
    tasks = [(str(tmp_path), number) for number in range(8)]
    assert LocalEngine(2).map(die_once, tasks, desc="reading") == list(range(8))
    assert len(list(tmp_path.glob("done-*"))) == 8 and len(list(tmp_path.glob("died-*"))) == 3


def test_a_task_that_always_kills_its_process_is_named_when_all_others_are_finished():
    done = []

    class Noted(list):
        def __getitem__(self, number):
            done.append(number)
            return super().__getitem__(number)

    with LocalEngine(2) as engine, pytest.raises(UserError, match=r"killed while reading 3, 3 times each"):
        engine.map(die_at_three, Noted(range(12)), desc="reading")
    assert set(done) == set(range(12))


def test_tasks_are_made_when_they_are_soon_to_run(tmp_path):
    made = []

    class Made(list):
        def __getitem__(self, number):
            made.append(len(list(tmp_path.glob("done-*"))))
            return super().__getitem__(number)

    for number in range(40):
        (tmp_path / f"died-{number}").touch()
    LocalEngine(2).map(die_once, Made((str(tmp_path), number) for number in range(40)), desc="writing")
    assert all(finished >= number - 8 for number, finished in enumerate(made))


def test_zero_workers_means_the_cores_at_hand():
    assert LocalEngine(0).workers == cpu_count() >= 1
    with pytest.raises(ValueError, match="workers"):
        LocalEngine(-1)


@pytest.mark.parametrize(("share", "processes"), [(1.0, 2), (0.5, 4), (0.4, 4)])
def test_tasks_on_gpus_run_in_a_process_for_each_share_which_sees_one_gpu(monkeypatch, share, processes):
    monkeypatch.setattr("curate.engines.local.gpu_ids", lambda: ["3", "GPU-5f"])
    with LocalEngine(8) as engine:
        assert engine.gpus == 2
        seen = set(engine.map(seen_gpus, [OnGpu(share)] * 24, desc="asking"))
        assert len(seen) == len({process for process, _ in seen}) == processes
        assert sorted(gpu for _, gpu in seen) == ["3"] * (processes // 2) + ["GPU-5f"] * (processes // 2)
        others = set(engine.map(seen_gpus, [OnGpu(0)] * 16, desc="asking"))
        assert {gpu for _, gpu in others} == {os.environ.get("CUDA_VISIBLE_DEVICES")}


def test_fewer_workers_than_gpus_have_room_for_leave_some_idle(monkeypatch):
    monkeypatch.setattr("curate.engines.local.gpu_ids", lambda: ["0", "1", "2", "3"])
    seen = set(LocalEngine(2).map(seen_gpus, [OnGpu(1.0)] * 6, desc="asking"))
    assert sorted(gpu for _, gpu in seen) == ["0", "1"]
