"""Anisotropy of the log-probability: the magnitude at high noise and an angle at low noise, both on pure noise.

Source: Asthana and Belagiannis, "Detecting and Mitigating Memorization in Diffusion Models through Anisotropy of the
Log-Probability" (ICLR 2026). At low noise the log-probability around a memorized image falls off differently in every
direction. There the magnitude tells little, but the guidance ``ε(x, e_p) − ε(x, e_∅)`` lines up with ``ε(x, e_∅)``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from train.memorization.signals.magnitude import magnitude

if TYPE_CHECKING:
    from train.memorization.signals.protocol import LooksAt, Seen


LOW_NOISE = 0.041
"""Where on the schedule the angle is taken: the released code's third last of 50 steps, t = 41 of 1,000."""
PUBLISHED_ELEMENTS = 4 * 64 * 64
"""Elements of the latents that the published weights were chosen on."""


@dataclass(frozen=True)
class Anisotropy:
    """``γ_1 cos(ε(x_T, e_p) − ε(x_T, e_∅), ε(x_T, e_∅))`` at t ≈ 0 plus ``γ_2 m`` at t ≈ T.

    ``m`` is the L2 magnitude, brought to the scale of latents of 512 × 512 pixels (``m · √(16384 / elements)``), so
    that the weights mean the same on smaller ones.

    Args:
        cosine_weight: ``γ_1``. The released code has 2 for Stable Diffusion 1.4, 0.1 for 2 and 1 for Realistic Vision.
        magnitude_weight: ``γ_2``. There 1, 1 and 2.
        per_latent: as the released code does, the cosine is taken over the channels of each latent and then averaged;
            otherwise over the whole image.
    """

    cosine_weight: float = 2.0
    magnitude_weight: float = 1.0
    per_latent: bool = True

    name = "anisotropy"
    looks_at: ClassVar[LooksAt] = "first step"
    noise_level: ClassVar[float | None] = LOW_NOISE
    unconditional = True
    attention = compares_seeds = False

    def observe(self, seen: Seen) -> Tensor:
        """``[n]``: the magnitude at the first step, the cosine at low noise."""
        assert seen.eps_uncond is not None
        if not seen.on_noise:
            m = magnitude(seen.eps_cond, seen.eps_uncond, form="rms")
            return m * PUBLISHED_ELEMENTS**0.5
        guidance, unconditional = seen.eps_cond - seen.eps_uncond, seen.eps_uncond
        if self.per_latent:
            return torch.cosine_similarity(guidance, unconditional, dim=1).mean((1, 2))
        return torch.cosine_similarity(guidance.flatten(1), unconditional.flatten(1), dim=1)

    def combine(self, observed: Tensor) -> Tensor:
        """``[seeds, 2]`` → ``[seeds]``."""
        m, cosine = observed.unbind(dim=1)
        return self.cosine_weight * cosine + self.magnitude_weight * m

    def of_prompt(self, values: Tensor) -> Tensor:
        """The mean."""
        return values.mean()

