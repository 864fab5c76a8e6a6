"""The near-duplicate join: all pairs of embeddings whose cosine reaches a threshold.

By hand, since libraries compare everything with everything (faiss's exact search takes about twenty times as long and
more memory, ``benchmarks/join.py``) or lose pairs (its other indexes, MinHash). Exact by construction, at a fraction of
brute force's work:

1. *Screen* (:mod:`curate.neighbors.screen`). Short rows, whose products are no smaller than the cosines, rule out
   nearly all pairs (BLAS does the work).
2. *Blocks.* They are sorted into small boxes. A near pair is at most ``√(2 (1 − threshold))`` apart, so a row farther
   than that from a block's box is not compared with the block.
3. *Verify* (:mod:`curate.neighbors.verify`). What is left is compared in float32, and what that cannot rule out is
   decided in float64, both from the rows as they were given.

A row with very many near rows stands in a *crowd* (a placeholder image in ten thousand encodings). Pairs inside a
crowd grow with the square of its size and tell nothing new, so they can be left out and asked for where a decision
needs them: what is found then grows with the number of rows alone.

Where memory is short, the screen is made of one *slab* of the rows after the other; each is compared with itself and
with what comes after it.

Every bound has room for float32's rounding in any order of summation. So the pairs, and their similarities to
the last bit, depend neither on the blocks, nor on the threads, nor on the BLAS.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from threading import Lock
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from curate.neighbors.coarse import one_thread_each
from curate.neighbors.screen import Screen, ShortRows, screening_axes
from curate.neighbors.verify import Crowd, Pairs, surely_near, verified

if TYPE_CHECKING:
    from afresh.progress import Progress


BLOCK = 256  # rows of a block: small boxes rule out more, large ones keep the BLAS busy
_TOGETHER = 1 << 13  # candidates verified together, unless a tile has more
_DENSE = 1 << 15  # candidates of one tile above which a product of whole rows is cheaper than verifying each
_HELD = 1 << 20  # pairs that are held before those inside crowds are looked for among them


def find_pairs(
    embeddings: NDArray,
    threshold: float,
    *,
    crowd: int | None = None,
    memory: int | None = None,
    block: int = BLOCK,
    threads: int = 0,
    bar: Progress | None = None,
) -> Pairs:
    """All pairs of rows with cosine ≥ ``threshold``.

    Memory beside the result: about ``4 (k + 20)`` bytes a row, where k, the length of the screen, is chosen by
    the data (often 20 to 50), or ``memory``, and a few megabytes a thread; ``embeddings`` is read in pieces and may be
    a memory map. Time grows with n², by a small constant; for sets that are too large for that see
    :mod:`curate.neighbors.cells`.

    Args:
        embeddings: ``[n, d]`` float16, float32 or float64; any length of rows, zero rows are near to nothing.
        threshold: cosine in (0, 1]; a pair whose cosine, rounded to float32, equals it counts.
        crowd: a row with more near rows than this is crowded, and pairs of two crowded rows are left out: what is
            found is then at most ``crowd`` pairs a row, however large a group of copies is. None finds all pairs.
        memory: bytes that the screen may take; if it needs more, it is made slab by slab, at the cost of reading the
            embeddings once a slab. The result is the same.
        block: rows of a block.
        threads: that compare blocks; 0 takes the CPU cores at hand. The result is the same.
        bar: told of the pairs that are done, ``n (n + 1) / 2`` in all, each row with itself counted.

    Raises:
        ValueError: a bad argument, or a row that is not finite (named).
    """
    check_arguments(embeddings, threshold)
    if block < 1:
        raise ValueError(f"block must be at least 1, not {block}")
    if threads < 0:
        raise ValueError(f"threads must be 0 or more, not {threads}")
    if memory is not None and memory < 1:
        raise ValueError(f"memory must be at least 1 byte, not {memory}")
    if len(embeddings) == 0:
        return Pairs.empty()
    with one_blas_thread(), ThreadPoolExecutor(threads or cores()) as pool:
        return join_blocks(embeddings, threshold, crowd, block, pool.map, bar, memory)


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """One BLAS thread in each of our own, so that the comparisons between products run side by side, too."""
    with threadpool_limits(1, user_api="blas"), one_thread_each():
        yield


def join_blocks(
    embeddings: NDArray,
    threshold: float,
    crowd: int | None,
    block: int,
    run: Callable[..., Iterable[list[Pairs]]],
    bar: Progress | None = None,
    memory: int | None = None,
    axes: NDArray[np.float32] | None = None,
) -> Pairs:
    """The exact join of checked arguments; ``run`` maps a function over the blocks, as ``map`` or a pool's ``map``.

    ``axes`` of a larger set do for many small ones; which they are changes no pair.
    """
    n = len(embeddings)
    axes = screening_axes(embeddings, threshold) if axes is None else axes
    slab = rows_of_a_slab(n, axes, block, memory)
    slabs = [(first, min(first + slab, n), True) for first in range(0, n, slab)]
    return _join_slabs(embeddings, axes, slabs, threshold, crowd, block, run, bar)


def join_with(
    embeddings: NDArray,
    first: int,
    threshold: float,
    crowd: int | None,
    block: int,
    run: Callable[..., Iterable[list[Pairs]]],
    axes: NDArray[np.float32] | None = None,
) -> Pairs:
    """Likewise, of the first rows with the others alone."""
    axes = screening_axes(embeddings, threshold) if axes is None else axes
    return _join_slabs(embeddings, axes, [(0, first, False)], threshold, crowd, block, run)


def _join_slabs(
    embeddings: NDArray,
    axes: NDArray[np.float32],
    slabs: Sequence[tuple[int, int, bool]],
    threshold: float,
    crowd: int | None,
    block: int,
    run: Callable[..., Iterable[list[Pairs]]],
    bar: Progress | None = None,
) -> Pairs:
    """The rows ``first … last`` of each slab with what comes after it and, if it says so, with each other."""
    n = len(embeddings)
    tally, found, held, most = _Crowding(n, crowd), [Pairs.empty()], 0, _HELD

    def near(screen: Screen, others: ShortRows, block: tuple[int, int]) -> list[Pairs]:
        candidates = gathered(screen.candidates(*block, others, tally.crowded))
        return [pairs for i, j in candidates for pairs in _decided(embeddings, i, j, threshold, tally)]

    for first, last, itself in slabs:
        screen = Screen.of(embeddings, axes, threshold, block, first, last)
        for some in itertools.chain([screen.rows] if itself else [], screen.turned(embeddings, last)):
            blocks = screen.blocks()
            for (start, stop), pairs in zip(blocks, run(partial(near, screen, some), blocks), strict=True):
                found += pairs
                held += sum(map(len, pairs))
                if held > most:  # what was found before its rows were known to be crowded
                    found = [outside(found, tally.crowded)]
                    held, most = len(found[0]), 2 * len(found[0]) + _HELD
                if bar is not None:
                    inside = some is screen.rows  # then each pair stands there once
                    bar.update((stop - start) * (len(some) - ((start + stop - 1) / 2 if inside else 0)))
    return assembled(embeddings, found, tally.crowded, threshold)


def rows_of_a_slab(n: int, axes: NDArray[np.float32], block: int, memory: int | None) -> int:
    """How many of n rows a screen is made of at a time."""
    return n if memory is None else min(n, max(block, memory // Screen.bytes_a_row(axes.shape[1])))


def gathered(
    candidates: Iterable[tuple[NDArray[np.int64], NDArray[np.int64]]],
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """The same candidates in larger lots, since a tile often has a few only."""
    waiting: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    number = 0
    for some in candidates:
        if len(some[0]) > _TOGETHER:
            yield some
            continue
        waiting.append(some)
        number += len(some[0])
        if number > _TOGETHER:
            yield _joined(waiting)
            waiting, number = [], 0
    if waiting:
        yield _joined(waiting)


def _joined(some: Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    return np.concatenate([i for i, _ in some]), np.concatenate([j for _, j in some])


def _decided(
    embeddings: NDArray, i: NDArray[np.int64], j: NDArray[np.int64], threshold: float, tally: _Crowding
) -> Iterator[Pairs]:
    """The near ones of some candidates; they are counted."""
    if tally.limit is not None and len(i) > _DENSE:
        sure = surely_near(embeddings, i, j, threshold)
        tally.add(i[sure], j[sure])
        both = tally.crowded[i] & tally.crowded[j]
        yield verified(embeddings, i[sure & ~both], j[sure & ~both], threshold)
        i, j = i[~sure & ~both], j[~sure & ~both]
    pairs = verified(embeddings, i, j, threshold)
    tally.add(pairs.i, pairs.j)
    yield pairs


def assembled(embeddings: NDArray, found: Sequence[Pairs], crowded: NDArray[np.bool_], threshold: float) -> Pairs:
    """Pairs that were found here and there, in order, each once, without those inside the crowd."""
    pairs, rows = once(outside(found, crowded)), np.flatnonzero(crowded)
    left_out = Crowd(embeddings, rows, rows, threshold) if len(rows) else None
    return Pairs(pairs.i, pairs.j, pairs.similarity, left_out)


def once(pairs: Pairs) -> Pairs:
    """The pairs in order, each once. Not by ``i · n + j``, which leaves int64 at three billion rows."""
    order = np.lexsort((pairs.j, pairs.i))
    i, j = pairs.i[order], pairs.j[order]
    fresh = np.ones(len(order), bool)
    fresh[1:] = (i[1:] != i[:-1]) | (j[1:] != j[:-1])
    return Pairs(i[fresh], j[fresh], pairs.similarity[order[fresh]])


def outside(found: Sequence[Pairs], crowded: NDArray[np.bool_]) -> Pairs:
    """The pairs but those of two crowded rows: whether such rows were compared before both were known to be crowded is
    a matter of chance.
    """
    some = (np.flatnonzero(~(crowded[pairs.i] & crowded[pairs.j])) for pairs in found)
    return concatenated(
        [Pairs(of.i[at], of.j[at], of.similarity[at]) for of, at in zip(found, some, strict=True)]
    )


class _Crowding:
    """Counts near rows. A row is crowded in the end exactly if it has more than ``limit`` of them: pairs are passed
    over only between rows that are crowded already.
    """

    def __init__(self, n: int, limit: int | None):
        self.limit, self.crowded = limit, np.zeros(n, bool)
        self._near, self._lock = np.zeros(n if limit is not None else 0, np.int64), Lock()

    def add(self, i: NDArray[np.int64], j: NDArray[np.int64]) -> None:
        """Count new near pairs."""
        if self.limit is None or not len(i):
            return
        with self._lock:
            for rows in (i, j):
                np.add.at(self._near, rows, 1)
            for rows in (i, j):
                self.crowded[rows] = self._near[rows] > self.limit


def concatenated(some: Sequence[Pairs]) -> Pairs:
    """Pairs that were found here and there, one after the other; crowds are not carried along."""
    i, j = np.concatenate([pairs.i for pairs in some]), np.concatenate([pairs.j for pairs in some])
    return Pairs(i, j, np.concatenate([pairs.similarity for pairs in some]))


def cores() -> int:
    from afresh.cores import cpu_count

    return cpu_count()


def check_arguments(embeddings: NDArray, threshold: float) -> None:
    """Raise ``ValueError`` for what is no set of embeddings, or no threshold."""
    if embeddings.ndim != 2 or not np.issubdtype(embeddings.dtype, np.floating):
        raise ValueError(f"embeddings must be floating [n, d], not {embeddings.dtype} {list(embeddings.shape)}")
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold must be a cosine in (0, 1], not {threshold}")

