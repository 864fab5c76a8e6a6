"""Cores: shared out by size, and threads that give their results in order and run ahead no further than told."""

from __future__ import annotations

import threading
import time

import pytest

from afresh.cores import in_order, shares
from afresh.errors import UserError


def square(number: int) -> int:
    return number * number


def fail_at_two(number: int) -> int:
    if number == 2:
        raise UserError("shard two is broken")
    return number


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
