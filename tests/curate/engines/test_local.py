"""The local engine runs a function over tasks, in this process or in several, with the same results."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time

import pytest

from afresh.cores import cpu_count, in_order, shares
from afresh.errors import UserError
from curate.engines.local import LocalEngine


def square(number: int) -> int:
    return number * number


def process_id(_: int) -> int:
    return os.getpid()


def fail_at_two(number: int) -> int:
    if number == 2:
        raise UserError("shard two is broken")
    return number


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


def test_zero_workers_means_the_cores_at_hand():
    assert LocalEngine(0).workers == cpu_count() >= 1
    with pytest.raises(ValueError, match="workers"):
        LocalEngine(-1)


def test_threads_are_shared_out_by_size():
    assert shares([1000], 8) == [8]
    assert shares([9000, 100, 100], 8) == [8, 1, 1]
    assert shares([500, 500], 2) == shares([1, 1, 1, 1], 2)[:2] == [1, 1]
    assert shares([500, 500, 500], 8) == [3, 3, 3]
    assert shares([9000, None], 4) == shares([0, 0], 4) == [2, 2]
    assert shares([], 4) == []


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_what_runs_on_threads_comes_in_order(threads):
    def late_first(number: int) -> int:
        time.sleep(0.01 if number % 5 == 0 else 0)
        return number * number

    done = in_order(late_first, iter(range(60)), threads, at_most=9, weigh=lambda _: 1, weight=100)
    assert list(done) == [number * number for number in range(60)]


@pytest.mark.parametrize("limits", [{"at_most": 5, "weight": 10**9}, {"at_most": 10**9, "weight": 5}])
def test_threads_run_ahead_no_further_than_they_may(limits):
    taken = 0

    def items():
        nonlocal taken
        for number in range(50):
            taken += 1
            yield number

    for done, _ in enumerate(in_order(square, items(), 3, weigh=lambda _: 1, **limits)):
        assert taken - done <= 5 + 1
    assert taken == 50


def test_what_weighs_more_than_is_held_goes_alone():
    running = 0

    def alone(_: int) -> int:
        nonlocal running
        running += 1
        time.sleep(0.002)
        seen, running = running, running - 1
        return seen

    assert set(in_order(alone, range(9), 4, at_most=99, weigh=lambda _: 1000, weight=10)) == {1}


def test_an_error_comes_in_its_place_and_no_thread_stays_behind():
    before = threading.active_count()
    done = in_order(fail_at_two, range(100), 4, at_most=50, weigh=lambda _: 1, weight=99)
    assert [next(done), next(done)] == [0, 1]
    with pytest.raises(UserError, match="shard two"):
        next(done)
    assert threading.active_count() == before
    left = in_order(square, range(100), 4, at_most=50, weigh=lambda _: 1, weight=99)
    next(left)
    left.close()
    assert threading.active_count() == before
