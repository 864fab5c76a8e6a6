"""The near-duplicate join: all pairs of embeddings whose cosine reaches a threshold.

Exact by construction, at a fraction of brute force's work:

1. *Screen.* Rows are made unit rows and turned onto the set's principal axes. With ``x₁`` the first k coordinates
   of a row and ``x₂`` the others, ``x·y ≤ x₁·y₁ + ‖x₂‖‖y₂‖`` (Cauchy–Schwarz). So the k + 1 numbers
   ``(x₁, ‖x₂‖)`` of each row rule out nearly all pairs by a product of short rows (BLAS does the work).
2. *Blocks.* Rows are sorted into small boxes by a k-d tree on the first axes. A near pair is at most
   ``√(2 (1 − threshold))`` apart, so a row farther than that from a block's box is not compared with the block.
3. *Verify.* What is left is decided in float64 from the rows as they were given.

A row with very many near rows stands in a *crowd* (a placeholder image in ten thousand encodings). Pairs inside a
crowd grow with the square of its size and tell nothing new, so they can be left out and asked for where a decision
needs them: what is found then grows with the number of rows alone.

Every bound has room for float32's rounding in any order of summation. So the pairs, and their similarities to
the last bit, depend neither on the blocks, nor on the threads, nor on the BLAS.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
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
_BOX_AXES = 4  # axes that blocks are boxes of
_DENSE = 1 << 15  # candidates of one tile above which a product of whole rows is cheaper than verifying each
_VERIFY_COST = 30_000  # verifying one pair costs about as much as screening this many by one coordinate
_VERIFY_ELEMENTS = 1 << 17  # float64 elements of each side that are verified at a time: 1 MB
_QUERIES = 1 << 16  # queries screened at a time
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
        vectors: ``[m, d]``, embeddings of the crowded rows.
        rows: int64 ``[m]``, increasing, which rows they are.
        threshold: the join's.
    """

    def __init__(self, vectors: NDArray, rows: NDArray[np.int64], threshold: float):
        self.vectors, self.rows, self.threshold = vectors, rows, threshold
        self._place = {row: place for place, row in enumerate(rows.tolist())}

    def __contains__(self, row: int) -> bool:
        return row in self._place

    def at_least(self, threshold: float) -> Crowd:
        """The same rows with another threshold."""
        return Crowd(self.vectors, self.rows, threshold)

    def renumbered(self, numbers: NDArray[np.int64]) -> Crowd:
        """The same crowd with row r called ``numbers[r]``; ``numbers`` must increase."""
        return Crowd(self.vectors, numbers[self.rows], self.threshold)

    def near(self, row: int, others: Sequence[int]) -> list[tuple[int, float]]:
        """``(other, cosine)`` of those of ``others``, all in the crowd, that are near ``row``, as the join has it."""
        if not len(others):
            return []
        places = np.array([self._place[other] for other in others], np.int64)
        found = _verified(self.vectors, np.full_like(places, self._place[row]), places, self.threshold)
        return list(zip(self.rows[found.j].tolist(), found.similarity.tolist(), strict=True))

    def links(self) -> Iterator[tuple[int, int]]:
        """Near pairs that connect what all near pairs in the crowd connect, fewer than rows: a spanning forest."""
        left = np.arange(len(self.rows))
        while len(left):
            reached, left = [int(left[0])], left[1:]
            while reached and len(left):
                place = reached.pop()
                near = _verified(self.vectors, np.full_like(left, place), left, self.threshold).j
                for other in near.tolist():
                    yield int(self.rows[place]), int(self.rows[other])
                reached += near.tolist()
                left = np.setdiff1d(left, near, assume_unique=True)


def find_pairs(
    embeddings: NDArray,
    threshold: float,
    *,
    crowd: int | None = None,
    block: int = BLOCK,
    threads: int = 0,
    bar: Progress | None = None,
) -> Pairs:
    """All pairs of rows with cosine ≥ ``threshold``.

    Memory beside the result: about ``4 (k + 8)`` bytes a row, where k, the length of the screen, is chosen by
    the data (often 20 to 40), and a few megabytes a thread; ``embeddings`` is read in pieces and may be a memory
    map. Time grows with n², by a small constant; for sets that are too large for that see :mod:`curate.cells`.

    Args:
        embeddings: ``[n, d]`` float16, float32 or float64; any length of rows, zero rows are near to nothing.
        threshold: cosine in (0, 1]; a pair whose cosine, rounded to float32, equals it counts.
        crowd: a row with more near rows than this is crowded, and pairs of two crowded rows are left out: what is
            found is then at most ``crowd`` pairs a row, however large a group of copies is. None finds all pairs.
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
    if len(embeddings) == 0:
        return Pairs.empty()
    with one_blas_thread(), ThreadPoolExecutor(threads or cores()) as pool:
        return join_blocks(embeddings, threshold, crowd, block, pool.map, bar)


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
) -> Pairs:
    """The exact join of checked arguments; ``run`` maps a function over the blocks, as ``map`` or a pool's ``map``."""
    tally = _Crowding(len(embeddings), crowd)
    screen = _Screen.of(embeddings, threshold, block)

    def near(start: int, stop: int) -> list[Pairs]:
        found = []
        for i, j in screen.candidates(start, stop, tally.crowded):
            if crowd is not None and len(i) > _DENSE:
                sure = _surely_near(embeddings, i, j, threshold)
                tally.add(i[sure], j[sure])
                both = tally.crowded[i] & tally.crowded[j]
                found.append(_verified(embeddings, i[sure & ~both], j[sure & ~both], threshold))
                i, j = i[~sure & ~both], j[~sure & ~both]
            found.append(_verified(embeddings, i, j, threshold))
            tally.add(found[-1].i, found[-1].j)
        return found

    starts, stops = screen.starts[:-1].tolist(), screen.starts[1:].tolist()
    found = [Pairs.empty()]
    for start, stop, some in zip(starts, stops, run(near, starts, stops), strict=True):
        found += some
        if bar is not None:
            bar.update((stop - start) * (len(embeddings) - (start + stop - 1) / 2))
    return assembled(embeddings, found, tally.crowded, threshold)


def assembled(embeddings: NDArray, found: Sequence[Pairs], crowded: NDArray[np.bool_], threshold: float) -> Pairs:
    """Pairs that were found here and there, in order, each once, without those inside the crowd."""
    pairs = _concatenated(found)
    # Whether two crowded rows were compared before both were known to be crowded is a matter of chance.
    outside = np.flatnonzero(~(crowded[pairs.i] & crowded[pairs.j]))
    i, j = pairs.i[outside], pairs.j[outside]
    _, first = np.unique(i * len(embeddings) + j, return_index=True)
    rows = np.flatnonzero(crowded)
    left_out = Crowd(np.asarray(embeddings[rows]), rows, threshold) if len(rows) else None
    return Pairs(i[first], j[first], pairs.similarity[outside][first], left_out)


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
    queries: NDArray, known: NDArray, threshold: float, *, block: int = BLOCK, threads: int = 0
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The nearest known row of each query, where one is near: the join of one set with another, exact like the join.

    Args:
        queries: ``[m, d]``, as ``known``.
        known: ``[n, d]`` float16, float32 or float64; may be a memory map.
        threshold: cosine in (0, 1].
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
        screen = _Screen.of(known, threshold, block)
        for first, some in _chunks(queries, len(queries), _QUERIES):
            pairs = _near_known(pool, screen, queries, known, threshold, first, screen.screened(some))
            best = np.lexsort((pairs.j, -pairs.similarity, pairs.i))
            best = best[np.unique(pairs.i[best], return_index=True)[1]]
            row[pairs.i[best]], cosine[pairs.i[best]] = pairs.j[best], pairs.similarity[best]
    return row, cosine


def _near_known(
    pool: ThreadPoolExecutor,
    screen: _Screen,
    queries: NDArray,
    known: NDArray,
    threshold: float,
    first: int,
    asked: NDArray[np.float32],
) -> Pairs:
    """Pairs of a query (those from number ``first`` on, whose short rows are ``asked``) and a known row."""
    places = np.ascontiguousarray(asked[:, : len(screen.places)].T)

    def near(start: int, stop: int) -> list[Pairs]:
        compared = screen.compare(start, stop, asked, places)
        return [_verified(queries, first + a, screen.order[b], threshold, known) for a, b in compared]

    found = pool.map(near, screen.starts[:-1].tolist(), screen.starts[1:].tolist())
    return _concatenated([Pairs.empty(), *(pairs for some in found for pairs in some)])


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
    for start, some in _chunks(embeddings, n, max(1, _SEARCH_ELEMENTS // max(d, len(chosen)))):
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
class _Screen:
    """Short rows whose products are no smaller than the cosines, sorted into blocks that lie close together.

    Attributes:
        axes: float32 ``[d, k]``, that unit rows are turned onto.
        rows: float32 ``[n, k + 1]`` in block order, ``(x₁, ‖x₂‖)`` of each unit row.
        places: float32 ``[boxed, n]``, the coordinates that blocks are boxes of.
        order: int64 ``[n]``, the embedding behind each row.
        starts: int64 ``[blocks + 1]``.
        slack: room for rounding.
        lowest: a product below this is no near pair.
        reach: a row farther than this from a box, squared, has no near one in it.
    """

    axes: NDArray[np.float32]
    rows: NDArray[np.float32]
    places: NDArray[np.float32]
    order: NDArray[np.int64]
    starts: NDArray[np.int64]
    slack: float
    lowest: np.float32
    reach: np.float32

    @classmethod
    def of(cls, embeddings: NDArray, threshold: float, block: int) -> _Screen:
        """Two passes over the embeddings: for the blocks, and for the rows in their order."""
        n, d = embeddings.shape
        axes = _screening_axes(embeddings, threshold)
        k, boxed = axes.shape[1], min(_BOX_AXES, axes.shape[1])
        # A coordinate errs by at most (d + 8) 2^-24 of a unit row's length, k of them by √k times that; products of
        # two rows by twice that again. The same room makes ‖x₂‖ no smaller than it is.
        slack = 4 * (d + 8) * k**0.5 * 2.0**-24
        apart = (2 * (1 - threshold) + 1e-6) ** 0.5 + slack

        places = np.empty((boxed, n), np.float32)
        for start, some in _chunks(embeddings, n, 2048):
            places[:, start : start + len(some)] = (some @ axes[:, :boxed]).T
        order, starts = _tree(places, block)
        for axis in range(boxed):
            places[axis] = places[axis, order]
        rank = np.empty(n, np.int64)
        rank[order] = np.arange(n)
        rows = np.empty((n, k + 1), np.float32)
        screen = cls(
            axes, rows, places, order, starts, slack, np.float32(threshold - slack - 1e-6), np.float32(apart**2)
        )
        for start, some in _chunks(embeddings, n, 2048):
            rows[rank[start : start + len(some)]] = screen.screened(some)
        return screen

    def screened(self, unit: NDArray[np.float32]) -> NDArray[np.float32]:
        """Unit rows (or zero rows) ``[m, d]`` → their short rows ``[m, k + 1]``."""
        short = np.empty((len(unit), self.axes.shape[1] + 1), np.float32)
        first = unit @ self.axes
        rest = np.einsum("nd,nd->n", unit, unit, dtype=np.float64)
        rest -= np.einsum("nd,nd->n", first, first, dtype=np.float64)
        short[:, :-1], short[:, -1] = first, np.sqrt(rest.clip(0) + self.slack)
        return short

    def compare(
        self,
        start: int,
        stop: int,
        others: NDArray[np.float32],
        places: NDArray[np.float32],
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Which of ``others``, short rows ``[m, k + 1]`` at ``places`` ``[boxed, m]``, may be near which row of the
        block ``start … stop``: ``(other, row)`` numbers, some at a time.
        """
        rows = self.rows[start:stop]
        apart = np.zeros(places.shape[1], np.float32)
        for inside, place in zip(self.places[:, start:stop], places, strict=True):
            gap = np.maximum(inside.min() - place, place - inside.max())
            np.maximum(gap, 0, out=gap)
            gap *= gap
            apart += gap
        within = np.flatnonzero(apart <= self.reach)
        for first in range(0, len(within), _TILE):
            some = within[first : first + _TILE]
            near = others[some] @ rows.T >= self.lowest
            if near.any():
                a, b = np.divmod(np.flatnonzero(near), stop - start)
                yield some[a], start + b

    def candidates(
        self, start: int, stop: int, crowded: NDArray[np.bool_]
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Pairs ``i < j`` of a row in the block ``start … stop`` and one in it or after it that may be near, some at a
        time; those of two ``crowded`` embeddings (``[n]``, which may change meanwhile) are passed over.
        """
        others, places = self.rows[start:], self.places[:, start:]
        outside = None
        if crowded[self.order[start:stop]].all():
            outside = np.flatnonzero(~crowded[self.order[start:]])
            others, places = others[outside], places[:, outside]
        for a, b in self.compare(start, stop, others, places):
            a = start + (a if outside is None else outside[a])
            once = a > b
            a, b = self.order[a[once]], self.order[b[once]]
            apart_from_crowd = ~(crowded[a] & crowded[b])
            a, b = a[apart_from_crowd], b[apart_from_crowd]
            if len(a):
                yield np.minimum(a, b), np.maximum(a, b)


def _screening_axes(embeddings: NDArray, threshold: float) -> NDArray[np.float32]:
    """``[d, k]`` orthonormal axes: the first principal ones, as many as make the join cheapest.

    k is weighed on pairs of sampled rows: every coordinate costs its share of the product, and every pair that the
    screen lets through costs its verification.
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
    best, least = d, float(d)
    product, before = np.zeros((half, half), np.float32), 0
    for k in sorted({*range(8, 64, 4), *range(64, 128, 16), *range(128, 1024, 64)}):
        if k >= d:
            break
        product += x[:, before:k] @ y[:, before:k].T
        rest_x, rest_y = (np.sqrt((1 - (z[:, :k] ** 2).sum(1)).clip(0)) for z in (x, y))
        let_through = float((product + rest_x[:, None] * rest_y >= threshold).mean())
        cost, before = k + _VERIFY_COST * let_through, k
        if cost < least:
            best, least = k, cost
    return np.ascontiguousarray(axes[:, :best], np.float32)


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
    rows = np.asarray(embeddings[chosen], np.float32)
    norm = np.sqrt(np.einsum("nd,nd->n", rows, rows, dtype=np.float64))
    if not np.isfinite(norm).all():
        bad = int(np.arange(len(embeddings))[chosen][np.argmin(np.isfinite(norm))])
        raise ValueError(f"embedding of row {bad} is not finite")
    return (rows / np.where(norm == 0, 1, norm)[:, None]).astype(np.float32, copy=False)


def _chunks(embeddings: NDArray, n: int, size: int) -> Iterator[tuple[int, NDArray[np.float32]]]:
    for start in range(0, n, size):
        yield start, unit_rows(embeddings, slice(start, min(start + size, n)))


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
    similarity = np.empty(len(i), np.float32)
    step = max(1, _VERIFY_ELEMENTS // max(1, embeddings.shape[1]))
    for start in range(0, len(i), step):
        x = np.asarray(embeddings[i[start : start + step]], np.float64)
        y = np.asarray(others[j[start : start + step]], np.float64)
        # einsum sums each row by itself, so a row's result does not depend on what stands beside it
        product = np.einsum("nd,nd->n", x, y)
        norms = np.sqrt(np.einsum("nd,nd->n", x, x) * np.einsum("nd,nd->n", y, y))
        similarity[start : start + step] = product / np.where(norms == 0, 1, norms)
    near = similarity >= np.float32(threshold)
    return Pairs(i[near], j[near], similarity[near])
