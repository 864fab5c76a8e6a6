"""Pairs of embeddings that are near each other, and the last word on which are: the verification behind the join.

A candidate is compared in float32 first, with room for its rounding in any order of summation, and what that cannot
rule out is decided in float64, from the rows as they were given. So whether a pair is near, and its similarity to the
last bit, does not depend on what it was compared beside. :class:`Crowd` answers for pairs that were left out.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_TILE = 1024  # rows compared with a block at a time: 1 MB of products
_VERIFY_ELEMENTS = 1 << 17  # elements of each side that are verified at a time: 1 MB in float64
_CROWD_ELEMENTS = 1 << 22  # products of crowded rows that are looked at at a time
_SIGN_AND_NUMBER = np.array(0x8FFFE000, np.uint32).view(np.int32)  # of a float16 whose bits stand 13 places up


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

    def places(self, i: NDArray[np.int64], j: NDArray[np.int64]) -> NDArray[np.int64]:
        """``[m]``: where each asked pair stands, -1 where it does not. Not by ``i · n + j``, which leaves int64 at
        three billion rows.
        """
        low, end = (np.searchsorted(self.i, i, side=side) for side in ("left", "right"))
        high, last = end, len(self) - 1
        for _ in range(int((end - low).max(initial=0)).bit_length()):
            middle = (low + high) >> 1
            before = (low < high) & (self.j[np.minimum(middle, last)] < j)
            low, high = np.where(before, middle + 1, low), np.where(before, high, middle)
        there = low < end
        there[there] = self.j[low[there]] == j[there]
        return np.where(there, low, -1)

    def among(self, numbers: NDArray[np.int64]) -> Pairs:
        """Those of two rows of ``numbers``, which increase, by their places there; others are not read."""
        starts = np.searchsorted(self.i, numbers, side="left")
        sizes = np.searchsorted(self.i, numbers, side="right") - starts
        at = np.repeat(starts - np.cumsum(sizes) + sizes, sizes) + np.arange(sizes.sum())
        other = self.j[at]
        j = np.minimum(np.searchsorted(numbers, other), len(numbers) - 1)
        inside = numbers[j] == other if len(at) else np.empty(0, bool)
        i = np.repeat(np.arange(len(numbers)), sizes)[inside]
        crowd = None if self.crowd is None else self.crowd.among(numbers)
        return Pairs(i, j[inside], self.similarity[at[inside]], crowd)


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
        self._ascending = np.ascontiguousarray(rows).data

    def __contains__(self, row: int) -> bool:
        place = bisect_left(self._ascending, row)
        return place < len(self._ascending) and self._ascending[place] == row

    def at_least(self, threshold: float) -> Crowd:
        """The same rows with another threshold."""
        return Crowd(self.embeddings, self.places, self.rows, threshold)

    def renumbered(self, numbers: NDArray[np.int64]) -> Crowd:
        """The same crowd with row r called ``numbers[r]``; ``numbers`` must increase."""
        return Crowd(self.embeddings, self.places, numbers[self.rows], self.threshold)

    def among(self, numbers: NDArray[np.int64]) -> Crowd | None:
        """Those of ``numbers``, which increase, by their places there; None where none is."""
        at = np.minimum(np.searchsorted(self.rows, numbers), len(self.rows) - 1)
        rows = np.flatnonzero(self.rows[at] == numbers)
        return Crowd(self.embeddings, self.places[at[rows]], rows, self.threshold) if len(rows) else None

    def near(self, row: int, others: Sequence[int]) -> list[tuple[int, float]]:
        """``(other, cosine)`` of those of ``others``, all in the crowd, that are near ``row``, as the join has it."""
        found = self._near(self._numbers([row] * len(others)), self._numbers(others))
        return list(zip(self.rows[found.j].tolist(), found.similarity.tolist(), strict=True))

    def similarities(self, i: NDArray[np.int64], j: NDArray[np.int64]) -> NDArray[np.float32]:
        """``[m]``: the cosines of two crowded rows each, by their places in ``rows``; NaN where they are not near."""
        found, known = self._near(i, j), np.full(len(i), np.nan, np.float32)
        if len(found):
            order = np.lexsort((found.j, found.i))
            at = Pairs(found.i[order], found.j[order], found.similarity[order]).places(i, j)
            known[at >= 0] = found.similarity[order[at[at >= 0]]]
        return known

    def near_among(self, rows: Sequence[int], others: Sequence[int]) -> Iterator[tuple[int, int, float]]:
        """``(row, other, cosine)`` of what is near among ``rows`` and ``others``, all in the crowd, as the join has it.

        One product compares all with all, which takes a fraction of the time of asking for one after the other.
        """
        found = self.pairs_among(self._numbers(rows), self._numbers(others))
        yield from zip(
            self.rows[found.i].tolist(), self.rows[found.j].tolist(), found.similarity.tolist(), strict=True
        )

    def pairs_among(self, i: NDArray[np.int64], j: NDArray[np.int64]) -> Pairs:
        """Likewise of places in ``rows``: pairs of one of ``i`` and one of ``j``, in no order; each has itself."""
        found = [Pairs.empty()]
        for start in range(0, len(i) if len(j) else 0, _TILE):
            some = i[start : start + _TILE]
            unit = unit_rows(self.embeddings, self.places[some])
            for others in np.array_split(j, -(-len(some) * len(j) // _CROWD_ELEMENTS) or 1):
                a, b = np.nonzero(unit @ unit_rows(self.embeddings, self.places[others]).T >= self._lowest)
                found.append(self._near(some[a], others[b]))
        one, other = np.concatenate([pairs.i for pairs in found]), np.concatenate([pairs.j for pairs in found])
        return Pairs(one, other, np.concatenate([pairs.similarity for pairs in found]))

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
        found = verified(self.embeddings, self.places[i], self.places[j], self.threshold)
        return Pairs(np.searchsorted(self.places, found.i), np.searchsorted(self.places, found.j), found.similarity)

    @property
    def _lowest(self) -> float:
        return candidate_threshold(self.threshold, self.embeddings.shape[1])


def candidate_threshold(threshold: float, d: int) -> float:
    """Below ``threshold`` by more than a float32 product of unit rows can err, in any order of summation."""
    return threshold - (d + 8) * 2.0**-23


def unit_rows(embeddings: NDArray, chosen: NDArray[np.int64] | slice) -> NDArray[np.float32]:
    """The chosen rows as float32 unit rows."""
    rows = as_float32(embeddings[chosen])
    norm = np.sqrt(np.einsum("nd,nd->n", rows, rows, dtype=np.float64))
    if not np.isfinite(norm).all():
        bad = int(np.arange(len(embeddings))[chosen][np.argmin(np.isfinite(norm))])
        raise ValueError(f"embedding of row {bad} is not finite")
    return (rows / np.where(norm == 0, 1, norm)[:, None]).astype(np.float32, copy=False)


def as_float32(rows: NDArray) -> NDArray[np.float32]:
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


def unit_chunks(embeddings: NDArray, first: int, last: int, size: int) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """The unit rows of the embeddings ``first … last``, ``size`` at a time, each with the number of the first."""
    for start in range(first, last, size):
        yield start, unit_rows(embeddings, slice(start, min(start + size, last)))


def surely_near(
    embeddings: NDArray, i: NDArray[np.int64], j: NDArray[np.int64], threshold: float
) -> NDArray[np.bool_]:
    """Which of many pairs among few rows are near by more than float32 can err: a product of the rows tells."""
    involved = np.zeros(len(embeddings), bool)
    involved[i] = involved[j] = True
    rows, place = np.flatnonzero(involved), np.cumsum(involved, dtype=np.int32) - 1
    unit = unit_rows(embeddings, rows)
    return (unit @ unit.T)[place[i], place[j]] >= 2 * threshold - candidate_threshold(threshold, unit.shape[1])


def verified(
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
    x, y = as_float32(x), as_float32(y)
    with np.errstate(all="ignore"):
        x_norm, y_norm = np.einsum("nd,nd->n", x, x), np.einsum("nd,nd->n", y, y)
        cosine = np.einsum("nd,nd->n", x, y) / np.sqrt(x_norm * y_norm)
    # Products of smaller rows have lost digits, those of larger ones may have left float32's range.
    in_range = (np.minimum(x_norm, y_norm) > 1e-18) & (np.maximum(x_norm, y_norm) < 1e18)
    return ~in_range | (cosine >= candidate_threshold(threshold, x.shape[1]))

