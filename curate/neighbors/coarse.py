"""Products of rows of bytes, which processors with instructions for them form several times as fast as float32's.

torch has them (NumPy has not), by oneDNN. A processor without these instructions may saturate sums half-way, and is no
faster: :func:`there` tries.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

ROWS = 100_000  # fewer rows are compared before torch is loaded, unless it is
_ROWS_AT_LEAST = 10_000  # trying takes as long as these save
WIDTH = 16  # rows of bytes are as long as a multiple of this


def pays(n: int) -> bool:
    """Whether to look at n rows as bytes first."""
    return n >= (_ROWS_AT_LEAST if "torch" in sys.modules else ROWS) and there()


@lru_cache(maxsize=1)
def there() -> bool:
    """Whether this machine forms products of bytes exactly, and in less time than those of float32."""
    import torch

    if not hasattr(torch, "_int_mm"):
        return False
    x, y = (np.full((size, 48), 127, np.int8) for size in (1024, 256))  # the largest sums there can be
    y[::2] = -127
    wide_x, wide_y = x.astype(np.float32), y.astype(np.float32)
    with one_thread_each():
        if not (products(x, y) == wide_x @ wide_y.T).all():  # whole numbers below 2^24
            return False
        return _seconds(lambda: products(x, y)) < 0.7 * _seconds(lambda: wide_x @ wide_y.T)


def products(x: NDArray[np.int8], y: NDArray[np.int8]) -> NDArray[np.int32]:
    """``[m, n]`` of rows ``[m, k]`` and ``[n, k]``, on the calling thread alone; see :func:`one_thread_each`."""
    import torch

    torch.set_num_threads(1)  # which holds for the thread that says it
    return torch._int_mm(torch.from_numpy(x), torch.from_numpy(y).T).numpy()


def reaching(x: NDArray[np.int8], y: NDArray[np.int8], lowest: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The rows of x and of y, side by side, whose products reach ``lowest``.

    Each row's largest product rules most rows out. torch finds it in a third of the time that NumPy takes to look at
    each product.
    """
    import torch

    product = products(x, y)
    rows = np.flatnonzero(torch.from_numpy(product).amax(1).numpy() >= lowest)
    if not len(rows):
        return rows, rows
    a, b = np.divmod(np.flatnonzero(product.take(rows, axis=0) >= lowest), len(y))
    return rows[a], b


def as_bytes(rows: NDArray[np.float32], step: float) -> tuple[NDArray[np.int8], float]:
    """Rows ``[n, k]`` in multiples of ``step``, zeros behind them, and by how much the worst is off (a length)."""
    n, k = rows.shape
    coarse = np.zeros((n, -(-k // WIDTH) * WIDTH), np.int8)
    off = 0.0
    for start in range(0, n, 8192):
        some = rows[start : start + 8192]
        whole = np.rint(some / np.float32(step)).clip(-127, 127)
        coarse[start : start + len(some), :k] = whole
        missed = some.astype(np.float64) - whole * step
        off = max(off, float(np.einsum("nd,nd->n", missed, missed).max(initial=0)) ** 0.5)
    return coarse, off


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Around products on threads of one's own; torch has as many threads as before behind it."""
    before = sys.modules["torch"].get_num_threads() if "torch" in sys.modules else None
    try:
        yield
    finally:
        if before is not None:
            sys.modules["torch"].set_num_threads(before)


def _seconds(product: object) -> float:
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        product()  # type: ignore[operator]
        best = min(best, time.perf_counter() - start)
    return best
