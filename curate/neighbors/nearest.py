"""The nearest known row of each query, where one is near: the join of one set with another."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from curate.neighbors.join import BLOCK, check_arguments, concatenated, cores, gathered, one_blas_thread, rows_of_a_slab
from curate.neighbors.screen import Screen, ShortRows, screening_axes
from curate.neighbors.verify import Pairs, verified


def find_nearest(
    queries: NDArray,
    known: NDArray,
    threshold: float,
    *,
    memory: int | None = None,
    block: int = BLOCK,
    threads: int = 0,
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The nearest known row of each query, where one is near: the join of one set with another, exact like the join.

    Args:
        queries: ``[m, d]``, as ``known``.
        known: ``[n, d]`` float16, float32 or float64; may be a memory map.
        threshold: cosine in (0, 1].
        memory: as in :func:`~curate.neighbors.find_pairs`; of the screen of the known rows.
        block: known rows compared at a time.
        threads: that compare blocks; 0 takes the CPU cores at hand. The result is the same.

    Returns:
        ``(row [m] int64, cosine [m] float32)``; row -1 and NaN where no known row is near. Of equally near rows the
        first.

    Raises:
        ValueError: a bad argument, or a row that is not finite (named).
    """
    for embeddings in (queries, known):
        check_arguments(embeddings, threshold)
    if queries.shape[1] != known.shape[1]:
        raise ValueError(f"queries have {queries.shape[1]} dimensions, known rows {known.shape[1]}")
    row, cosine = np.full(len(queries), -1, np.int64), np.full(len(queries), np.nan, np.float32)
    if len(known) == 0:
        return row, cosine
    with one_blas_thread(), ThreadPoolExecutor(threads or cores()) as pool:
        axes = screening_axes(known, threshold)
        slab = rows_of_a_slab(len(known), axes, block, memory)
        for first in range(0, len(known), slab):
            screen = Screen.of(known, axes, threshold, block, first, min(first + slab, len(known)))
            for asked in screen.turned(queries, 0):
                pairs = _near_known(pool, screen, queries, known, threshold, asked)
                best = np.lexsort((pairs.j, -pairs.similarity, pairs.i))
                best = best[np.unique(pairs.i[best], return_index=True)[1]]
                best = best[~(pairs.similarity[best] <= cosine[pairs.i[best]])]  # than what earlier slabs hold, or NaN
                row[pairs.i[best]], cosine[pairs.i[best]] = pairs.j[best], pairs.similarity[best]
    return row, cosine


def _near_known(
    pool: ThreadPoolExecutor, screen: Screen, queries: NDArray, known: NDArray, threshold: float, asked: ShortRows
) -> Pairs:
    """Pairs of a query, one of ``asked``, and a known row."""

    def near(block: tuple[int, int]) -> list[Pairs]:
        compared = ((asked.numbers[a], screen.rows.numbers[b]) for a, b in screen.compare(*block, asked))
        return [verified(queries, i, j, threshold, known) for i, j in gathered(compared)]

    return concatenated([Pairs.empty(), *(pairs for some in pool.map(near, screen.blocks()) for pairs in some)])

