"""What a signal of memorization says it needs, sees at an evaluation, and gives back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from train.denoising.coefficients import Coefficients

LooksAt = Literal["every step", "first step", "no step"]


@dataclass(frozen=True)
class Seen:
    """One evaluation of the denoiser for some images, in float32: in ε-space, of flow-matching models as velocities
    (:attr:`~train.denoising.predictions.Prediction.compared`), which then stand where ``ε`` is written.
    """

    x_t: Tensor
    """``[n, c, h, w]``; the initial noise at the first step and at a noise level of a signal's own."""
    t: int
    at: Coefficients
    """Of ``x_t``."""
    eps_cond: Tensor
    """``ε(x_t, e_p)``, ``[n, c, h, w]``."""
    eps_uncond: Tensor | None
    """``ε(x_t, e_∅)``; None where no signal asked for it."""
    attention: Mapping[str, Tensor]
    """Cross-attention layer → ``[n, tokens]``: the attention to each token under the prompt, averaged over heads and
    latents; empty where no signal asked for it."""
    on_noise: bool = False
    """Whether this is the initial noise at a signal's :attr:`~Signal.noise_level` rather than a step."""
    end_attention: Tensor | None = None
    """``[n, h, w]``: the attention to the prompt's end token in the finest down blocks, at the last step scored; None
    at the others, and where no signal has ``end_attention = True``, which need not be there otherwise."""

    @property
    def alpha_bar(self) -> float:
        """``ᾱ_t``."""
        return self.at.alpha_bar


class Signal(Protocol):
    """What :func:`train.memorization.scoring` computes; higher means more likely memorized."""

    name: str
    unconditional: bool
    """Reads ``eps_uncond``."""
    attention: bool
    """Reads ``attention``."""

    compares_seeds: bool
    """Needs at least two seeds."""

    @property
    def looks_at(self) -> LooksAt:
        """Which steps of the trajectory it observes, of those that are scored."""
        ...

    @property
    def noise_level(self) -> float | None:
        """Where it observes the initial noise too, after the steps: a share of the schedule, as 0.8 for t = 800 of
        1,000. The denoiser is told that noise is a half-denoised image, and shows what it would make of it.
        """
        ...

    def observe(self, seen: Seen) -> Tensor:
        """What is kept of one evaluation: ``[n, …]``."""
        ...

    def combine(self, observed: Tensor) -> Tensor:
        """All observations of one prompt ``[seeds, observations, …]`` → ``[seeds]``."""
        ...

    def of_prompt(self, values: Tensor) -> Tensor:
        """``[seeds]`` → the prompt's value, of no dimension."""
        ...

