"""The screen of the near-duplicate join: short rows that rule out nearly all pairs, in blocks that rule out whole rows.

Rows are made unit rows and turned onto the set's principal axes. With ``x₁`` the first k coordinates of a row and
``x₂`` the others, ``x·y ≤ x₁·y₁ + ‖x₂‖‖y₂‖`` (Cauchy–Schwarz): a product of the k + 1 numbers ``(x₁, ‖x₂‖)`` is no
smaller than the cosine. Blocks are the leaves of a k-d tree on the first axes, and a row that is too far from a block's
box is near none of its rows.

Where the processor has products of bytes (:mod:`curate.neighbors.coarse`), these go before: with ``q`` a short row in
whole steps ``s`` and ``r`` what that leaves of it, ``z·w ≤ s² q_z·q_w + ‖r_w‖ ‖s q_z‖ + ‖r_z‖ ‖w‖``. A row whose
largest product is too small is near none of the block; what is left is held against the short rows themselves.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from curate.neighbors import coarse
from curate.neighbors.verify import unit_chunks, unit_rows

_TILE = 2048  # rows compared with a block at a time: 2 MB of products
_SAMPLE = 4096  # rows that the axes are taken from
_SMALL = 2048  # fewer rows are compared as they are: finding axes would cost more than it saves
_BOXED = 1 << 14  # rows compared with a box at a time: what is compared stays in the cache
_LENGTHS = (*range(8, 64, 4), *range(64, 128, 16), *range(128, 1024, 64))  # of short rows, to choose from
_BOX_AXES = 4  # axes that blocks are boxes of
_VERIFY_COST = 100_000  # verifying one pair costs about as much as screening this many by one coordinate
_COARSE_COST = 0.15  # a coordinate in bytes, in coordinates of float32
_CHECK_COST = 3000  # a pair that the bytes let through, likewise
_COARSE = 0.03  # by about as much they see less well
_MOVED = 8  # columns of short rows that are brought into their order at a time
_QUERIES = 1 << 14  # rows compared with a screen that they are no part of, at a time


@dataclass(frozen=True)
class ShortRows:
    """Rows as a screen sees them.

    Attributes:
        short: float32 ``[n, k + 1]``, ``(x₁, ‖x₂‖)`` of each unit row.
        places: float32 ``[boxed, n]``, the coordinates that blocks are boxes of.
        numbers: int64 ``[n]``, the embedding behind each row.
        coarse: int8 ``[n, …]``, short rows in whole steps; of no length where they are not looked at.
        off: how far such a row is from its short row at most.
    """

    short: NDArray[np.float32]
    places: NDArray[np.float32]
    numbers: NDArray[np.int64]
    coarse: NDArray[np.int8]
    off: float = 0.0

    def __len__(self) -> int:
        return len(self.numbers)

    def chosen(self, which: NDArray[np.int64] | slice) -> ShortRows:
        """Some of them."""
        return ShortRows(
            self.short[which], self.places[:, which], self.numbers[which], self.coarse[which], self.off
        )


@dataclass(frozen=True)
class Screen:
    """Short rows whose products are no smaller than the cosines, sorted into blocks that lie close together.

    Attributes:
        axes: float32 ``[d, k]``, that unit rows are turned onto.
        rows: in block order.
        starts: int64 ``[blocks + 1]``.
        slack: room for rounding.
        lowest: a product below this is no near pair.
        reach: a row farther than this from a box, squared, has no near one in it.
        step: of the coarse rows; 0 where there are none.
    """

    axes: NDArray[np.float32]
    rows: ShortRows
    starts: NDArray[np.int64]
    slack: float
    lowest: np.float32
    reach: np.float32
    step: float = 0.0

    @classmethod
    def of(
        cls, embeddings: NDArray, axes: NDArray[np.float32], threshold: float, block: int, first: int, last: int
    ) -> Screen:
        """One pass over the embeddings ``first … last``, and a few over the short rows."""
        n, d = last - first, embeddings.shape[1]
        k, boxed = axes.shape[1], min(_BOX_AXES, axes.shape[1])
        # A coordinate errs by at most (d + 8) 2^-24 of a unit row's length, k of them by √k times that; products of
        # two rows by twice that again. The same room makes ‖x₂‖ no smaller than it is.
        slack = 4 * (d + 8) * k**0.5 * 2.0**-24
        apart = (2 * (1 - threshold) + 1e-6) ** 0.5 + slack

        short = np.empty((n, k + 1), np.float32)
        for start, some in unit_chunks(embeddings, first, last, 2048):
            short[start - first : start - first + len(some)] = _screened(some, axes, slack)
        places = np.ascontiguousarray(short[:, :boxed].T)
        order, starts = _tree(places, block)
        for axis in range(boxed):
            places[axis] = places[axis].take(order)
        for column in range(0, k + 1, _MOVED):  # some at a time: all would be all rows once more
            short[:, column : column + _MOVED] = short[:, column : column + _MOVED].take(order, axis=0)
        order += first
        screen = cls(
            axes, ShortRows(short, places, order, np.empty((n, 0), np.int8)), starts, slack,
            np.float32(threshold - slack - 1e-6), np.float32(apart**2),
        )  # fmt: skip
        if not coarse.pays(len(embeddings)):
            return screen
        step = max(float(short.max()), -float(short.min())) / 127
        return replace(screen, rows=ShortRows(short, places, order, *coarse.as_bytes(short, step)), step=step)

    @staticmethod
    def bytes_a_row(k: int) -> int:
        """Memory for each row of a screen of k coordinates, with what is needed while it is made."""
        return 4 * (k + 1) + 4 * _BOX_AXES + 56 + (k + coarse.WIDTH)

    def blocks(self) -> list[tuple[int, int]]:
        """Where each block starts and stops."""
        return list(itertools.pairwise(self.starts.tolist()))

    def turned(self, embeddings: NDArray, first: int) -> Iterator[ShortRows]:
        """Rows that are no part of the screen, from number ``first`` on, as it sees them, some at a time."""
        for start in range(first, len(embeddings), _QUERIES):
            stop = min(start + _QUERIES, len(embeddings))
            short = np.concatenate(
                [_screened(unit, self.axes, self.slack) for _, unit in unit_chunks(embeddings, start, stop, 2048)]
            )
            places = np.ascontiguousarray(short[:, : len(self.rows.places)].T)
            in_bytes = coarse.as_bytes(short, self.step) if self.step else (np.empty((len(short), 0), np.int8), 0.0)
            yield ShortRows(short, places, np.arange(start, stop), *in_bytes)

    def compare(
        self, start: int, stop: int, others: ShortRows
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Which of ``others`` may be near which row of the block ``start … stop``: their places in ``others`` and in
        the screen, some at a time.
        """
        rows, rows_in_bytes = self.rows.short[start:stop], self.rows.coarse[start:stop]
        boxes = [(inside.min(), inside.max()) for inside in self.rows.places[:, start:stop]]
        near_box = [self._within(boxes, others, first) for first in range(0, len(others), _BOXED)]
        within = np.concatenate([np.empty(0, np.int64), *near_box])
        for first in range(0, len(within), _TILE):
            some = within[first : first + _TILE]
            if self.step:
                in_bytes = others.coarse.take(some, axis=0)
                a, b = coarse.reaching(in_bytes, rows_in_bytes, self._lowest_in_bytes(others))
                if not len(a):
                    continue
                near = np.einsum("nk,nk->n", others.short.take(some[a], axis=0), rows.take(b, axis=0)) >= self.lowest
                a, b = a[near], b[near]
            else:
                near = others.short.take(some, axis=0) @ rows.T >= self.lowest
                a, b = np.divmod(np.flatnonzero(near), stop - start)
            if len(a):
                yield some[a], start + b

    def _lowest_in_bytes(self, others: ShortRows) -> int:
        """A product of coarse rows below this is no near pair; no short row is longer than 1 by more than ``slack``."""
        longest = 1.001 + self.slack
        most = longest * (self.rows.off + others.off) + self.rows.off * others.off
        return math.floor((float(self.lowest) - most) / self.step**2)

    def _within(
        self, boxes: Sequence[tuple[np.float32, np.float32]], others: ShortRows, first: int
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
        self, start: int, stop: int, others: ShortRows, crowded: NDArray[np.bool_]
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


def screening_axes(embeddings: NDArray, threshold: float, together: int | None = None) -> NDArray[np.float32]:
    """``[d, k]`` orthonormal axes: the first principal ones, as many as make the join cheapest, by decreasing variance.

    k is weighed on pairs of sampled rows: every coordinate costs its share of the product, and every pair that the
    screen lets through costs its verification. (Near pairs cost it whatever k is.) In bytes coordinates cost less, and
    what they let through costs a product of its own.

    Where ``together`` rows are compared with each other, those of a cell, they are near ones: the pairs are then those
    of sampled rows with the nearest of the others, as large a share of these.
    """
    n, d = embeddings.shape
    if n <= _SMALL:
        return np.eye(d, dtype=np.float32)
    sampled = np.sort(np.random.default_rng(0).choice(n, min(_SAMPLE, n), replace=False))
    rows = unit_rows(embeddings, sampled)
    axes = np.linalg.eigh((rows.T @ rows).astype(np.float64))[1][:, ::-1]  # of the largest share first
    turned = rows @ axes.astype(np.float32)
    half = min(len(rows) // 2, 1024)
    x, y = turned[:half], turned[-half if together is None else half :]
    weighed = _weighed(x @ y.T, threshold, 1.0 if together is None else together / n)
    in_bytes = coarse.pays(n if together is None else together)
    each, best = _COARSE_COST if in_bytes else 1.0, d
    least = each * d
    pairs = max(1, int(np.count_nonzero(weighed)))
    product, before = np.zeros((half, len(y)), np.float32), 0
    lengths = range(coarse.WIDTH - 1, 1024, coarse.WIDTH) if in_bytes else _LENGTHS
    for k in lengths:
        if k >= d or each * k >= least:
            break
        product += x[:, before:k] @ y[:, before:k].T
        rest_x, rest_y = (np.sqrt((1 - (z[:, :k] ** 2).sum(1)).clip(0)) for z in (x, y))
        bound, before = product + rest_x[:, None] * rest_y, k
        cost = each * k + _VERIFY_COST * int(np.count_nonzero(weighed & (bound >= threshold))) / pairs
        if in_bytes:
            cost += _CHECK_COST * int(np.count_nonzero(weighed & (bound >= threshold - _COARSE))) / pairs
        if cost < least:
            best, least = k, cost
    # Blocks are boxes of the first axes: those that part the rows best. (The principal one may be the rows' mean.)
    parting = np.argsort(-turned[:, :best].var(axis=0), kind="stable")
    return np.ascontiguousarray(axes[:, parting], np.float32)


def _weighed(cosine: NDArray[np.float32], threshold: float, share: float) -> NDArray[np.bool_]:
    """Which pairs of sampled rows tell what the screen costs: those that are not near, and of these in each line of
    cosines the highest, such a share of all.
    """
    weighed = cosine < threshold
    if share < 1:
        last = max(1, round(cosine.shape[1] * share)) - 1
        ascending = np.partition(np.where(weighed, -cosine, np.float32(1)), last, axis=1)
        weighed &= -cosine <= ascending[:, last : last + 1]
    return weighed


def _screened(unit: NDArray[np.float32], axes: NDArray[np.float32], slack: float) -> NDArray[np.float32]:
    """Unit rows (or zero rows) ``[m, d]`` → their short rows ``[m, k + 1]``."""
    short = np.empty((len(unit), axes.shape[1] + 1), np.float32)
    first = unit @ axes
    rest = np.einsum("nd,nd->n", unit, unit, dtype=np.float64)
    rest -= np.einsum("nd,nd->n", first, first, dtype=np.float64)
    short[:, :-1], short[:, -1] = first, np.sqrt(rest.clip(0) + slack)
    return short


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
        inside = places.take(rows, axis=1)  # by an index it takes three times as long
        cut = (len(rows) // block + 1) // 2 * block
        parted = rows.take(np.argpartition(inside[inside.var(axis=1).argmax()], cut))
        left += [parted[cut:], parted[:cut]]
    return np.concatenate(order), np.cumsum([0, *(len(leaf) for leaf in order)])

