"""Where stages run: a function over many shard files, on this machine's processes.

What is done (a stage's function and its tasks) is apart from where. A function writes its result to a file
and returns only what is small: a stage that was stopped is continued by the tasks whose files are missing.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from afresh.cores import cpu_count
from afresh.errors import UserError
from afresh.progress import progress

AHEAD = 4  # tasks a process that are handed over before they run
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")


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

        With several workers the function and the tasks are pickled: the function must be a module's own. A task is
        taken from ``tasks`` when it is soon to run, so these may be made then. The first exception stops the rest and
        is raised here.

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
                results = [None] * len(tasks)
                running: dict[Future[Any], int] = {}
                for number in range(len(tasks)):
                    running[pool.submit(function, tasks[number])] = number
                    while running and (len(running) >= AHEAD * workers or number == len(tasks) - 1):
                        for done in wait(running, return_when=FIRST_COMPLETED).done:
                            results[running.pop(done)] = done.result()
                            bar.update(1)
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

