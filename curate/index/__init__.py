"""TrainingIndex: what curation leaves for the sampler and for search, and the scale of its similarities."""

from __future__ import annotations

from typing import TYPE_CHECKING

from afresh.lazy import handed_on

if TYPE_CHECKING:
    from curate.index.calibration import Calibration
    from curate.index.training_index import TrainingIndex

__all__ = [
    "Calibration",
    "TrainingIndex",
]

__getattr__ = handed_on(
    __name__,
    {
        "Calibration": "calibration",
        "TrainingIndex": "training_index",
    },
)
