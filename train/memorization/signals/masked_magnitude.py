"""The masked magnitude: how much the prompt decides where the image is a copy (Bright Ending).

Source: Chen et al., "Exploring Local Memorization in Diffusion Models via Bright Ending Attention" (ICLR 2025, arXiv
2410.21665). With ``a`` the attention to the end token at the last step, which is bright where a region is copied, and N
its elements:

    m̃ = (1/T) Σ_t ‖a ∘ (ε(x_t, e_p) − ε(x_t, e_∅))‖₂ / ((1/N) Σ_i a_i)

A mask of one value gives the magnitude itself. The division by the mask's mean is taken from that wish; it was not held
against the paper's own formula.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from train.memorization.signals.magnitude import Form

if TYPE_CHECKING:
    from train.memorization.signals.protocol import LooksAt, Seen


@dataclass(frozen=True)
class MaskedMagnitude:
    """The formula above, over the steps that are scored; see the module.

    The mask is that of the last step scored: the paper's, where all steps of the trajectory are. It is brought to the
    size of the latents.
    """

    form: Form = "l2"

    name = "masked_magnitude"
    looks_at: ClassVar[LooksAt] = "every step"
    noise_level: ClassVar[float | None] = None
    unconditional = end_attention = True
    attention = compares_seeds = False

    def observe(self, seen: Seen) -> Tensor:
        """``[n, 2, h, w]``: the square of the difference, summed over the channels (averaged in the form rms), and the
        mask; nought where it is not known yet.
        """
        assert seen.eps_uncond is not None
        squares = (seen.eps_cond - seen.eps_uncond).square()
        squares = squares.sum(1) if self.form == "l2" else squares.mean(1) / squares[0, 0].numel()
        mask = torch.zeros_like(squares)
        if seen.end_attention is not None:
            given = seen.end_attention.unsqueeze(1).to(squares)
            mask = interpolate(given, squares.shape[1:], mode="bilinear", align_corners=False).squeeze(1)
        return torch.stack([squares, mask], dim=1)

    def combine(self, observed: Tensor) -> Tensor:
        """``[seeds, steps, 2, h, w]`` → ``[seeds]``."""
        mask = observed[:, -1:, 1]
        masked = (mask.square() * observed[:, :, 0]).sum((2, 3)).sqrt() / mask.mean((2, 3)).clamp_min(1e-12)
        return masked.mean(1)

    def of_prompt(self, values: Tensor) -> Tensor:
        """The mean."""
        return values.mean()
