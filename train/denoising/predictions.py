"""A denoiser's output in every space: ε, v, x̂_0, from the schedule's signal and noise coefficients at t."""

from __future__ import annotations

import torch
from torch import Tensor


def to_eps(output: Tensor, x_t: Tensor, alpha_bar_t: Tensor | float, prediction_type: str) -> Tensor:
    """A denoiser's output as the noise it predicts.

    ``epsilon`` is returned as it is; ``v_prediction``: ``ε = √ᾱ_t · v + √(1−ᾱ_t) · x_t``; ``sample``:
    ``ε = (x_t − √ᾱ_t · x_0) / √(1−ᾱ_t)``.

    Args:
        output: ``[n, ...]`` what the denoiser returned.
        x_t: the same shape, the noised latents it was given.
        alpha_bar_t: cumulative alpha in (0, 1): one number, a tensor of no dimension, or ``[n]``.
        prediction_type: the scheduler's ``config.prediction_type``.

    Raises:
        ValueError: another prediction type.
    """
    if prediction_type == "epsilon":
        return output
    signal: Tensor | float
    noise: Tensor | float
    if isinstance(alpha_bar_t, float):  # in double precision: near t = 0, 1 − ᾱ is small
        signal, noise = alpha_bar_t**0.5, (1 - alpha_bar_t) ** 0.5
    else:
        alpha_bar = torch.as_tensor(alpha_bar_t, dtype=torch.float32, device=x_t.device)
        if alpha_bar.ndim == 1:
            alpha_bar = alpha_bar.view(-1, *[1] * (x_t.ndim - 1))
        signal, noise = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    if prediction_type == "v_prediction":
        eps = signal * output + noise * x_t
    elif prediction_type == "sample":
        eps = (x_t - signal * output) / noise
    else:
        raise ValueError(f"unknown prediction type {prediction_type!r}: expected epsilon, v_prediction or sample")
    return eps.to(output.dtype)


def x0_from_eps(x_t: Tensor, eps: Tensor, alpha_bar: float) -> Tensor:
    """``(x_t − √(1−ᾱ_t)·ε) / √ᾱ_t``."""
    return (x_t - (1 - alpha_bar) ** 0.5 * eps) / alpha_bar**0.5


def output_per_eps(prediction_type: str, alpha_bar: float) -> float:
    """``∂output/∂ε`` at a fixed ``x_t``: what a correction of ε is worth in the model's own parametrisation.

    ``epsilon``: 1; ``v_prediction``, from ``ε = √ᾱ_t·v + √(1−ᾱ_t)·x_t``: ``1/√ᾱ_t``; ``sample``:
    ``−√(1−ᾱ_t)/√ᾱ_t``.

    Raises:
        ValueError: another prediction type.
    """
    if prediction_type == "epsilon":
        return 1.0
    if prediction_type == "v_prediction":
        return alpha_bar**-0.5
    if prediction_type == "sample":
        return -((1 - alpha_bar) ** 0.5) * alpha_bar**-0.5
    raise ValueError(f"guidance knows epsilon, v_prediction and sample models, not {prediction_type!r}")

