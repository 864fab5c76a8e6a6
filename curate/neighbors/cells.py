"""The near-duplicate join for sets that are too large for the exact one: only rows that share a cell are compared.

As in SemDeDup (Abbas et al., 2023, arXiv 2303.09540) cells are those of a k-means, but none of its losses is silent:

- a pair on both sides of a border is not lost: each row stands in its ``probes`` nearest cells, and two rows are
  compared if any of their cells is the same;
- more ``clusterings`` find what one has parted;
- inside a cell the join is the exact one, however large the cell is;
- what is lost is measured: :func:`curate.neighbors.recall.recall` compares sampled rows with all others.

The result depends on the seed, not on the number of threads: centroids are those of one thread
(:mod:`curate.neighbors.kmeans`), and rows are assigned in blocks of a fixed size. :mod:`curate.neighbors.tiles` does
the same in pieces, for rows that lie on the disks of several machines.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from curate.neighbors.join import BLOCK, assembled, check_arguments, cores, join_blocks, one_blas_thread
from curate.neighbors.kmeans import train_centroids
from curate.neighbors.screen import screening_axes
from curate.neighbors.verify import Pairs, unit_rows

if TYPE_CHECKING:
    from afresh.progress import Progress


PROBES = 3
CLUSTERINGS = 1
CELL_ROWS = 1024  # rows a cell has on average, before probes: small cells mean little work, and more borders
_MOST_CELLS = 65_536
_ASSIGNED = 8192  # rows assigned at a time, where there are few cells
_ASSIGNED_ELEMENTS = 1 << 24  # cosines of rows with centroids that a thread holds: 64 MB


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
    cells = number_of_cells(n, cells)
    found, crowded = [Pairs.empty()], np.zeros(n, bool)

    def join(members: NDArray[np.int64]) -> Pairs:
        return join_blocks(embeddings[members], threshold, crowd, BLOCK, map, axes=axes).renumbered(members)

    with one_blas_thread(), ThreadPoolExecutor(threads or cores()) as pool:
        # Axes of each cell would cost as much as what they save.
        axes = screening_axes(embeddings, threshold, rows_of_a_cell(n, cells, probes))
        for clustering in range(clusterings):
            centroids = train_centroids(embeddings, cells, seed + clustering, pool)
            nearest = assign(embeddings, centroids, min(probes, len(centroids)), pool)
            for pairs in pool.map(join, members_of(nearest, len(centroids))):
                found.append(pairs)
                if pairs.crowd is not None:
                    crowded[pairs.crowd.rows] = True
                if bar is not None:
                    bar.update(n * (n + 1) / 2 / (len(centroids) * clusterings))
    return assembled(embeddings, found, crowded, threshold)


def number_of_cells(n: int, cells: int = 0) -> int:
    """How many cells n rows have, where so many are asked for; 0 leaves it to their number."""
    return min(cells or max(1, n // CELL_ROWS), _MOST_CELLS, n)


def rows_of_a_cell(n: int, cells: int, probes: int) -> int:
    """How many of n rows a cell has on average."""
    return n * min(probes, cells) // cells


def assign(
    embeddings: NDArray, centroids: NDArray[np.float32], probes: int, pool: ThreadPoolExecutor
) -> NDArray[np.int32]:
    """``[n, probes]``: the nearest centroids of each row."""
    step = assigned_together(len(centroids))

    def nearest(start: int) -> NDArray[np.int32]:
        return nearest_cells(unit_rows(embeddings, slice(start, start + step)), centroids, probes)

    return np.concatenate(list(pool.map(nearest, range(0, len(embeddings), step))))


def assigned_together(cells: int) -> int:
    """How many rows are assigned at a time, from a multiple of it on. By the number of cells alone: products of other
    shapes may round otherwise.
    """
    return max(1, min(_ASSIGNED, _ASSIGNED_ELEMENTS // cells))


def nearest_cells(unit: NDArray[np.float32], centroids: NDArray[np.float32], probes: int) -> NDArray[np.int32]:
    """``[m, probes]``: the nearest centroids of each unit row, of equally near ones the first."""
    if probes >= len(centroids):
        every = np.arange(len(centroids), dtype=np.int32)
        return np.broadcast_to(every, (len(unit), len(centroids)))
    cosine, every_row = unit @ centroids.T, np.arange(len(unit))
    nearest = np.empty((len(unit), probes), np.int32)
    for probe in range(probes):  # for some of many a tenth of the time of a partition
        nearest[:, probe] = cosine.argmax(axis=1)
        cosine[every_row, nearest[:, probe]] = -np.inf
    return nearest


def by_cell(nearest: NDArray[np.int32], cells: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The rows that stand in each cell, ascending, one cell after the other, and where each starts: ``[cells + 1]``."""
    flat = nearest.ravel()
    order = np.argsort(flat, kind="stable")
    bounds = np.searchsorted(flat[order], np.arange(cells + 1))
    order //= nearest.shape[1]
    return order, bounds


def members_of(nearest: NDArray[np.int32], cells: int) -> Iterator[NDArray[np.int64]]:
    """The rows that stand in each cell, ascending; cells with fewer than two are left out."""
    rows, bounds = by_cell(nearest, cells)
    for start, stop in itertools.pairwise(bounds.tolist()):
        if stop - start > 1:
            yield rows[start:stop]
