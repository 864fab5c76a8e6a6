"""How one of several processes lets go of their group without hanging."""

from __future__ import annotations

import ctypes
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from accelerate import Accelerator


def keep_group() -> None:
    """Keep the group of processes, where there is one, in memory for good. Call it before the group is ended.

    torch destroys a gloo group when the last object that knows it goes, such as the reducer of
    ``DistributedDataParallel``, which outlives ``destroy_process_group``. Its destructor holds the interpreter's lock
    and waits for the group's threads, and one of these may wait for that lock, to let go of the tensor that was
    exchanged last: the process then hangs for good. A group that is kept costs a few idle threads, which end with the
    process; the interpreter must not destroy it either when it is taken apart, so nothing ever lets go of it.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(distributed.group.WORLD))


def end_training(accelerator: Accelerator) -> None:
    """End Accelerate's trackers and its group of processes."""
    keep_group()
    accelerator.end_training()
