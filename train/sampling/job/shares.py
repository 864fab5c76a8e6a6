"""Several processes of one ``train sample``: each draws its share of the images into the folder that all write to.

They are told apart by the variables ``RANK`` and ``WORLD_SIZE``, which torchrun and Accelerate set, and meet in files
alone: there is no process group, so nothing can wait for ever in a collective call when one of them dies.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from afresh.errors import UserError
from afresh.progress import progress

PATIENCE = 900.0
"""Seconds without any new image after which the first process stops waiting for the others."""
POLL = 0.2
"""Seconds between two looks."""
Batch = TypeVar("Batch")


def process() -> tuple[int, int]:
    """This process's number, from 0, and how many there are."""
    return int(os.environ.get("RANK") or 0), max(1, int(os.environ.get("WORLD_SIZE") or 1))


def share(batches: Sequence[Batch]) -> list[Batch]:
    """The batches that this process draws: every n-th."""
    rank, processes = process()
    return list(batches[rank::processes])


def stop_asked() -> bool:
    """Whether ``launch.sh`` has been asked to stop the processes that it started."""
    file = os.environ.get("AFRESH_STOP_FILE", "")
    return file != "" and os.path.exists(file)


def wait_for(missing: Callable[[], int], patience: float) -> None:
    """Wait until nothing is missing, or the processes are asked to stop.

    Args:
        missing: counts what the other processes have not written yet.
        patience: seconds without any progress after which this gives up.

    Raises:
        UserError: it did.
    """
    left = missing()
    if not left:
        return
    last = time.monotonic()
    with progress(total=left, desc="waiting for the other processes", unit="images") as bar:
        while left and not stop_asked():
            time.sleep(POLL)
            before, left = left, missing()
            bar.update(before - left)
            if left < before:
                last = time.monotonic()
            elif time.monotonic() - last > patience:
                raise UserError(
                    f"the other processes have written nothing for {patience:.0f} s, {left} images are missing: "
                    "see what became of them; the same command draws what is missing"
                )

