"""Where stages run: on Ray, which has started on this machine or a cluster of them.

Ray schedules, retries what a lost worker or node had in hand, and knows nothing of curation: tasks are those of the
local engine, with the same files as marks of what is done, so that either engine goes on where the other one stopped.
Nothing large goes through its object store: a task says which files to read and write, and gives back what is small.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

from afresh.cores import cpu_count
from afresh.errors import UsageError, UserError, reason
from afresh.progress import progress
from curate.engines.local import AHEAD, RETRIES, THREADS, poisoned

BATCHES = 64  # tasks of Ray's a processor, at most: with many small ones it is busy with itself


class RayEngine:
    """Ray's workers, for a ``with`` block, which ends what it has started itself.

    Every machine of a cluster must see the caches and the output under the same path, or the output at a URL; inputs
    may lie at URLs. Each has this package and its extra ``ray`` installed.

    Args:
        workers: tasks at a time; 0 takes the processors that the cluster has.
        address: of a running cluster (``auto``, ``HOST:PORT``, ``ray://HOST:PORT``). Empty goes by ``RAY_ADDRESS``, as
            ``ray job submit`` sets it, and starts Ray on this machine where there is none.

    Raises:
        UsageError: Ray is not installed.
    """

    def __init__(self, workers: int = 0, address: str = "") -> None:
        if workers < 0:
            raise ValueError(f"workers must be 0 or more, got {workers}")
        if importlib.util.find_spec("ray") is None:
            raise UsageError("engine: ray is not installed: pip install 'afresh[ray]', or take engine local")
        self.workers, self._address, self._ours = workers, address, False
        self._widest = 1
        self.gpus = 0
        """GPUs of the cluster."""

    def __enter__(self) -> RayEngine:
        """Connect to the cluster, or start Ray here.

        Raises:
            UsageError: there is no cluster at the address.
        """
        import logging

        import ray

        if not ray.is_initialized():
            # Else Ray gives way to all other processes, by 15 of nice's degrees.
            here = {"num_cpus": self.workers or cpu_count(), "_system_config": {"worker_niceness": 0}}
            options: dict[str, Any] = {
                "include_dashboard": None if self._address else False,
                "log_to_driver": False,
                "logging_level": logging.WARNING,
                "runtime_env": {"env_vars": dict.fromkeys(THREADS, "1")},  # as the local engine's workers have it
            }
            try:
                ray.init(address=self._address or None, **_where(self._address, here), **options)
            except Exception as error:
                raise UsageError(f"engine: cannot connect to Ray at {self._address or 'this machine'}: "
                                 f"{reason(error)}") from error  # fmt: skip
            self._ours = True
        cores = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
        self.workers = self.workers or max(1, sum(cores))
        self._widest = max([1, *cores])
        self.gpus = int(ray.cluster_resources().get("GPU", 0))
        return self

    def __exit__(self, *_: object) -> None:
        import ray

        if self._ours:
            ray.shutdown()
            self._ours = False

    def map(
        self, function: Callable[[Any], Any], tasks: Sequence[Any], *, desc: str, unit: str = "shards"
    ) -> list[Any]:
        """``[function(task) for task in tasks]``, with progress; tasks are made when they are soon to run.

        Tasks are handed over in even batches, of which a few wait. One whose worker or machine is lost is run again, a
        bounded number of times. The first exception stops the rest and is raised here.

        Raises:
            UserError: a task has lost its worker again and again; all others are finished then.
        """
        import ray

        results: list[Any] = [None] * len(tasks)
        size = max(1, -(-len(tasks) // (BATCHES * self.workers)))
        waiting = [range(start, min(start + size, len(tasks))) for start in range(0, len(tasks), size)][::-1]
        running: dict[Any, range] = {}
        lost: list[int] = []
        run = ray.remote(_run)
        with progress(total=len(tasks), desc=desc, unit=unit) as bar:
            try:
                while waiting or running:
                    while waiting and len(running) < AHEAD * self.workers:
                        numbers = waiting.pop()
                        some = [tasks[number] for number in numbers]
                        cores = min(self._widest, max(getattr(task, "threads", 1) for task in some))
                        gpus = getattr(some[0], "gpus", 0)  # Ray shows a worker the GPU that it is to use
                        asked = run.options(
                            num_cpus=cores, num_gpus=gpus, max_retries=RETRIES, name=f"{desc} {numbers[0]}"
                        )
                        running[asked.remote(function, some)] = numbers
                    done, _ = ray.wait(list(running), num_returns=1)
                    numbers = running.pop(done[0])
                    try:
                        results[numbers.start : numbers.stop] = ray.get(done[0])
                    except ray.exceptions.RayTaskError as error:
                        raise error.cause if isinstance(error.cause, Exception) else error from None
                    except ray.exceptions.RayError:  # the worker or its machine is lost, and was again and again
                        if len(numbers) == 1:
                            lost += numbers
                        else:  # one of them is to blame
                            waiting += [range(number, number + 1) for number in reversed(numbers)]
                        continue
                    bar.update(len(numbers))
            except BaseException:
                for one in running:
                    ray.cancel(one, force=True)
                raise
        if lost:
            raise UserError(poisoned([tasks[number] for number in lost], desc))
        return results


def _where(address: str, here: dict[str, Any]) -> dict[str, Any]:
    """What Ray is started with, where it is not running."""
    import os

    return {} if address or os.environ.get("RAY_ADDRESS") else here


def _run(function: Callable[[Any], Any], tasks: Sequence[Any]) -> list[Any]:
    return [function(task) for task in tasks]
