"""The near-duplicate join: pairs within a set, and the nearest in another one, exactly."""

from __future__ import annotations

from typing import TYPE_CHECKING

from afresh.lazy import handed_on

if TYPE_CHECKING:
    from curate.neighbors.cells import find_pairs_in_cells
    from curate.neighbors.join import find_pairs
    from curate.neighbors.nearest import find_nearest
    from curate.neighbors.recall import recall
    from curate.neighbors.verify import Crowd, Pairs

__all__ = [
    "Crowd",
    "Pairs",
    "find_nearest",
    "find_pairs",
    "find_pairs_in_cells",
    "recall",
]

__getattr__ = handed_on(
    __name__,
    {
        "Crowd": "verify",
        "Pairs": "verify",
        "find_nearest": "nearest",
        "find_pairs": "join",
        "find_pairs_in_cells": "cells",
        "recall": "recall",
    },
)
