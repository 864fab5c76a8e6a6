"""Where stages run: a function over many shard files, on this machine's processes.

What is done (a stage's function and its tasks) is apart from where. A function writes its result to a file
and returns only what is small: a stage that was stopped is continued by the tasks whose files are missing.
"""

from __future__ import annotations

import collections
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from curate.console import UserError, progress

T = TypeVar("T")
R = TypeVar("R")

_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")


class Engine(Protocol):
    """Runs ``function`` on every task and gives the results in the order of the tasks."""

    def map(
        self, function: Callable[[Any], Any], tasks: Sequence[Any], *, desc: str, unit: str = "shards"
    ) -> list[Any]: ...


class LocalEngine:
    """This machine's processes; in a ``with`` block they stay from one ``map`` to the next, which spares their start.

    Args:
        workers: number of processes; 1 runs the function in this process, 0 takes the CPU cores at hand.
    """

    def __init__(self, workers: int = 0) -> None:
        if workers < 0:
            raise ValueError(f"workers must be 0 or more, got {workers}")
        self.workers = workers or cpu_count()
        self._pool: ProcessPoolExecutor | None = None
        self._stays = False

    def __enter__(self) -> LocalEngine:
        self._stays = True
        return self

    def __exit__(self, *_: object) -> None:
        self._stays = False
        self._end_pool()

    def map(
        self, function: Callable[[Any], Any], tasks: Sequence[Any], *, desc: str, unit: str = "shards"
    ) -> list[Any]:
        """``[function(task) for task in tasks]``, with progress.

        With several workers the function and the tasks are pickled: the function must be a module's own. The
        first exception stops the rest and is raised here.

        Raises:
            UserError: a worker was killed from outside (as the system does when memory runs out).
        """
        workers = min(self.workers, len(tasks))
        with progress(total=len(tasks), desc=desc, unit=unit) as bar:
            results = []
            if workers <= 1:
                for task in tasks:
                    results.append(function(task))
                    bar.update(1)
                return results
            pool = self._started()
            try:
                futures = [pool.submit(function, task) for task in tasks]
                for future in as_completed(futures):
                    future.result()
                    bar.update(1)
                results = [future.result() for future in futures]
            except BrokenProcessPool as error:
                self._end_pool()
                message = (
                    f"a worker process was killed while {desc}: give it fewer --workers if memory ran out"
                )
                raise UserError(message) from error
            except BaseException:
                for child in set(multiprocessing.active_children()) - self._not_ours:
                    child.terminate()
                self._end_pool()
                raise
            if not self._stays:
                self._end_pool()
            return results

    def _started(self) -> ProcessPoolExecutor:
        """The processes, which start as tasks come: no more than there are tasks at a time."""
        if self._pool is None:
            self._not_ours = set(multiprocessing.active_children())
            # A fresh interpreter each: forking a process that has threads (BLAS, torch) may lock up.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self.workers, context, initializer=_start_worker)
        return self._pool

    def _end_pool(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None


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


def _start_worker() -> None:
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    for name in _THREADS:
        os.environ[name] = "1"  # before numpy and torch are imported
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()  # a killed parent would leave its workers waiting for ever
        os._exit(1)
