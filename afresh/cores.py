"""The CPU cores at hand, and work on threads: shares of them, results in order, one thread for equal sums."""

from __future__ import annotations

import collections
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def cpu_count() -> int:
    """CPU cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS, Windows
        return os.cpu_count() or 1


def shares(sizes: Sequence[int | None], workers: int) -> list[int]:
    """How many of ``workers`` threads each task has: at least one, and more by its share of the whole size.

    Tasks count alike where a size is not known.
    """
    known = [size for size in sizes if size is not None]
    if len(known) < len(sizes) or not sum(known):
        known = [1] * len(sizes)
    total = sum(known)
    return [max(1, -(-workers * size // total)) for size in known]


def in_order(
    function: Callable[[T], R],
    items: Iterable[T],
    threads: int,
    *,
    at_most: int,
    weigh: Callable[[T], int],
    weight: int,
) -> Iterator[R]:
    """``map(function, items)`` on threads, for functions that spend their time outside the interpreter's lock.

    Results come in the order of the items. Items are taken from their iterator in this thread, and no further ahead
    than ``at_most`` of them, or a sum of ``weight`` by ``weigh``, or a single one that weighs more. With one thread
    nothing is taken ahead, and nothing runs elsewhere. An exception of the function is raised in its item's place.
    """
    if threads <= 1:
        yield from map(function, items)
        return
    ahead: collections.deque[tuple[Future[R], int]] = collections.deque()
    held = 0
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                heavy = weigh(item)
                while ahead and (len(ahead) >= at_most or held + heavy > weight):
                    future, lighter = ahead.popleft()
                    yield future.result()
                    held -= lighter
                ahead.append((pool.submit(function, item), heavy))
                held += heavy
                del item
            while ahead:
                yield ahead.popleft()[0].result()
        finally:
            for future, _ in ahead:
                future.cancel()


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch and BLAS on one thread, as in a worker: sums over several threads may differ in their last bits."""
    from threadpoolctl import threadpool_limits

    torch = sys.modules.get("torch")
    threads = torch.get_num_threads() if torch else 0
    if torch:
        torch.set_num_threads(1)
    try:
        with threadpool_limits(1, user_api="blas"):
            yield
    finally:
        if torch:
            torch.set_num_threads(threads)

