"""The memorization filter for training loops that are not ours: what to import, and nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING

from afresh.lazy import handed_on

if TYPE_CHECKING:
    from train.finetune.config import Calibration
    from train.finetune.filter.own_loop import MemorizationFilter

__all__ = ["Calibration", "MemorizationFilter"]

__getattr__ = handed_on(
    __name__,
    {"Calibration": "/train.finetune.config", "MemorizationFilter": "/train.finetune.filter.own_loop"},
)
