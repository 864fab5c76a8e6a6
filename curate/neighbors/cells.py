"""The near-duplicate join for sets that are too large for the exact one: only rows that share a cell are compared.

As in SemDeDup (Abbas et al., 2023, arXiv 2303.09540) cells are those of a k-means, but none of its losses is silent:

- a pair on both sides of a border is not lost: each row stands in its ``probes`` nearest cells, and two rows are
  compared if any of their cells is the same;
- more ``clusterings`` find what one has parted;
- inside a cell the join is the exact one, however large the cell is;
- what is lost is measured: :func:`curate.neighbors.recall.recall` compares sampled rows with all others.

The result depends on the seed, not on the number of threads: centroids are trained on one thread, and rows are
assigned in blocks of a fixed size.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from curate.neighbors.join import BLOCK, assembled, check_arguments, cores, join_blocks, one_blas_thread
from curate.neighbors.verify import Pairs, unit_rows

if TYPE_CHECKING:
    from afresh.progress import Progress


PROBES = 3
CLUSTERINGS = 1
CELL_ROWS = 1024  # rows a cell has on average, before probes: small cells mean little work, and more borders
_MOST_CELLS = 65_536
_TRAINING_ROWS = 48  # per cell
_ITERATIONS = 8
_ASSIGNED = 8192  # rows assigned at a time, where there are few cells
_ASSIGNED_ELEMENTS = 1 << 24  # cosines of rows with centroids that a thread holds: 64 MB; their order takes 128 MB


def find_pairs_in_cells(
    embeddings: NDArray,
    threshold: float,
    *,
    cells: int = 0,
    probes: int = PROBES,
    clusterings: int = CLUSTERINGS,
    crowd: int | None = None,
    threads: int = 0,
    seed: int = 0,
    bar: Progress | None = None,
) -> Pairs:
    """Near pairs of rows that share a cell.

    Memory beside the result: the cells of each row, ``4 probes`` bytes, and ``threads`` cells of embeddings. Work
    grows with n times the rows of a cell.

    Args:
        embeddings: ``[n, d]`` float16, float32 or float64, as for :func:`curate.neighbors.find_pairs`.
        threshold: cosine in (0, 1].
        cells: of each clustering; 0 takes one for every ``CELL_ROWS`` rows.
        probes: nearest cells that each row stands in.
        clusterings: clusterings, each with other centroids.
        crowd: see :func:`curate.neighbors.find_pairs`; near rows are counted within a cell.
        threads: that compare cells; 0 takes the CPU cores at hand. The result is the same.
        seed: of the centroids.
        bar: told of the pairs that are done, ``n (n + 1) / 2`` in all, in equal parts for each cell.

    Raises:
        ValueError: a bad argument, or a row that is not finite (named).
    """
    check_arguments(embeddings, threshold)
    for name, value in (("probes", probes), ("clusterings", clusterings)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    if cells < 0:
        raise ValueError(f"cells must be 0 or more, not {cells}")
    n = len(embeddings)
    if n == 0:
        return Pairs.empty()
    cells = min(cells or max(1, n // CELL_ROWS), _MOST_CELLS, n)
    found, crowded = [Pairs.empty()], np.zeros(n, bool)

    def join(members: NDArray[np.int64]) -> Pairs:
        return join_blocks(embeddings[members], threshold, crowd, BLOCK, map).renumbered(members)

    with one_blas_thread(), ThreadPoolExecutor(threads or cores()) as pool:
        for clustering in range(clusterings):
            centroids = train_centroids(embeddings, cells, seed + clustering)
            nearest = assign(embeddings, centroids, min(probes, len(centroids)), pool)
            for pairs in pool.map(join, members_of(nearest, len(centroids))):
                found.append(pairs)
                if pairs.crowd is not None:
                    crowded[pairs.crowd.rows] = True
                if bar is not None:
                    bar.update(n * (n + 1) / 2 / (len(centroids) * clusterings))
    return assembled(embeddings, found, crowded, threshold)


def train_centroids(embeddings: NDArray, cells: int, seed: int) -> NDArray[np.float32]:
    """``[cells, d]`` unit centroids of a spherical k-means over sampled rows."""
    import faiss

    n, d = embeddings.shape
    sampled = np.sort(np.random.default_rng(seed).choice(n, min(n, cells * _TRAINING_ROWS), replace=False))
    rows = unit_rows(embeddings, sampled)
    if cells >= len(rows):
        return rows
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)  # sums over several threads differ in their last bits
    try:
        kmeans = faiss.Kmeans(
            d, cells, niter=_ITERATIONS, spherical=True, seed=seed + 1, min_points_per_centroid=1,
            max_points_per_centroid=_TRAINING_ROWS,
        )  # fmt: skip
        kmeans.train(rows)
    finally:
        faiss.omp_set_num_threads(threads)
    return np.asarray(kmeans.centroids)


def assign(
    embeddings: NDArray, centroids: NDArray[np.float32], probes: int, pool: ThreadPoolExecutor
) -> NDArray[np.int32]:
    """``[n, probes]``: the nearest centroids of each row, in no order."""
    # By the number of cells alone: products of other shapes may round otherwise.
    step = max(1, min(_ASSIGNED, _ASSIGNED_ELEMENTS // len(centroids)))

    def nearest(start: int) -> NDArray[np.int32]:
        rows = unit_rows(embeddings, slice(start, min(start + step, len(embeddings))))
        if probes == len(centroids):
            return np.broadcast_to(np.arange(probes, dtype=np.int32), (len(rows), probes))
        return np.argpartition(rows @ centroids.T, -probes, axis=1)[:, -probes:].astype(np.int32)

    return np.concatenate(list(pool.map(nearest, range(0, len(embeddings), step))))


def members_of(nearest: NDArray[np.int32], cells: int) -> Iterator[NDArray[np.int64]]:
    """The rows that stand in each cell, ascending; cells with fewer than two are left out."""
    flat = nearest.ravel()
    order = np.argsort(flat, kind="stable")
    bounds = np.searchsorted(flat[order], np.arange(cells + 1))
    for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        if stop - start > 1:
            yield order[start:stop] // nearest.shape[1]

