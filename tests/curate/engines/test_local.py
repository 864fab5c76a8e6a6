"""The local engine runs a function over tasks, in this process or in several, with the same results."""

from __future__ import annotations

import multiprocessing
import os
import signal

import pytest

from afresh.cores import cpu_count
from afresh.errors import UserError
from curate.engines.local import LocalEngine
from tests.curate.engines.deadly import die_at_three, die_once, fail_at_two, process_id, square


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
