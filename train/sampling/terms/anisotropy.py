"""Anisotropy minimisation: change the prompt's embeddings until neither magnitude nor angle is that of a memorized one.

Source: Asthana and Belagiannis, "Detecting and Mitigating Memorization in Diffusion Models through Anisotropy of the
Log-Probability" (ICLR 2026, arXiv 2601.20642), whose mitigation adapts the prompt by the paper's own metric. On the
noise ``x_T``, which stands for a latent at both ends of the schedule,

    s(e) = γ_1 cos(ε(x_T, e) − ε(x_T, e_∅), ε(x_T, e_∅))|_{t ≈ 0} + γ_2 ‖ε(x_T, e) − ε(x_T, e_∅)‖₂|_{t ≈ T}

is minimised from ``e = e_p`` over the embeddings of all tokens but the first, until ``s ≤ target``.

The released notebook holds another method (of the noise, by sharpness). Optimiser, number of steps and target are
therefore those of the prompt-embedding minimisation (Wen et al., ICLR 2024).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from train.denoising.conditioning import Conditioning
from train.memorization.signals.anisotropy import LOW_NOISE, PUBLISHED_ELEMENTS
from train.memorization.signals.magnitude import magnitude
from train.sampling.config import AnisotropyConfig, configured
from train.sampling.guidance import Change, Run, Start, StepFunction
from train.sampling.terms.prompt_embedding import minimised, with_embeddings


class AnisotropyMinimisation:
    """A term that works before the first step only; see the module.

    The trace of the first step gets ``anisotropy`` and ``anisotropy_after``, on the scale of the signal of that name,
    and ``anisotropy_steps``. Images at or below the target keep every bit.

    Args:
        config: settings.
        overrides: fields of :class:`AnisotropyConfig` to set otherwise.
    """

    name = "anisotropy"

    def __init__(self, config: AnisotropyConfig | None = None, **overrides: Any) -> None:
        self.config = configured(AnisotropyConfig, config, overrides)

    def start(self, run: Run) -> StepFunction:
        """Nothing happens after the first step."""
        return lambda state: None

    def prepare(self, start: Start) -> Change | None:
        """New embeddings for the images above the target.

        Raises:
            ValueError: there is no text, or no classifier-free guidance.
        """
        found = minimised(start, self.config, "anisotropy", lambda rows: own_anisotropy(start, rows, self.config))
        embeds, before, after, steps = found
        columns = {"anisotropy": before, "anisotropy_after": after, "anisotropy_steps": steps}
        return with_embeddings(start, embeds, steps, columns)


def own_anisotropy(start: Start, rows: Tensor, c: AnisotropyConfig) -> Callable[[Conditioning], Tensor]:
    """``s [k]`` of the images ``rows`` as a function of their conditioning."""
    assert start.uncond is not None and start.denoise_at is not None
    x_t, uncond = start.x_t[rows].clone(), start.uncond[rows].clone()
    high, low = start.denoise, start.denoise_at(round(LOW_NOISE * start.run.train_timesteps))
    eps_high, eps_low = high(x_t, uncond, rows), low(x_t, uncond, rows)

    def s(cond: Conditioning) -> Tensor:
        # The cosine is one over the channels of each latent, as the signal's is.
        cosine = torch.cosine_similarity(low(x_t, cond, rows) - eps_low, eps_low, dim=1).flatten(1).mean(1)
        m = magnitude(high(x_t, cond, rows), eps_high, form="rms") * PUBLISHED_ELEMENTS**0.5
        return c.cosine_weight * cosine + c.magnitude_weight * m

    return s
