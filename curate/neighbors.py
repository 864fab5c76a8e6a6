"""The near-duplicate join: all pairs of embeddings whose cosine reaches a threshold.

Exact by construction, at a fraction of brute force's work:

1. *Screen.* Rows are made unit rows and turned onto the set's principal axes. With ``x₁`` the first k coordinates
   of a row and ``x₂`` the others, ``x·y ≤ x₁·y₁ + ‖x₂‖‖y₂‖`` (Cauchy–Schwarz). So the k + 1 numbers
   ``(x₁, ‖x₂‖)`` of each row rule out nearly all pairs by a product of short rows (BLAS does the work).
2. *Blocks.* Rows are sorted into small boxes by a k-d tree on the first axes. A near pair is at most
   ``√(2 (1 − threshold))`` apart, so a row farther than that from a block's box is not compared with the block.
3. *Verify.* What is left is compared in float32, and what that cannot rule out is decided in float64, both from the
   rows as they were given.

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
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

if TYPE_CHECKING:
    from curate.console import Progress

BLOCK = 256  # rows of a block: small boxes rule out more, large ones keep the BLAS busy
_TILE = 1024  # rows compared with a block at a time: 1 MB of products
_SAMPLE = 4096  # rows that the axes are taken from
_SMALL = 2048  # fewer rows are compared as they are: finding axes would cost more than it saves
_BOXED = 1 << 14  # rows compared with a box at a time: what is compared stays in the cache
_BOX_AXES = 4  # axes that blocks are boxes of
_TOGETHER = 1 << 13  # candidates verified together, unless a tile has more
_DENSE = 1 << 15  # candidates of one tile above which a product of whole rows is cheaper than verifying each
_VERIFY_COST = 100_000  # verifying one pair costs about as much as screening this many by one coordinate
_VERIFY_ELEMENTS = 1 << 17  # elements of each side that are verified at a time: 1 MB in float64
_HELD = 1 << 20  # pairs that are held before those inside crowds are looked for among them
_QUERIES = 1 << 14  # rows compared with a screen that they are no part of, at a time
_CROWD_ELEMENTS = 1 << 22  # products of crowded rows that are looked at at a time
_SIGN_AND_NUMBER = np.array(0x8FFFE000, np.uint32).view(np.int32)  # of a float16 whose bits stand 13 places up
_SEARCH_ELEMENTS = 1 << 22  # float32 elements that are compared with the sampled rows at a time: 16 MB


@dataclass(frozen=True)
class Pairs:
    """Near pairs: ``i < j``, sorted by ``(i, j)``, each once.

    Attributes:
        i, j: int64 ``[m]``, rows.
        similarity: float32 ``[m]``, their cosine.
        crowd: the rows between which pairs were left out, if any.
    """

    i: NDArray[np.int64]
    j: NDArray[np.int64]
    similarity: NDArray[np.float32]
    crowd: Crowd | None = None

    def __len__(self) -> int:
        return len(self.i)

    @classmethod
    def empty(cls) -> Pairs:
        """No pairs."""
        return cls(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))

    def at_least(self, threshold: float) -> Pairs:
        """The pairs whose cosine reaches a threshold, no lower than the join's."""
        near = self.similarity >= np.float32(threshold)
        crowd = None if self.crowd is None else self.crowd.at_least(threshold)
        return Pairs(self.i[near], self.j[near], self.similarity[near], crowd)

    def renumbered(self, numbers: NDArray[np.int64]) -> Pairs:
        """The same pairs with row r called ``numbers[r]``; ``numbers`` must increase."""
        crowd = None if self.crowd is None else self.crowd.renumbered(numbers)
        return Pairs(numbers[self.i], numbers[self.j], self.similarity, crowd)


class Crowd:
    """Rows that have very many near rows, and which of them are near each other, asked for one by one.

    Args:
        embeddings: ``[n, d]``, which are kept, not copied.
        places: int64 ``[m]``, increasing, the crowded ones among them.
        rows: int64 ``[m]``, increasing, what they are called.
        threshold: the join's.
    """

    def __init__(self, embeddings: NDArray, places: NDArray[np.int64], rows: NDArray[np.int64], threshold: float):
        self.embeddings, self.places, self.rows, self.threshold = embeddings, places, rows, threshold
        self._members = frozenset(rows.tolist())

    def __contains__(self, row: int) -> bool:
        return row in self._members

    def at_least(self, threshold: float) -> Crowd:
        """The same rows with another threshold."""
        return Crowd(self.embeddings, self.places, self.rows, threshold)

    def renumbered(self, numbers: NDArray[np.int64]) -> Crowd:
        """The same crowd with row r called ``numbers[r]``; ``numbers`` must increase."""
        return Crowd(self.embeddings, self.places, numbers[self.rows], self.threshold)

    def near(self, row: int, others: Sequence[int]) -> list[tuple[int, float]]:
        """``(other, cosine)`` of those of ``others``, all in the crowd, that are near ``row``, as the join has it."""
        found = self._near(self._numbers([row] * len(others)), self._numbers(others))
        return list(zip(self.rows[found.j].tolist(), found.similarity.tolist(), strict=True))

    def near_among(self, rows: Sequence[int], others: Sequence[int]) -> Iterator[tuple[int, int, float]]:
        """``(row, other, cosine)`` of what is near among ``rows`` and ``others``, all in the crowd, as the join has it.

        One product compares all with all, which takes a fraction of the time of asking for one after the other.
        """
        i, j = self._numbers(rows), self._numbers(others)
        unit = unit_rows(self.embeddings, self.places[i])
        for some in np.array_split(j, -(-len(i) * len(j) // _CROWD_ELEMENTS) or 1):
            a, b = np.nonzero(unit @ unit_rows(self.embeddings, self.places[some]).T >= self._lowest)
            found = self._near(i[a], some[b])
            yield from zip(
                self.rows[found.i].tolist(), self.rows[found.j].tolist(), found.similarity.tolist(), strict=True
            )

    def links(self) -> Iterator[tuple[int, int]]:
        """Near pairs that connect what all near pairs in the crowd connect, fewer than rows: a spanning forest.

        With θ the angle of the threshold, whatever is near a row in the ball of θ around another one lies within 2θ of
        that one: a ball needs not be compared with what is farther, such as other crowds.
        """
        unit, left = unit_rows(self.embeddings, self.places), np.ones(len(self.rows), bool)
        twice = 2 * max(self._lowest, 0) ** 2 - 1 - (self.threshold - self._lowest)  # cos 2θ, less float32's error
        for first in range(len(left)):
            if not left[first]:
                continue
            left[first] = False
            cosine = unit[first:] @ unit[first]
            ball = first + np.flatnonzero(left[first:] & (cosine >= self._lowest))
            ball = self._near(np.full_like(ball, first), ball).j
            left[ball] = False
            reached, ring = [(first, other) for other in ball.tolist()], first + np.flatnonzero(cosine >= twice)
            while reached:
                yield from ((int(self.rows[one]), int(self.rows[other])) for one, other in reached)
                ring = ring[left[ring]]
                reached = self._reached(unit, np.array([other for _, other in reached], np.int64), ring)
                left[[other for _, other in reached]] = False
                ring = np.flatnonzero(left)  # near what was reached from the ball may be anything

    def _reached(
        self, unit: NDArray[np.float32], numbers: NDArray[np.int64], others: NDArray[np.int64]
    ) -> list[tuple[int, int]]:
        """``(number, other)`` of each of ``others`` that is near some of ``numbers``."""
        links: list[tuple[int, int]] = []
        for start in range(0, len(numbers), _TILE):
            some, missed = numbers[start : start + _TILE], [np.empty(0, np.int64)]
            for tile in np.array_split(others, -(-len(others) // _TILE) or 1):
                product = unit[some] @ unit[tile].T
                # The largest product tells, but where float32's error lets several pass for the largest.
                while len(tile) and len(hopeful := np.flatnonzero(product.max(axis=0) >= self._lowest)):
                    best = product.argmax(axis=0)[hopeful]
                    product[best, hopeful] = -np.inf
                    near = self._near(some[best], tile[hopeful])
                    links += zip(near.i.tolist(), near.j.tolist(), strict=True)
                    missing = ~np.isin(tile, near.j)
                    product, tile = product[:, missing], tile[missing]
                missed.append(tile)
            others = np.concatenate(missed)
        return links

    def _numbers(self, rows: Sequence[int]) -> NDArray[np.int64]:
        """Which crowded ones they are, 0 … m - 1."""
        return np.searchsorted(self.rows, np.asarray(rows, np.int64))

    def _near(self, i: NDArray[np.int64], j: NDArray[np.int64]) -> Pairs:
        """Those of the pairs, by numbers in the crowd, that are near."""
        found = _verified(self.embeddings, self.places[i], self.places[j], self.threshold)
        return Pairs(np.searchsorted(self.places, found.i), np.searchsorted(self.places, found.j), found.similarity)

    @property
    def _lowest(self) -> float:
        return _candidate_threshold(self.threshold, self.embeddings.shape[1])


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
    the data (often 20 to 40), or ``memory``, and a few megabytes a thread; ``embeddings`` is read in pieces and may be
    a memory map. Time grows with n², by a small constant; for sets that are too large for that see
    :mod:`curate.cells`.

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


def one_blas_thread() -> threadpool_limits:
    """One BLAS thread in each of our own, so that the comparisons between products run side by side, too."""
    return threadpool_limits(1, user_api="blas")


def join_blocks(
    embeddings: NDArray,
    threshold: float,
    crowd: int | None,
    block: int,
    run: Callable[..., Iterable[list[Pairs]]],
    bar: Progress | None = None,
    memory: int | None = None,
) -> Pairs:
    """The exact join of checked arguments; ``run`` maps a function over the blocks, as ``map`` or a pool's ``map``."""
    n = len(embeddings)
    axes = _screening_axes(embeddings, threshold)
    slab = _slab(n, axes, block, memory)
    tally, found, held, most = _Crowding(n, crowd), [Pairs.empty()], 0, _HELD

    def near(screen: _Screen, others: _Rows, block: tuple[int, int]) -> list[Pairs]:
        candidates = _gathered(screen.candidates(*block, others, tally.crowded))
        return [pairs for i, j in candidates for pairs in _decided(embeddings, i, j, threshold, tally)]

    for first in range(0, n, slab):
        screen = _Screen.of(embeddings, axes, threshold, block, first, min(first + slab, n))
        for some in itertools.chain([screen.rows], screen.turned(embeddings, first + len(screen.rows))):
            blocks = screen.blocks()
            for (start, stop), pairs in zip(blocks, run(partial(near, screen, some), blocks), strict=True):
                found += pairs
                held += sum(map(len, pairs))
                if held > most:  # what was found before its rows were known to be crowded
                    found = [_outside(found, tally.crowded)]
                    held, most = len(found[0]), 2 * len(found[0]) + _HELD
                if bar is not None:
                    inside = some is screen.rows  # then each pair stands there once
                    bar.update((stop - start) * (len(some) - ((start + stop - 1) / 2 if inside else 0)))
    return assembled(embeddings, found, tally.crowded, threshold)


def _slab(n: int, axes: NDArray[np.float32], block: int, memory: int | None) -> int:
    """How many of n rows a screen is made of at a time."""
    return n if memory is None else min(n, max(block, memory // _Screen.bytes_a_row(axes.shape[1])))


def _gathered(
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
        sure = _surely_near(embeddings, i, j, threshold)
        tally.add(i[sure], j[sure])
        both = tally.crowded[i] & tally.crowded[j]
        yield _verified(embeddings, i[sure & ~both], j[sure & ~both], threshold)
        i, j = i[~sure & ~both], j[~sure & ~both]
    pairs = _verified(embeddings, i, j, threshold)
    tally.add(pairs.i, pairs.j)
    yield pairs


def assembled(embeddings: NDArray, found: Sequence[Pairs], crowded: NDArray[np.bool_], threshold: float) -> Pairs:
    """Pairs that were found here and there, in order, each once, without those inside the crowd."""
    pairs = _outside(found, crowded)
    _, first = np.unique(pairs.i * len(embeddings) + pairs.j, return_index=True)
    rows = np.flatnonzero(crowded)
    left_out = Crowd(embeddings, rows, rows, threshold) if len(rows) else None
    return Pairs(pairs.i[first], pairs.j[first], pairs.similarity[first], left_out)


def _outside(found: Sequence[Pairs], crowded: NDArray[np.bool_]) -> Pairs:
    """The pairs but those of two crowded rows: whether such rows were compared before both were known to be crowded is
    a matter of chance.
    """
    some = (np.flatnonzero(~(crowded[pairs.i] & crowded[pairs.j])) for pairs in found)
    return _concatenated(
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
        memory: as in :func:`find_pairs`; of the screen of the known rows.
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
        axes = _screening_axes(known, threshold)
        slab = _slab(len(known), axes, block, memory)
        for first in range(0, len(known), slab):
            screen = _Screen.of(known, axes, threshold, block, first, min(first + slab, len(known)))
            for asked in screen.turned(queries, 0):
                pairs = _near_known(pool, screen, queries, known, threshold, asked)
                best = np.lexsort((pairs.j, -pairs.similarity, pairs.i))
                best = best[np.unique(pairs.i[best], return_index=True)[1]]
                best = best[~(pairs.similarity[best] <= cosine[pairs.i[best]])]  # than what earlier slabs hold, or NaN
                row[pairs.i[best]], cosine[pairs.i[best]] = pairs.j[best], pairs.similarity[best]
    return row, cosine


def _near_known(
    pool: ThreadPoolExecutor, screen: _Screen, queries: NDArray, known: NDArray, threshold: float, asked: _Rows
) -> Pairs:
    """Pairs of a query, one of ``asked``, and a known row."""

    def near(block: tuple[int, int]) -> list[Pairs]:
        compared = ((asked.numbers[a], screen.rows.numbers[b]) for a, b in screen.compare(*block, asked))
        return [_verified(queries, i, j, threshold, known) for i, j in _gathered(compared)]

    return _concatenated([Pairs.empty(), *(pairs for some in pool.map(near, screen.blocks()) for pairs in some)])


def _concatenated(some: Sequence[Pairs]) -> Pairs:
    i, j = np.concatenate([pairs.i for pairs in some]), np.concatenate([pairs.j for pairs in some])
    return Pairs(i, j, np.concatenate([pairs.similarity for pairs in some]))


def recall(embeddings: NDArray, pairs: Pairs, threshold: float, *, sample: int = 512, seed: int = 0) -> float:
    """Share of the true pairs of randomly sampled rows that ``pairs`` holds; 1 if these rows have none.

    The true pairs come from comparing each sampled row with every other one, apart from the join's blocks. Pairs
    inside a crowd, which were left out on purpose, do not count.

    Args:
        embeddings: ``[n, d]``, what ``pairs`` was found in.
        pairs: the join's result.
        threshold: the join's threshold.
        sample: rows to measure with, at most n.
        seed: of their choice.
    """
    check_arguments(embeddings, threshold)
    n, d = embeddings.shape
    chosen = np.sort(np.random.default_rng(seed).choice(n, min(sample, n), replace=False))
    if n < 2:
        return 1.0
    lowest = _candidate_threshold(threshold, d)
    queries = unit_rows(embeddings, chosen)
    known = pairs.i * n + pairs.j
    true = np.empty(0, np.int64)
    for start, some in _chunks(embeddings, 0, n, max(1, _SEARCH_ELEMENTS // max(d, len(chosen)))):
        a, b = np.nonzero(queries @ some.T >= lowest)
        low, high = np.minimum(chosen[a], b + start), np.maximum(chosen[a], b + start)
        different = low < high
        verified = _verified(embeddings, low[different], high[different], threshold)
        if pairs.crowd is not None:
            inside = np.isin(verified.i, pairs.crowd.rows) & np.isin(verified.j, pairs.crowd.rows)
            verified = Pairs(verified.i[~inside], verified.j[~inside], verified.similarity[~inside])
        true = np.union1d(true, verified.i * n + verified.j)
    return float(np.isin(true, known).mean()) if len(true) else 1.0


@dataclass(frozen=True)
class _Rows:
    """Rows as a screen sees them.

    Attributes:
        short: float32 ``[n, k + 1]``, ``(x₁, ‖x₂‖)`` of each unit row.
        places: float32 ``[boxed, n]``, the coordinates that blocks are boxes of.
        numbers: int64 ``[n]``, the embedding behind each row.
    """

    short: NDArray[np.float32]
    places: NDArray[np.float32]
    numbers: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.numbers)

    def chosen(self, which: NDArray[np.int64] | slice) -> _Rows:
        """Some of them."""
        return _Rows(self.short[which], self.places[:, which], self.numbers[which])


@dataclass(frozen=True)
class _Screen:
    """Short rows whose products are no smaller than the cosines, sorted into blocks that lie close together.

    Attributes:
        axes: float32 ``[d, k]``, that unit rows are turned onto.
        rows: in block order.
        starts: int64 ``[blocks + 1]``.
        slack: room for rounding.
        lowest: a product below this is no near pair.
        reach: a row farther than this from a box, squared, has no near one in it.
    """

    axes: NDArray[np.float32]
    rows: _Rows
    starts: NDArray[np.int64]
    slack: float
    lowest: np.float32
    reach: np.float32

    @classmethod
    def of(
        cls, embeddings: NDArray, axes: NDArray[np.float32], threshold: float, block: int, first: int, last: int
    ) -> _Screen:
        """Two passes over the embeddings ``first … last``: for the blocks, and for the rows in their order."""
        n, d = last - first, embeddings.shape[1]
        k, boxed = axes.shape[1], min(_BOX_AXES, axes.shape[1])
        # A coordinate errs by at most (d + 8) 2^-24 of a unit row's length, k of them by √k times that; products of
        # two rows by twice that again. The same room makes ‖x₂‖ no smaller than it is.
        slack = 4 * (d + 8) * k**0.5 * 2.0**-24
        apart = (2 * (1 - threshold) + 1e-6) ** 0.5 + slack

        places = np.empty((boxed, n), np.float32)
        for start, some in _chunks(embeddings, first, last, 2048):
            places[:, start - first : start - first + len(some)] = (some @ axes[:, :boxed]).T
        order, starts = _tree(places, block)
        for axis in range(boxed):
            places[axis] = places[axis, order]
        rank = np.empty(n, np.int64)
        rank[order] = np.arange(n)
        short = np.empty((n, k + 1), np.float32)
        order += first
        screen = cls(
            axes, _Rows(short, places, order), starts, slack, np.float32(threshold - slack - 1e-6),
            np.float32(apart**2),
        )  # fmt: skip
        for start, some in _chunks(embeddings, first, last, 2048):
            short[rank[start - first : start - first + len(some)]] = screen.screened(some)
        return screen

    @staticmethod
    def bytes_a_row(k: int) -> int:
        """Memory for each row of a screen of k coordinates, with what is needed while it is made."""
        return 4 * (k + 1) + 4 * _BOX_AXES + 56

    def blocks(self) -> list[tuple[int, int]]:
        """Where each block starts and stops."""
        return list(itertools.pairwise(self.starts.tolist()))

    def screened(self, unit: NDArray[np.float32]) -> NDArray[np.float32]:
        """Unit rows (or zero rows) ``[m, d]`` → their short rows ``[m, k + 1]``."""
        short = np.empty((len(unit), self.axes.shape[1] + 1), np.float32)
        first = unit @ self.axes
        rest = np.einsum("nd,nd->n", unit, unit, dtype=np.float64)
        rest -= np.einsum("nd,nd->n", first, first, dtype=np.float64)
        short[:, :-1], short[:, -1] = first, np.sqrt(rest.clip(0) + self.slack)
        return short

    def turned(self, embeddings: NDArray, first: int) -> Iterator[_Rows]:
        """Rows that are no part of the screen, from number ``first`` on, as it sees them, some at a time."""
        for start in range(first, len(embeddings), _QUERIES):
            stop = min(start + _QUERIES, len(embeddings))
            short = np.concatenate([self.screened(unit) for _, unit in _chunks(embeddings, start, stop, 2048)])
            yield _Rows(short, np.ascontiguousarray(short[:, : len(self.rows.places)].T), np.arange(start, stop))

    def compare(self, start: int, stop: int, others: _Rows) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Which of ``others`` may be near which row of the block ``start … stop``: their places in ``others`` and in
        the screen, some at a time.
        """
        rows = self.rows.short[start:stop]
        boxes = [(inside.min(), inside.max()) for inside in self.rows.places[:, start:stop]]
        near_box = [self._within(boxes, others, first) for first in range(0, len(others), _BOXED)]
        within = np.concatenate([np.empty(0, np.int64), *near_box])
        for first in range(0, len(within), _TILE):
            some = within[first : first + _TILE]
            near = others.short[some] @ rows.T >= self.lowest
            if near.any():
                a, b = np.divmod(np.flatnonzero(near), stop - start)
                yield some[a], start + b

    def _within(
        self, boxes: Sequence[tuple[np.float32, np.float32]], others: _Rows, first: int
    ) -> NDArray[np.int64]:
        """Which of the next ``others`` from ``first`` on are no farther than ``reach`` from a box."""
        places = others.places[:, first : first + _BOXED]
        gap, apart = np.empty((2, places.shape[1]), np.float32)
        apart[:] = 0
        for (low, high), place in zip(boxes, places, strict=True):
            np.clip(place, low, high, out=gap)
            gap -= place
            gap *= gap
            apart += gap
        return first + np.flatnonzero(apart <= self.reach)

    def candidates(
        self, start: int, stop: int, others: _Rows, crowded: NDArray[np.bool_]
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Pairs ``i < j`` of a row in the block ``start … stop`` and one of ``others`` that may be near, some at a
        time; if ``others`` are the screen's own rows, only those in the block or after it. Pairs of two ``crowded``
        embeddings (``[n]``, which may change meanwhile) are passed over.
        """
        own = others is self.rows
        if own:
            others = others.chosen(slice(start, None))
        outside = None
        if crowded[self.rows.numbers[start:stop]].all():
            outside = np.flatnonzero(~crowded[others.numbers])
            others = others.chosen(outside)
        for a, b in self.compare(start, stop, others):
            if own:
                once = start + (a if outside is None else outside[a]) > b
                a, b = a[once], b[once]
            i, j = others.numbers[a], self.rows.numbers[b]
            apart_from_crowd = ~(crowded[i] & crowded[j])
            i, j = i[apart_from_crowd], j[apart_from_crowd]
            if len(i):
                yield np.minimum(i, j), np.maximum(i, j)


def _screening_axes(embeddings: NDArray, threshold: float) -> NDArray[np.float32]:
    """``[d, k]`` orthonormal axes: the first principal ones, as many as make the join cheapest, by decreasing variance.

    k is weighed on pairs of sampled rows: every coordinate costs its share of the product, and every pair that the
    screen lets through costs its verification. (Near pairs cost it whatever k is.)
    """
    n, d = embeddings.shape
    if n <= _SMALL:
        return np.eye(d, dtype=np.float32)
    sampled = np.sort(np.random.default_rng(0).choice(n, min(_SAMPLE, n), replace=False))
    rows = unit_rows(embeddings, sampled)
    axes = np.linalg.eigh((rows.T @ rows).astype(np.float64))[1][:, ::-1]  # of the largest share first
    turned = rows @ axes.astype(np.float32)
    half = min(len(rows) // 2, 1024)
    x, y = turned[:half], turned[-half:]
    far = x @ y.T < threshold
    best, least = d, float(d)
    product, before = np.zeros((half, half), np.float32), 0
    for k in sorted({*range(8, 64, 4), *range(64, 128, 16), *range(128, 1024, 64)}):
        if k >= d:
            break
        product += x[:, before:k] @ y[:, before:k].T
        rest_x, rest_y = (np.sqrt((1 - (z[:, :k] ** 2).sum(1)).clip(0)) for z in (x, y))
        let_through = float(((product + rest_x[:, None] * rest_y >= threshold) & far).mean())
        cost, before = k + _VERIFY_COST * let_through, k
        if cost < least:
            best, least = k, cost
    # Blocks are boxes of the first axes: those that part the rows best. (The principal one may be the rows' mean.)
    parting = np.argsort(-turned[:, :best].var(axis=0), kind="stable")
    return np.ascontiguousarray(axes[:, parting], np.float32)


def _tree(places: NDArray[np.float32], block: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """A k-d tree's leaves, one after the other: the order of the rows, and where each leaf starts.

    Each cut is at the middle of the axis with the largest variance; all leaves but the last hold ``block`` rows.
    """
    order: list[NDArray[np.int64]] = []
    left = [np.arange(places.shape[1], dtype=np.int64)]
    while left:
        rows = left.pop()
        if len(rows) <= block:
            order.append(rows)
            continue
        inside = places[:, rows]
        cut = (len(rows) // block + 1) // 2 * block
        parted = rows[np.argpartition(inside[inside.var(axis=1).argmax()], cut)]
        left += [parted[cut:], parted[:cut]]
    return np.concatenate(order), np.cumsum([0, *(len(leaf) for leaf in order)])


def cores() -> int:
    from curate.engine import cpu_count

    return cpu_count()


def check_arguments(embeddings: NDArray, threshold: float) -> None:
    """Raise ``ValueError`` for what is no set of embeddings, or no threshold."""
    if embeddings.ndim != 2 or not np.issubdtype(embeddings.dtype, np.floating):
        raise ValueError(f"embeddings must be floating [n, d], not {embeddings.dtype} {list(embeddings.shape)}")
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold must be a cosine in (0, 1], not {threshold}")


def _candidate_threshold(threshold: float, d: int) -> float:
    """Below ``threshold`` by more than a float32 product of unit rows can err, in any order of summation."""
    return threshold - (d + 8) * 2.0**-23


def unit_rows(embeddings: NDArray, chosen: NDArray[np.int64] | slice) -> NDArray[np.float32]:
    """The chosen rows as float32 unit rows."""
    rows = _as_float32(embeddings[chosen])
    norm = np.sqrt(np.einsum("nd,nd->n", rows, rows, dtype=np.float64))
    if not np.isfinite(norm).all():
        bad = int(np.arange(len(embeddings))[chosen][np.argmin(np.isfinite(norm))])
        raise ValueError(f"embedding of row {bad} is not finite")
    return (rows / np.where(norm == 0, 1, norm)[:, None]).astype(np.float32, copy=False)


def _as_float32(rows: NDArray) -> NDArray[np.float32]:
    """The same numbers in float32. NumPy converts float16 one by one; by their bits it takes a sixth of the time."""
    if rows.dtype != np.float16:
        return np.asarray(rows, np.float32)
    bits = np.asarray(rows).view(np.int16).astype(np.int32)  # the sign goes along
    bits <<= 13
    bits &= _SIGN_AND_NUMBER
    wide = bits.view(np.float32)
    wide *= np.float32(2.0**112)  # exponents count from -15 in float16, from -127 in float32
    if wide.size and max(wide.max(), -wide.min()) > np.finfo(np.float16).max:
        return np.asarray(rows, np.float32)  # infinities and NaN are kept out of the numbers there
    return wide


def _chunks(embeddings: NDArray, first: int, last: int, size: int) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """The unit rows of the embeddings ``first … last``, ``size`` at a time, each with the number of the first."""
    for start in range(first, last, size):
        yield start, unit_rows(embeddings, slice(start, min(start + size, last)))


def _surely_near(
    embeddings: NDArray, i: NDArray[np.int64], j: NDArray[np.int64], threshold: float
) -> NDArray[np.bool_]:
    """Which of many pairs among few rows are near by more than float32 can err: a product of the rows tells."""
    involved = np.zeros(len(embeddings), bool)
    involved[i] = involved[j] = True
    rows, place = np.flatnonzero(involved), np.cumsum(involved, dtype=np.int32) - 1
    unit = unit_rows(embeddings, rows)
    return (unit @ unit.T)[place[i], place[j]] >= 2 * threshold - _candidate_threshold(threshold, unit.shape[1])


def _verified(
    embeddings: NDArray, i: NDArray[np.int64], j: NDArray[np.int64], threshold: float, others: NDArray | None = None
) -> Pairs:
    """Those of the candidates, rows i and rows j (of ``others``, if given), whose cosine in float64 reaches the
    threshold.
    """
    others = embeddings if others is None else others
    step = max(1, _VERIFY_ELEMENTS // max(1, embeddings.shape[1]))
    maybe = np.empty(len(i), bool)
    for start in range(0, len(i), step):
        some = slice(start, start + step)
        maybe[some] = _maybe_near(embeddings[i[some]], others[j[some]], threshold)
    i, j = i[maybe], j[maybe]
    similarity = np.empty(len(i), np.float32)
    for start in range(0, len(i), step):
        x = np.asarray(embeddings[i[start : start + step]], np.float64)
        y = np.asarray(others[j[start : start + step]], np.float64)
        # einsum sums each row by itself, so a row's result does not depend on what stands beside it
        product = np.einsum("nd,nd->n", x, y)
        norms = np.sqrt(np.einsum("nd,nd->n", x, x) * np.einsum("nd,nd->n", y, y))
        similarity[start : start + step] = product / np.where(norms == 0, 1, norms)
    near = similarity >= np.float32(threshold)
    return Pairs(i[near], j[near], similarity[near])


def _maybe_near(x: NDArray, y: NDArray, threshold: float) -> NDArray[np.bool_]:
    """Which rows of ``x`` and ``y``, ``[m, d]`` both, float32 cannot tell to be apart."""
    x, y = _as_float32(x), _as_float32(y)
    with np.errstate(all="ignore"):
        x_norm, y_norm = np.einsum("nd,nd->n", x, x), np.einsum("nd,nd->n", y, y)
        cosine = np.einsum("nd,nd->n", x, y) / np.sqrt(x_norm * y_norm)
    # Products of smaller rows have lost digits, those of larger ones may have left float32's range.
    in_range = (np.minimum(x_norm, y_norm) > 1e-18) & (np.maximum(x_norm, y_norm) < 1e18)
    return ~in_range | (cosine >= _candidate_threshold(threshold, x.shape[1]))
