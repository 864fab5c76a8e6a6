"""What a kept sample's json says of the copies that were dropped for it. It adds up, over any number of curations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from curate.decisions.rules import Verdicts
from curate.decisions.settled import OF_ITS_IMAGE
from curate.reading.captions import texts_of
from curate.reading.samples import Sample


def duplicates_of(account: Mapping[str, Any]) -> int:
    """How many copies earlier curations dropped for a sample, by its account; 0 where that says nothing of use."""
    number = account.get("duplicates")
    return number if type(number) is int and 0 <= number < 1 << 53 else 0


def copies_dropped(verdicts: Verdicts, before: NDArray[np.int64]) -> NDArray[np.int64]:
    """int64 ``[n]``: how many copies of its image each row stands for, with those that the dropped ones stood for
    themselves, ``before`` ``[n]``.
    """
    copies = verdicts.dropped_for(*OF_ITS_IMAGE)
    total = np.zeros(len(copies), np.int64)
    np.add.at(total, verdicts.kept_by[copies], 1 + before[copies])
    return total


def added_to(sample: Sample, duplicates: int, captions: Sequence[str]) -> dict[str, Any]:
    """The account that a sample came with, and what was dropped for it now.

    Args:
        sample: as it was read.
        duplicates: copies of it that were dropped.
        captions: theirs; those that the sample has already stay single.
    """
    before = sample.account
    pooled = [*texts_of(before.get("captions")), *(text for text in captions if text not in sample.captions)]
    captions = list(dict.fromkeys(pooled))
    return {**before, "duplicates": duplicates_of(before) + duplicates, "captions": captions}
