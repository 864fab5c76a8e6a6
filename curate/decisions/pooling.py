"""The captions that kept rows inherit from dropped copies, put together when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Pooled(Mapping[int, list[str]]):
    """By kept row the captions of what was dropped for it; rows that inherit none are not in it.

    Attributes:
        dropped: int64 ``[m]``, copies that were dropped, by the row they were dropped for, in the order of preference.
        starts: int64 ``[k + 1]``, where those of each kept row begin.
        kept: int64 ``[k]``, ascending, rows for which some were dropped.
        differs: bool ``[n]``, whether a dropped row's caption is neither equal nor near that of its stand-in.
        captions: of all rows.
        others: further captions of all rows; None has none.
    """

    dropped: NDArray[np.int64]
    starts: NDArray[np.int64]
    kept: NDArray[np.int64]
    differs: NDArray[np.bool_]
    captions: Sequence[str]
    others: Sequence[Sequence[str]] | None

    @classmethod
    def of(
        cls,
        copies: NDArray[np.bool_],
        kept_by: NDArray[np.integer],
        rank: NDArray[np.integer],
        differs: NDArray[np.bool_],
        captions: Sequence[str],
        others: Sequence[Sequence[str]] | None,
    ) -> Pooled:
        """From verdicts on n rows: which are dropped copies, for whom, and the rank of each in the order."""
        dropped = np.flatnonzero(copies & differs if others is None else copies)
        dropped = dropped[np.lexsort((rank[dropped], kept_by[dropped]))]
        kept, starts = np.unique(kept_by[dropped].astype(np.int64), return_index=True)  # as rows are asked for
        return cls(dropped, np.append(starts, len(dropped)), kept, differs, captions, others)

    def __getitem__(self, row: int) -> list[str]:
        if captions := self._of(int(np.searchsorted(self.kept, row)), row):
            return captions
        raise KeyError(row)

    def __iter__(self) -> Iterator[int]:
        return (row for place, row in enumerate(self.kept.tolist()) if self._of(place, row))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _of(self, place: int, row: int) -> list[str]:
        if place == len(self.kept) or self.kept[place] != row:
            return []
        dropped = self.dropped[self.starts[place] : self.starts[place + 1]].tolist()
        others = self.others
        known = {self.captions[row], *(others[row] if others is not None else ())}
        found: dict[str, None] = {}  # each once, in their order
        for copy in dropped:
            own = [self.captions[copy]] if self.differs[copy] and self.captions[copy].strip() else []
            further = others[copy] if others is not None else ()
            found.update(dict.fromkeys(text for text in (*own, *further) if text not in known))
        return list(found)
