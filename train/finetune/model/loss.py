"""The loss: what each sample's error counts by its timestep, and the weighted sum of them. Pure functions.

Losses stay per sample until :func:`weighted_loss`, so that the filter's verdict is one more weight.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from train.denoising.schedules import NoiseSchedule
from train.finetune.config import FinetuneConfig


def sample_errors(output: Tensor, target: Tensor, huber_c: float = 0.0, mask: Tensor | None = None) -> Tensor:
    """The error of each sample, ``[n]``.

    Args:
        output, target: ``[n, …]``.
        huber_c: ``c`` of the pseudo-Huber loss ``2c(√(d² + c²) − c)`` (Charbonnier et al., 1997), which is ``d²`` for
            small differences and grows like ``2c|d|``; 0 takes the squared error.
        mask: ``[n, 1, h, w]``, what each place counts; None for all alike. The mean stays one over all places.
    """
    errors = F.mse_loss(output, target, reduction="none")
    if huber_c:
        errors = 2 * huber_c * ((errors + huber_c**2).sqrt() - huber_c)
    if mask is not None:
        errors = errors * mask
    return errors.flatten(1).mean(dim=1)


def counted(output: Tensor, weights: Tensor) -> Tensor:
    """The same output, whose gradient reaches only the samples that count.

    A weight of 0 alone does not stop what is not finite: backwards, 0 times infinity is NaN.

    Args:
        output: ``[n, …]`` of the model.
        weights: ``[n]``, 0 where a sample does not count.
    """
    counts = (weights > 0).view(-1, *[1] * (output.dim() - 1))
    return torch.where(counts, output, output.detach())


def min_snr_weights(snr: Tensor, prediction_type: str, gamma: float) -> Tensor:
    """Min-SNR-γ weights (Hang et al., "Efficient Diffusion Training via Min-SNR Weighting Strategy", ICCV 2023).

    With a timestep's ``SNR`` (``ᾱ_t / (1−ᾱ_t)``), the loss on ``x_0`` is weighted by ``min(SNR, γ)``; on ``ε`` that is
    ``min(SNR, γ)/SNR``, and on ``v``, whose error is ``(SNR + 1)`` times that of ``x_0``, ``min(SNR, γ)/(SNR + 1)``.

    Args:
        snr: ``[n]``; 0 is allowed (zero-terminal-SNR schedules).
        prediction_type: ``epsilon`` or ``v_prediction``.
        gamma: ``γ``; the paper takes 5. 0 leaves all weights at 1.

    Returns:
        ``[n]`` float32.
    """
    snr = snr.float()
    if gamma == 0:
        return torch.ones_like(snr)
    if prediction_type == "v_prediction":
        return snr.clamp(max=gamma) / (snr + 1)
    return (gamma / snr).clamp(max=1.0)  # min(SNR, γ)/SNR without 0/0


def loss_weights(schedule: NoiseSchedule, t: Tensor, config: FinetuneConfig) -> Tensor:
    """What the errors at timesteps ``[n]`` count: ``[n]`` float32, by Min-SNR-γ, or of flow matching by
    ``config.flow``.

    ``sigma_sqrt`` is ``σ⁻²``, ``cosmap`` ``2 / (π (1 − 2σ + 2σ²))`` (Esser et al., ICML 2024, §3.1). An error of the
    ``sample`` is ``σ²`` times that of the velocity.
    """
    if schedule.space != "velocity":
        return min_snr_weights(schedule.snr(t), schedule.space, config.snr_gamma)
    sigma, flow = t.float() / schedule.timesteps, config.flow
    weights = torch.ones_like(sigma)
    if flow.weighting == "sigma_sqrt":
        weights = sigma**-2.0
    elif flow.weighting == "cosmap":
        weights = 2 / (torch.pi * (1 - 2 * sigma + 2 * sigma**2))
    return weights * sigma**2 if flow.error_of == "sample" else weights


def weighted_loss(losses: Tensor, weights: Tensor, nominal_batch: int) -> Tensor:
    """``Σ wᵢ ℓᵢ / nominal batch``; a loss of weight 0 contributes nothing even when it is not finite.

    Args:
        losses: ``[n]`` per-sample losses.
        weights: ``[n]``.
        nominal_batch: samples that the optimizer step is meant to average over on this process.
    """
    return torch.where(weights > 0, losses * weights, torch.zeros_like(losses)).sum() / nominal_batch

