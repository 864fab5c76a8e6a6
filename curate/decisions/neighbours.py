"""Who was kept near whom: near pairs by thing, looked up as a decision goes on."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from curate.neighbors.components import components
from curate.neighbors.verify import Crowd, Pairs

AHEAD = 256  # crowded things that are looked up at a time
PAIRS_AHEAD = 1 << 20  # and with how many kept ones


class Kept:
    """Which of ``rows`` rows were kept of each of ``things`` things, in the order in which they were: as linked lists
    in arrays, since a list of Python's for each would take a hundred bytes and more.
    """

    def __init__(self, things: int, rows: int):
        number = "i4" if rows < 1 << 31 else "i8"
        self._first, self._last = (np.full(things, -1, number).data for _ in range(2))
        self._next = np.full(rows, -1, number).data

    def __contains__(self, thing: int) -> bool:
        return self._first[thing] >= 0

    def add(self, thing: int, row: int) -> None:
        """A row that shows this thing was kept."""
        if self._first[thing] < 0:
            self._first[thing] = row
        else:
            self._next[self._last[thing]] = row
        self._last[thing] = row

    def first(self, thing: int) -> int:
        """The one that was kept first; -1 where none was."""
        return self._first[thing]

    def of(self, thing: int) -> list[int]:
        """All of them."""
        found, row = [], self._first[thing]
        while row >= 0:
            found.append(row)
            row = self._next[row]
        return found


class Neighbours:
    """Near pairs of ``n`` things, by thing, and which of ``rows`` rows were kept of each thing."""

    def __init__(self, pairs: Pairs, n: int, rows: int):
        number = np.int32 if n < 1 << 31 else np.int64
        i, j = pairs.i.astype(number), pairs.j.astype(number)
        a, b = np.concatenate([i, j]), np.concatenate([j, i])
        order = np.lexsort((b, a)).astype(np.int32 if len(a) < 1 << 31 else np.int64)
        self._b = b[order]
        del b
        self._start: NDArray[Any] = np.zeros(n + 1, np.int32 if len(a) < 1 << 31 else np.int64)
        np.cumsum(np.bincount(a, minlength=n), out=self._start[1:])
        del a
        self._similarity = np.concatenate([pairs.similarity, pairs.similarity])[order]
        self._starts = self._start.data
        self._crowd = pairs.crowd
        self._things, self._rows = n, rows
        self._kept_of_crowd: list[int] = []
        self._asked, self._next = np.empty(0, np.int64).data, 0  # what is left of it
        self._near_kept: dict[int, list[tuple[int, float]]] = {}  # of the crowd, by the things looked up last

    @cached_property
    def kept(self) -> Kept:
        """Which rows were kept of each thing."""
        return Kept(self._things, self._rows)

    def has_company(self, things: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of the rows ``things`` ``[rows]`` show a thing that another row shows or that is near another."""
        company = self._start[1:] > self._start[:-1]
        if self._crowd is not None:
            company[self._crowd.rows] = True
        company |= np.bincount(things, minlength=len(company)) > 1
        return company[things]

    def will_be_asked(self, things: NDArray[np.int64], order: NDArray[np.integer]) -> None:
        """In which order ``kept_near`` will be asked, if it is, so that crowded things are looked up many at a time.

        Args:
            things: ``[rows]``, what each row shows.
            order: the rows in that order.
        """
        if self._crowd is not None:
            crowded = np.zeros(len(self._start) - 1, bool)
            crowded[self._crowd.rows] = True
            self._asked, self._next = things[order[crowded[things][order]]].data, 0

    def keep(self, thing: int, row: int) -> None:
        """A row that shows this thing was kept."""
        if self._crowd is not None and thing in self._crowd and thing not in self.kept:
            self._kept_of_crowd.append(thing)
            self._note_kept_near(list(self._near_kept), [thing], self._crowd)
        self.kept.add(thing, row)

    def kept_near(self, thing: int) -> list[tuple[int, float]]:
        """``(row, similarity)`` of the rows kept of the thing itself and of the things near it."""
        return [(row, similarity) for other, similarity in self.kept_things_near(thing) for row in self.kept.of(other)]

    def kept_things_near(self, thing: int) -> list[tuple[int, float]]:
        """``(thing, similarity)`` of the thing itself and the things near it, as far as a row was kept of them."""
        some = slice(self._starts[thing], self._starts[thing + 1])
        near = [(thing, 1.0)]
        if some.start < some.stop:
            near += zip(self._b[some].tolist(), self._similarity[some].tolist(), strict=True)
        if self._crowd is not None and thing in self._crowd:
            if thing not in self._near_kept:
                self._look_up(thing, self._crowd)
            near += self._near_kept[thing]
        return [(other, similarity) for other, similarity in near if other in self.kept]

    def _look_up(self, thing: int, crowd: Crowd) -> None:
        """Find what was kept near a crowded thing, and near those that will be asked for next."""
        while self._next < len(self._asked) and self._asked[self._next] != thing:
            self._next += 1
        ahead = max(1, min(AHEAD, PAIRS_AHEAD // max(1, len(self._kept_of_crowd))))
        self._near_kept = {one: [] for one in (thing, *self._asked[self._next : self._next + ahead])}
        self._note_kept_near(list(self._near_kept), self._kept_of_crowd, crowd)

    def _note_kept_near(self, things: list[int], kept: list[int], crowd: Crowd) -> None:
        for thing, other, similarity in crowd.near_among(things, kept):
            if thing != other:
                self._near_kept[thing].append((other, similarity))

    def similarity(self, a: int, b: int) -> float:
        """Of a near pair; 1 for one thing, NaN for what is not near."""
        if a == b:
            return 1.0
        if self._crowd is not None and a in self._crowd and b in self._crowd:
            return dict(self._crowd.near(a, [b])).get(b, float("nan"))
        start, stop = self._starts[a], self._starts[a + 1]
        place = start + int(np.searchsorted(self._b[start:stop], b))
        return float(self._similarity[place]) if place < stop and self._b[place] == b else float("nan")

    def components(self) -> NDArray[np.int64]:
        """``[n]``: the smallest thing that each is linked to."""
        a, b = np.repeat(np.arange(len(self._start) - 1, dtype=self._b.dtype), np.diff(self._start)), self._b
        if self._crowd is not None:
            links = np.array(list(self._crowd.links()), np.int64).reshape(-1, 2)
            a, b = np.concatenate([a, links[:, 0]]), np.concatenate([b, links[:, 1]])
        return components(a, b, len(self._start) - 1)

