"""What processes do together: work of unequal length, without the time limit of an exchange; what they agree on."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from afresh.errors import UserError
from train.stopping import StopOnSignal, Stopped

if TYPE_CHECKING:
    from accelerate import Accelerator


T = TypeVar("T")
BEAT = 0.2  # seconds


def together(accelerator: Accelerator | None, work: Callable[[], T], stop: StopOnSignal | None = None) -> T:
    """``work()`` on every process; returns when all are done, however long the slowest takes.

    A barrier would give up after ten minutes on GPUs. Here the work runs in a thread while the processes tell each
    other that they live. The work must not exchange anything itself.

    Args:
        accelerator: the processes; None for this one alone.
        work: what each does.
        stop: what the work gives up by (:meth:`StopOnSignal.check`): when one process is asked to stop, all are.

    Raises:
        Stopped: some process gave up its work.
        UserError: the work of another process failed; what failed here is raised as it is.
    """
    if accelerator is None or accelerator.num_processes == 1:
        return work()
    device = accelerator.device
    with ThreadPoolExecutor(1) as pool:
        if device.type == "cuda":  # the current device is the thread's own, and at first the first one
            pool.submit(torch.cuda.set_device, device).result()
        future = pool.submit(work)
        while True:
            done = future.done()
            error = future.exception() if done else None
            given_up = isinstance(error, Stopped)
            failed = error is not None and not given_up
            asked = given_up or (stop is not None and stop.asked)
            state = torch.tensor([float(done), float(failed), float(asked), float(given_up)], device=device)
            finished, failures, wishes, stopped = accelerator.reduce(state, reduction="sum").tolist()
            if failures:
                if failed:
                    future.result()
                raise UserError("another process of the run failed: its message says why")
            if wishes and stop is not None:
                stop.ask()
            if finished == accelerator.num_processes:
                if stopped:
                    raise Stopped
                return future.result()
            time.sleep(BEAT)



def on_first(accelerator: Accelerator, work: Callable[..., T] | None, *arguments: Any) -> T | None:
    """``work(*arguments)`` on the first process, while the others wait for it without a time limit; None on them.

    Raises:
        UserError: the work failed on another process; what failed here is raised as it is.
    """
    if not accelerator.is_main_process or work is None:
        return together(accelerator, lambda: None)
    return together(accelerator, partial(work, *arguments))


def everyones(accelerator: Accelerator | None, mine: Sequence[T]) -> list[T]:
    """The items of all processes, in the order of the processes; every process calls this."""
    if accelerator is None or accelerator.num_processes == 1:
        return list(mine)
    from accelerate.utils import gather_object

    return list(gather_object(list(mine)))


def decided(accelerator: Accelerator, decide: Callable[[], T]) -> T:
    """What the first process decides, on every process: they may see files differently, and must not part over them.

    Raises:
        UserError: what the first process raised.
    """
    outcome: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            outcome = [decide()]
        except UserError as error:
            outcome = [error]
    if accelerator.num_processes > 1:
        from accelerate.utils import broadcast_object_list

        broadcast_object_list(outcome)
    if isinstance(outcome[0], UserError):
        raise outcome[0]
    return outcome[0]
