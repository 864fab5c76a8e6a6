"""What ``x_t`` is made of: the signal and the noise coefficient at t."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Coefficients:
    """What ``x_t`` is made of: ``x_t = signal · x_0 + noise · ε``.

    Variance-preserving schedules have ``signal = √ᾱ_t`` and ``noise = √(1−ᾱ_t)``, flow matching ``1−σ`` and ``σ``.
    Numbers, or tensors that broadcast against latents ``[n, c, h, w]``.
    """

    signal: Any
    noise: Any

    @classmethod
    def of_alpha_bar(cls, alpha_bar: float | Tensor) -> Coefficients:
        """Of a variance-preserving schedule.

        Args:
            alpha_bar: ``ᾱ_t`` in [0, 1]: one number, which is taken in double precision (near t = 0, 1 − ᾱ is small),
                or a tensor that broadcasts against latents.
        """
        if isinstance(alpha_bar, Tensor):
            return cls(alpha_bar.sqrt(), (1 - alpha_bar).sqrt())
        return cls(alpha_bar**0.5, (1 - alpha_bar) ** 0.5)

    @property
    def alpha_bar(self) -> Any:
        """The share of the signal in the power, ``signal² / (signal² + noise²)``: ``ᾱ_t`` where variance is kept."""
        power = self.signal**2
        return power / (power + self.noise**2)
