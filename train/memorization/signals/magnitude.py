"""The text-conditional noise magnitude: one function for the training filter, the detector and the sampler.

Source: Wen et al., "Detecting, Explaining, and Mitigating Memorization in Diffusion Models" (ICLR 2024), eq.
2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from train.memorization.signals.protocol import LooksAt, Seen


Form = Literal["l2", "rms"]


def magnitude(eps_cond: Tensor, eps_uncond: Tensor, *, form: Form = "l2") -> Tensor:
    """``m = ‖ε(x_t, e_p) − ε(x_t, e_∅)‖₂`` of each image, over all dimensions but the first.

    Args:
        eps_cond: ``[n, ...]`` prediction under the prompt, any float dtype: in ε-space (see
            :func:`~train.denoising.predictions.to_eps`), of flow-matching models the velocity.
        eps_uncond: the same shape, under the empty prompt.
        form: ``"l2"``, the papers' scale, or ``"rms"`` = ``l2 / sqrt(elements per image)``, which does not
            depend on the size of the latents.

    Returns:
        ``[n]`` float32, ``≥ 0``; differentiable. The difference and its norm are computed in float32.

    Raises:
        ValueError: the shapes differ or ``form`` is unknown.
    """
    if eps_cond.shape != eps_uncond.shape:
        raise ValueError(f"eps_cond {tuple(eps_cond.shape)} and eps_uncond {tuple(eps_uncond.shape)} differ")
    if form not in ("l2", "rms"):
        raise ValueError(f"unknown form {form!r} of the magnitude: choose l2 or rms")
    difference = (eps_cond.float() - eps_uncond.float()).flatten(1)
    m = torch.linalg.vector_norm(difference, dim=1)
    return m / difference.shape[1] ** 0.5 if form == "rms" else m


@dataclass(frozen=True)
class MeanMagnitude:
    """The detection score of Wen et al., §4: the magnitude averaged over the steps, and over the seeds of a prompt."""

    form: Form = "l2"

    name = "magnitude"
    looks_at: ClassVar[LooksAt] = "every step"
    noise_level: ClassVar[float | None] = None
    unconditional = True
    attention = compares_seeds = False

    def observe(self, seen: Seen) -> Tensor:
        """``[n]``."""
        assert seen.eps_uncond is not None
        return magnitude(seen.eps_cond, seen.eps_uncond, form=self.form)

    def combine(self, observed: Tensor) -> Tensor:
        """``[seeds, steps]`` → ``[seeds]``."""
        return observed.mean(dim=1)

    def of_prompt(self, values: Tensor) -> Tensor:
        """The mean."""
        return values.mean()

