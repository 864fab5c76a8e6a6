"""The exponential moving average of the weights, which is what a run saves and shows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class Average:
    """An exponential moving average of some parameters.

    Args:
        parameters: what is averaged; the average starts from their present values.
        decay: in [0, 1); 0 keeps no average.
        device: where the average is kept; None keeps it beside the parameters, where updating it takes one pass.
            Elsewhere (the CPU) it costs a copy of the weights at every step and none of the accelerator's memory.
    """

    def __init__(
        self, parameters: Sequence[torch.nn.Parameter], decay: float, device: torch.device | str | None = None
    ) -> None:
        self.parameters, self.decay = list(parameters), decay
        self.away = device is not None
        self.values: list[Tensor] = []
        if decay:
            self.values = [p.detach().to(device, copy=True) for p in self.parameters]

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """Move towards the present weights, after the ``updates``-th optimizer step that changed them.

        Warm-up as in the literature: the average follows closely while the weights still move fast.
        """
        if not self.values:
            return
        decay = min(self.decay, (1 + updates) / (10 + updates))
        if self.away:  # one at a time: a second copy of all weights is never made
            for mean, parameter in zip(self.values, self.parameters, strict=True):
                mean.lerp_(parameter.detach().to(mean.device), 1 - decay)
        else:
            torch._foreach_lerp_(self.values, [p.detach() for p in self.parameters], 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The parameters hold the average within the block, and their own values again after it, bit for bit."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def copy_to_parameters(self) -> None:
        """Put the average into the parameters for good; nothing where none is kept."""
        for mean, parameter in zip(self.values, self.parameters, strict=bool(self.values)):
            parameter.copy_(mean)

    @torch.no_grad()
    def _exchange(self) -> None:
        for mean, parameter in zip(self.values, self.parameters, strict=bool(self.values)):
            own = parameter.detach().clone()
            parameter.copy_(mean)
            mean.copy_(own)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint stores."""
        return {"values": self.values}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave."""
        for mine, saved in zip(self.values, state["values"], strict=True):
            mine.copy_(saved)

