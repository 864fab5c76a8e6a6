"""Where stages run: a function over many shard files, on this machine's processes.

What is done (a stage's function and its tasks) is apart from where. A function writes its result to a file
and returns only what is small: a stage that was stopped is continued by the tasks whose files are missing.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from afresh.cores import cpu_count
from afresh.errors import UserError, printable
from afresh.progress import progress
from curate.engines.gpus import gpu_ids, on_gpus, take

AHEAD = 4  # tasks a process that are handed over before they run
RETRIES = 2  # of a task that ended its process while nothing else ran
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")


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
        self._processes = self.workers
        self._gpus: list[str] = []
        self._stays = False

    @property
    def gpus(self) -> int:
        """GPUs of this machine."""
        return len(gpu_ids())

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
        is raised here. Tasks that ask for a share of a GPU have processes of their own, each of which sees one GPU.

        Raises:
            UserError: a task's process was killed (as the system does when memory runs out), and when it was run again,
                too; all other tasks are finished then.
        """
        results: list[Any] = [None] * len(tasks)
        lost: list[int] = []
        share = getattr(tasks[0], "gpus", 0) if len(tasks) else 0
        self._for_gpus(gpu_ids() if share else [], share)
        alone = min(self._processes, len(tasks)) <= 1
        with progress(total=len(tasks), desc=desc, unit=unit) as bar:
            try:
                for number, result in enumerate(map(function, tasks)) if alone else self._run(function, tasks, lost):
                    results[number] = result
                    bar.update(1)
            except BaseException:
                if not alone:
                    for child in set(multiprocessing.active_children()) - self._not_ours:
                        child.terminate()
                    self._end_pool()
                raise
            if not self._stays or self._gpus:
                self._end_pool()
        if lost:
            raise UserError(poisoned([tasks[number] for number in lost], desc))
        return results

    def _run(
        self, function: Callable[[Any], Any], tasks: Sequence[Any], lost: list[int]
    ) -> Iterator[tuple[int, Any]]:
        """Number and result of each task, as they come; the numbers of those that end their processes go to ``lost``.

        A killed process takes all others of its pool with it, and what they had in hand. Each of that is run again by
        itself, so that the one that is to blame is known.
        """
        waiting = list(range(len(tasks)))[::-1]
        suspects: list[int] = []
        deaths: Counter[int] = Counter()
        running: dict[Future[Any], int] = {}
        while waiting or suspects or running:
            at_most = 1 if suspects else AHEAD * min(self._processes, len(tasks))
            while (suspects or waiting) and len(running) < at_most:
                number = (suspects or waiting).pop()
                try:
                    running[self._started().submit(function, tasks[number])] = number
                except BrokenProcessPool:  # which the results that are waited for will tell, too
                    waiting.append(number)
                    break
            if not running:
                self._end_pool()
                continue
            done = next(iter(wait(running, return_when=FIRST_COMPLETED).done))
            try:
                yield running[done], done.result()
                del running[done]
            except BrokenProcessPool:
                self._end_pool()
                wait(running)
                broken = [one for one in running if one.exception() is not None]
                deaths.update(running[one] for one in broken if len(broken) == 1)
                for one in broken:
                    number = running.pop(one)
                    (lost if deaths[number] > RETRIES else suspects).append(number)

    def _started(self) -> ProcessPoolExecutor:
        """The processes, which start as tasks come: no more than there are tasks at a time."""
        if self._pool is None:
            self._not_ours = set(multiprocessing.active_children())
            # A fresh interpreter each: forking a process that has threads (BLAS, torch) may lock up.
            context = multiprocessing.get_context("spawn")
            number = context.Value("i", 0)
            self._pool = ProcessPoolExecutor(
                self._processes, context, initializer=_start_worker, initargs=(self._gpus, number)
            )
        return self._pool

    def _for_gpus(self, ids: list[str], share: float) -> None:
        """Have as many processes as GPUs can take, or all of them where tasks ask for none."""
        if ids != self._gpus:
            self._end_pool()
        self._gpus = ids
        self._processes = min(self.workers, on_gpus(len(ids), share)) if ids else self.workers

    def _end_pool(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None


def poisoned(tasks: Sequence[Any], desc: str) -> str:
    """What to say of tasks whose workers were killed again and again; tasks are called by their ``label``."""
    labels = [str(getattr(task, "label", task)) for task in tasks]
    named = ", ".join(printable(label)[:100] for label in labels[:5])
    more = f" and {len(labels) - 5} more" if len(labels) > 5 else ""
    return (
        f"a worker was killed while {desc} {named}{more}, {RETRIES + 1} times each; all else of this stage is "
        "finished: give it fewer --workers if memory ran out, or leave these out, and run the same command again"
    )


def _start_worker(gpus: list[str], started: Any) -> None:
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    for name in THREADS:
        os.environ[name] = "1"  # before numpy and torch are imported
    with started.get_lock():
        number, started.value = started.value, started.value + 1
    take(gpus, number)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()  # a killed parent would leave its workers waiting for ever
        os._exit(1)

