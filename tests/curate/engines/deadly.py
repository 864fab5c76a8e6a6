"""Tasks that ask and tasks whose workers die, for the tests of engines: importable by other processes."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path


def square(number: int) -> int:
    return number * number


def process_id(_: int) -> int:
    return os.getpid()


def niceness(_: int) -> int:
    return os.nice(0)


def fail_at_two(number: int) -> int:
    from afresh.errors import UserError

    if number == 2:
        raise UserError("shard two is broken")
    return number


def die_at_three(number: int) -> int:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def die_once(task: tuple[str, int]) -> int:
    """Leaves a file, and the first time takes its process with it."""
    folder, number = task
    mark = Path(folder) / f"died-{number}"
    if number % 3 == 1 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    (Path(folder) / f"done-{number}").touch()
    return number


@dataclass(frozen=True)
class OnGpu:
    """Takes a share of a GPU."""

    gpus: float


def seen_gpus(_: OnGpu) -> tuple[int, str | None]:
    """The process, and the GPUs that it sees; after a while, so that other processes start, too."""
    time.sleep(0.2)
    return os.getpid(), os.environ.get("CUDA_VISIBLE_DEVICES")
