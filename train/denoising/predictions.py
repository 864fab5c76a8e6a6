"""A denoiser's output in every space: ε, v, x̂_0 and velocity, from the schedule's coefficients at t. Pure functions.

With ``x_t = a x_0 + b ε``, ``a`` the signal and ``b`` the noise coefficient (``coefficients.py``), a model predicts

- ``epsilon``: ``ε``;
- ``v_prediction``: ``v = a ε − b x_0``, where ``a² + b² = 1`` (Salimans and Ho, ICLR 2022);
- ``sample``: ``x_0``;
- ``velocity``: ``u = ε − x_0``, flow matching's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from train.denoising.coefficients import Coefficients

SPACES = ("epsilon", "v_prediction", "sample", "velocity")


def check_space(space: str) -> str:
    """The space, if it is one of :data:`SPACES`.

    Raises:
        ValueError: it is not.
    """
    if space not in SPACES:
        raise ValueError(f"unknown prediction type {space!r}: expected {', '.join(SPACES)}")
    return space


@dataclass(frozen=True)
class Prediction:
    """What a model said of ``x_t``.

    Attributes:
        output: ``[n, ...]`` as the model gave it.
        x_t: the same shape, the noised latents that it was given.
        at: the coefficients of ``x_t``.
        space: what ``output`` is, one of :data:`SPACES`.
    """

    output: Tensor
    x_t: Tensor
    at: Coefficients
    space: str

    def __getitem__(self, rows: Any) -> Prediction:
        """Of some images, where the coefficients are those of all."""
        return replace(self, output=self.output[rows], x_t=self.x_t[rows])

    def guided_from(self, uncond: Prediction, scale: float) -> Prediction:
        """Classifier-free guidance, which is the same in every space: ``uncond + scale (this − uncond)``."""
        return replace(self, output=uncond.output + scale * (self.output - uncond.output))

    @property
    def eps(self) -> Tensor:
        """``ε̂``, like ``output``."""
        return to_eps(self.output, self.x_t, self.at, self.space)

    @property
    def compared(self) -> Tensor:
        """What the magnitude compares, like ``output``: ``ε̂``, of a flow-matching model the velocity.

        With ``x_t = (1−σ) x_0 + σ ε`` the difference of two ``ε̂`` is ``(1−σ)`` times that of two velocities, which
        vanishes at ``σ = 1``, where memorization is detected. ``‖Δû‖ = ‖Δx̂_0‖/σ`` does not.
        """
        return self.output if self.space == "velocity" else self.eps

    @property
    def x0(self) -> Tensor:
        """``x̂_0``; of a v-prediction it stands where the signal is nought, too."""
        return to_x0(self.output, self.x_t, self.at, self.space)

    @property
    def velocity(self) -> Tensor:
        """``û = ε̂ − x̂_0``."""
        return self.output if self.space == "velocity" else self.eps - self.x0


def to_eps(output: Tensor, x_t: Tensor, at: Coefficients, space: str) -> Tensor:
    """A denoiser's output as the noise it predicts; ``epsilon`` is returned as it is.

    Args:
        output: ``[n, ...]`` what the denoiser returned.
        x_t: the same shape.
        at: the coefficients of ``x_t``; the noise coefficient is above 0.
        space: one of :data:`SPACES`.

    Returns:
        In ``output``'s dtype.

    Raises:
        ValueError: another space.
    """
    if check_space(space) == "epsilon":
        return output
    a, b = at.signal, at.noise
    if space == "v_prediction":
        eps = a * output + b * x_t
    elif space == "velocity":
        eps = (x_t + a * output) / (a + b)
    else:
        eps = (x_t - a * output) / b
    return eps.to(output.dtype)


def to_x0(output: Tensor, x_t: Tensor, at: Coefficients, space: str) -> Tensor:
    """A denoiser's output as the latents it predicts, ``x̂_0``; the arguments are those of :func:`to_eps`."""
    a, b = at.signal, at.noise
    if check_space(space) == "v_prediction":
        return a * x_t - b * output
    if space == "velocity":
        return (x_t - b * output) / (a + b)
    return output if space == "sample" else x0_from_eps(x_t, output, at)


def x0_from_eps(x_t: Tensor, eps: Tensor, at: Coefficients) -> Tensor:
    """``x̂_0 = (x_t − b ε) / a``."""
    return (x_t - at.noise * eps) / at.signal


def output_per_eps(space: str, at: Coefficients) -> float:
    """``∂output/∂ε`` at a fixed ``x_t``: what a correction of ε is worth in the model's own parametrisation.

    ``epsilon``: 1; ``v_prediction``: ``1/a``; ``sample``: ``−b/a``; ``velocity``: ``1 + b/a``.

    Raises:
        ValueError: another space.
    """
    a, b = at.signal, at.noise
    return {"epsilon": 1.0, "v_prediction": 1 / a, "sample": -b / a, "velocity": 1 + b / a}[check_space(space)]
