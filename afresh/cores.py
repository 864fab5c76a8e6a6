"""The CPU cores at hand, and work on threads: shares of them, how they wait, results in order, equal sums."""

from __future__ import annotations

import collections
import os
import sys
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


WAITING = {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "0"}
"""How OpenMP's threads wait for each other, for GNU's library and for LLVM's and Intel's: they hardly spin.

Spinning for long is a little faster alone, and many times slower where another program has one of the cores: see
``benchmarks/shared_machine.py``.
"""


def share_the_machine(environment: MutableMapping[str, str] = os.environ) -> None:
    """Have OpenMP wait without spinning for long, and take no more threads than the cores at hand.

    It is read when torch is loaded, and by processes that this one starts. What the user has set stays.
    """
    if not environment.keys() & {*WAITING, "OMP_WAIT_POLICY"}:
        environment.update(WAITING)
    if cpu_count() < _scheduled_on():  # which is what OpenMP goes by
        environment.setdefault("OMP_NUM_THREADS", str(cpu_count()))


def cpu_count() -> int:
    """CPU cores that this process may use: by its affinity, and by the quota of its control groups."""
    quota = cpu_quota()
    cores = _scheduled_on()
    return cores if quota is None else max(1, min(cores, int(quota)))


def _scheduled_on() -> int:
    """Cores that the system may run this process on."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS, Windows
        return os.cpu_count() or 1


def cpu_quota(root: str | os.PathLike[str] = "/") -> float | None:
    """CPU seconds a second that this process's control groups grant it (Linux, versions 1 and 2); None without limit.

    A group's limit holds for those below it, and a container often sees its own group as the root: the least of all on
    the way up counts.

    Args:
        root: of the file system that ``proc/self/cgroup`` and ``sys/fs/cgroup`` are looked for in.
    """
    try:
        lines = (Path(root) / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mounts = [controllers, "cpu", "cpu,cpuacct"] if controllers else ["", "unified"]
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for mount in dict.fromkeys(mounts):
            for depth in range(len(parts) + 1):
                folder = Path(root, "sys/fs/cgroup", mount, *parts[:depth])
                found.append(_quota_of(folder))
    return min((quota for quota in found if quota is not None), default=None)


def _quota_of(group: Path) -> float | None:
    """The limit of one control group; None where it has none."""
    try:
        if (group / "cpu.max").is_file():  # version 2
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        return float(quota) / float(period) if quota not in ("max", "-1") else None
    except (OSError, ValueError):
        return None


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

