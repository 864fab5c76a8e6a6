"""The nearest rows of some queries, by comparing each with all: for samples, which judge what the join does faster.

One loop for whoever asks. An index that is searched at every step of a sampler keeps its rows on a device, and has a
loop of its own (``curate/index/training_index.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


def nearest(
    queries: Floats,
    blocks: Iterable[tuple[int, Floats]],
    k: int = 1,
    *,
    hide: Callable[[int, Floats], None] | None = None,
) -> tuple[Floats, NDArray[np.int64]]:
    """The ``k`` rows with the highest inner product with each query; of equals the earlier row first.

    Args:
        queries: ``[m, d]``.
        blocks: number of its first row, and rows ``[n, d]``, from the first block on; see :func:`in_blocks`.
        k: how many; fewer are given where there are fewer rows.
        hide: ``(number of the first row, products [m, n])``, sets what does not count to ``-inf`` in place: a query
            itself, or its copies.

    Returns:
        ``(product [m, k], row [m, k])``, highest first.
    """
    best, rows = np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
    for start, block in blocks:
        products = queries @ block.T
        if hide is not None:
            hide(start, products)
        if k == 1:
            column = products.argmax(axis=1)[:, None]
        else:
            column = np.argsort(-products, axis=1, kind="stable")[:, :k]
        best = np.concatenate([best, np.take_along_axis(products, column, 1)], axis=1)
        rows = np.concatenate([rows, column + start], axis=1)
        order = np.argsort(-best, axis=1, kind="stable")[:, :k]  # earlier blocks stand before
        best, rows = np.take_along_axis(best, order, 1), np.take_along_axis(rows, order, 1)
    return best, rows


def in_blocks(embeddings: NDArray, size: int) -> Iterator[tuple[int, Floats]]:
    """Rows ``[n, d]`` of any float type, ``size`` at a time in float32, each with the number of its first."""
    for start in range(0, len(embeddings), size):
        yield start, embeddings[start : start + size].astype(np.float32)
