"""Centroids of a spherical k-means, on all cores: to the last bit those of faiss's ``Kmeans`` on one thread.

faiss's own threads add up in another order each time. Here rows are held against the centroids in faiss's own blocks,
each on one thread, and each centroid is the sum of its rows in their order: neither depends on the number of threads.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from curate.neighbors.verify import unit_rows

Floats = NDArray[np.float32]

_TRAINING_ROWS = 48  # per cell
_ITERATIONS = 8
_SEARCHED = 1 << 14  # rows that are searched for at a time: whole blocks of faiss's, who takes fewer another way
_SUMMED = 256  # centroids that are summed up at a time
_SPLIT_SEED = 1234  # of faiss's choice of cells to split
_SPLIT_DRAWS = 1024  # random numbers at a time
_SPLIT = np.float32(1 / 1024)  # by which the two halves of a cell differ


def train_centroids(embeddings: NDArray, cells: int, seed: int, pool: ThreadPoolExecutor) -> Floats:
    """``[cells, d]`` unit centroids over sampled rows: 48 a cell, eight iterations.

    Memory: the sampled rows in float32.

    Args:
        embeddings: ``[n, d]`` of any float type; may be a memory map.
        cells: at most n.
        seed: of the sample and the first centroids.
        pool: the threads.
    """
    import faiss

    n = len(embeddings)
    sampled = np.sort(np.random.default_rng(seed).choice(n, min(n, cells * _TRAINING_ROWS), replace=False))
    rows = unit_rows(embeddings, sampled)
    if cells >= len(rows):
        return rows
    threads = faiss.omp_get_max_threads()
    # Those of the pool see to one each; the limit holds for faiss's BLAS, which is loaded by now.
    with threadpool_limits(1, user_api="blas"):
        try:
            faiss.omp_set_num_threads(1)
            return spherical_kmeans(rows, cells, _ITERATIONS, seed + 1, pool)
        finally:
            faiss.omp_set_num_threads(threads)


def spherical_kmeans(rows: Floats, cells: int, iterations: int, seed: int, pool: ThreadPoolExecutor) -> Floats:
    """``[cells, d]``: Lloyd's iterations over unit rows ``[n, d]``, n > cells, from ``cells`` of them."""
    import faiss

    drawn = np.empty(len(rows), np.int32)
    faiss.rand_perm(faiss.swig_ptr(drawn), len(rows), seed + 1)  # type: ignore[attr-defined]
    centroids = np.ascontiguousarray(rows[drawn[:cells]])
    faiss.normalize_L2(centroids)
    for _ in range(iterations):
        nearest = _nearest(rows, centroids, pool)
        sizes = np.bincount(nearest, minlength=cells).astype(np.float32)
        centroids = _sums(rows, nearest, sizes, pool)
        full = sizes > 0
        centroids[full] *= (np.float32(1) / sizes[full])[:, None]
        split_cells(centroids, sizes, len(rows))
        faiss.normalize_L2(centroids)
    return centroids


def _nearest(rows: Floats, centroids: Floats, pool: ThreadPoolExecutor) -> NDArray[np.int64]:
    """``[n]``: the nearest centroid of each row."""
    import faiss

    index = faiss.IndexFlatIP(rows.shape[1])
    index.add(centroids)

    def search(start: int, stop: int) -> NDArray[np.int64]:
        faiss.omp_set_num_threads(1)  # which holds for the thread that says it
        return np.asarray(index.search(rows[start:stop], 1)[1][:, 0])

    starts = range(0, max(1, len(rows) // _SEARCHED) * _SEARCHED, _SEARCHED)
    return np.concatenate(list(pool.map(search, starts, [*starts[1:], len(rows)])))


def _sums(rows: Floats, nearest: NDArray[np.int64], sizes: Floats, pool: ThreadPoolExecutor) -> Floats:
    """``[cells, d]``: the sum of the rows of each cell, one after the other (a product with a sparse row does so)."""
    from scipy.sparse import csr_array

    cells, order = len(sizes), np.argsort(nearest, kind="stable")
    bounds = np.concatenate([[0], np.cumsum(sizes.astype(np.int64))])

    def add(first: int) -> Floats:
        within = bounds[first : first + _SUMMED + 1]
        some = order[within[0] : within[-1]]
        ones = np.ones(len(some), np.float32)
        return np.asarray(csr_array((ones, some, within - within[0]), shape=(len(within) - 1, len(rows))) @ rows)

    return np.concatenate(list(pool.map(add, range(0, cells, _SUMMED))))


def split_cells(centroids: Floats, sizes: Floats, n: int) -> int:
    """Give each cell without rows one half of another cell, in place; as faiss's ``split_clusters`` does.

    From the first cell on, one of s rows is taken with the probability ``(s - 1) / (n - cells)``.

    Args:
        centroids: ``[cells, d]``.
        sizes: ``[cells]``, the rows of each, n in all.
        n: rows.

    Returns:
        How many cells had none.
    """
    empty = np.flatnonzero(sizes == 0)
    cells, generator = len(sizes), np.random.RandomState(_SPLIT_SEED)
    draws = np.empty(0, np.float32)
    more = np.array([1 + _SPLIT, 1 - _SPLIT], np.float32)[np.arange(centroids.shape[1]) % 2]
    less = np.array([1 - _SPLIT, 1 + _SPLIT], np.float32)[np.arange(centroids.shape[1]) % 2]
    for cell in empty.tolist():
        first, taken = 0, -1
        while taken < 0:
            if not len(draws):
                whole = generator.randint(0, 1 << 32, _SPLIT_DRAWS, np.uint32)
                draws = whole.astype(np.float32) / np.float32((1 << 32) - 1)
            some = (first + np.arange(len(draws))) % cells
            chance = ((sizes[some].astype(np.float64) - 1) / np.float64(np.float32(n - cells))).astype(np.float32)
            hits = np.flatnonzero(draws < chance)
            used = int(hits[0]) + 1 if len(hits) else len(draws)
            taken = int(some[hits[0]]) if len(hits) else -1
            first, draws = first + used, draws[used:]
        centroids[cell] = centroids[taken] * more
        centroids[taken] *= less
        sizes[cell] = sizes[taken] / 2
        sizes[taken] -= sizes[cell]
    return len(empty)
