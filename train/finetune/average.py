"""The exponential moving average of the weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Average:
    """An exponential moving average of some parameters.

    Args:
        parameters: what is averaged; the average starts from their present values.
        decay: in [0, 1); 0 keeps no average.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter], decay: float) -> None:
        self.parameters, self.decay = list(parameters), decay
        self.values: list[Tensor] = [p.detach().clone() for p in self.parameters] if decay else []

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """Move towards the present weights, after the ``updates``-th optimizer step that changed them.

        Warm-up as in the literature: the average follows closely while the weights still move fast.
        """
        if self.values:
            decay = min(self.decay, (1 + updates) / (10 + updates))
            torch._foreach_lerp_(self.values, [p.detach() for p in self.parameters], 1 - decay)

    @torch.no_grad()
    def copy_to_parameters(self) -> None:
        """Put the average into the parameters; nothing where none is kept."""
        if self.values:
            torch._foreach_copy_([p.detach() for p in self.parameters], self.values)

    def state_dict(self) -> dict[str, list[Tensor]]:
        """What a checkpoint stores."""
        return {"values": self.values}

    def load_state_dict(self, state: dict[str, list[Tensor]]) -> None:
        """Take over what :meth:`state_dict` gave."""
        for mine, saved in zip(self.values, state["values"], strict=True):
            mine.copy_(saved)
