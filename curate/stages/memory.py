"""Memory that a process holds and does not need."""

from __future__ import annotations

import contextlib
import ctypes
import sys


def hand_back() -> None:
    """Give memory that was freed back to the system; glibc and Arrow keep it for what may come."""
    if arrow := sys.modules.get("pyarrow"):
        arrow.default_memory_pool().release_unused()
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library has no such function
        ctypes.CDLL(None).malloc_trim(0)
