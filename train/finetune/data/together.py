"""Work that processes do beside one another for unequally long, without a time limit of their exchanges."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

import torch

from afresh.errors import UserError

if TYPE_CHECKING:
    from accelerate import Accelerator


T = TypeVar("T")
BEAT = 0.2  # seconds


def together(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """``work()`` on every process; returns when all are done, however long the slowest takes.

    A barrier would give up after ten minutes on GPUs. Here the work runs in a thread while the processes tell each
    other that they live. The work must not exchange anything itself.

    Raises:
        UserError: the work of another process failed; what failed here is raised as it is.
    """
    if accelerator.num_processes == 1:
        return work()
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work)
        while True:
            done = future.done()
            failed = done and future.exception() is not None
            state = torch.tensor([float(done), float(failed)], device=accelerator.device)
            finished, failures = accelerator.reduce(state, reduction="sum").tolist()
            if failures:
                if failed:
                    future.result()
                raise UserError("another process of the run failed: its message says why")
            if finished == accelerator.num_processes:
                return future.result()
            time.sleep(BEAT)

