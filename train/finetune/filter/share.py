"""Whether the filter leaves out more than it is meant to, seen after a few batches."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from train.finetune.config import FilterConfig

LATELY = 1000
"""Visits after which an older one counts by a factor e less."""
SURE = 3.0
"""Standard errors by which the share lies above the limit before anything is said."""


class DroppedShare:
    """The share of the latest visits that were left out.

    Args:
        most: from which share on it is too large, in (0, 1].
    """

    def __init__(self, most: float) -> None:
        self.most = most
        self.visits = self.dropped = 0.0
        self.said = False

    def add(self, visits: int, dropped: int) -> bool:
        """Take in the visits of a step; whether the share is too large, True once."""
        fade = math.exp(-visits / LATELY)
        self.visits, self.dropped = self.visits * fade + visits, self.dropped * fade + dropped
        error = math.sqrt(self.most * (1 - self.most) / self.visits)
        tells = not self.said and self.dropped / self.visits > self.most + SURE * error
        self.said |= tells
        return tells

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors to store in a checkpoint."""
        return {"lately": torch.tensor([self.visits, self.dropped, self.said], dtype=torch.float64)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over what :meth:`state_dict` gave."""
        self.visits, self.dropped, said = state["lately"].tolist()
        self.said = bool(said)


def what_to_change(policy: FilterConfig) -> str:
    """How a filter under these settings is made to leave out less."""
    if policy.threshold is not None:
        return "leave filter.threshold out, and it is found in the run, or raise it: it fits another model or set"
    if not policy.calibrate.window:
        return "set filter.calibrate.window above 0, and the threshold follows the model, or raise calibrate.quantile"
    return "raise filter.calibrate.quantile, or leave copies out of the set first (afresh-curate dedup)"
