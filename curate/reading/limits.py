"""Pillow's limit of pixels, which is the process's, out of force while this package opens or decodes an image."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from PIL import Image


@dataclass
class _Lifted:
    """How many are at it, on all threads, and what the limit was before the first of them."""

    by: int = 0
    before: int | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)


_lifted = _Lifted()


@contextmanager
def pillows_limit_lifted() -> Iterator[None]:
    """No limit but one's own: Pillow refuses what has more than 179 million pixels, whatever was asked."""
    with _lifted.lock:
        if not _lifted.by:
            _lifted.before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        _lifted.by += 1
    try:
        yield
    finally:
        with _lifted.lock:
            _lifted.by -= 1
            if not _lifted.by:
                Image.MAX_IMAGE_PIXELS = _lifted.before
