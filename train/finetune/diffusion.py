"""The forward process: what a training step draws at random, and what it makes of an image with that.

Everything random is drawn per sample from a generator of its position in the run, never from the global state, so that
a resumed run draws the same (exact resume).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from train.finetune.data import generator
from train.memorization.magnitude import to_eps

if TYPE_CHECKING:
    from diffusers import DDPMScheduler


class Draws(NamedTuple):
    """All random numbers of a batch of ``n``."""

    posterior: Tensor
    """``[n, c, h, w]`` normal, for the VAE's posterior."""
    noise: Tensor
    """``[n, c, h, w]`` normal, ``ε``."""
    t: Tensor
    """``[n]`` int64 timesteps."""
    uniform: Tensor
    """``[n, 2]`` in [0, 1), on the CPU: for the choice of the caption and its dropout."""


def draw_randomness(positions: Sequence[int], shape: tuple[int, ...], timesteps: int, seed: int) -> Draws:
    """The random numbers of the samples at some positions, one generator a sample.

    Args:
        positions: of the samples.
        shape: of one latent, ``(c, h, w)``.
        timesteps: ``t`` is uniform in [0, ``timesteps``).
        seed: of the run.
    """
    posterior, noise, times, uniform = [], [], [], []
    for position in positions:
        g = generator(seed, "step", position)
        posterior.append(torch.randn(shape, generator=g))
        noise.append(torch.randn(shape, generator=g))
        times.append(torch.randint(timesteps, (), generator=g))
        uniform.append(torch.rand(2, generator=g))
    return Draws(torch.stack(posterior), torch.stack(noise), torch.stack(times), torch.stack(uniform))


def sample_posterior(moments: Tensor, posterior: Tensor, scaling_factor: float) -> Tensor:
    """Latents ``x_0 [n, c, h, w]`` from the VAE's moments ``[n, 2c, h, w]`` (mean, log-variance) and normal noise."""
    mean, logvar = moments.chunk(2, dim=1)
    return (mean + (0.5 * logvar.clamp(-30, 20)).exp() * posterior) * scaling_factor


class Diffusion:
    """The noise schedule of a pipeline, and what the model is to predict.

    Args:
        scheduler: that of training (``train.components.training_scheduler``).
        device: where ``alpha_bar`` (``ᾱ``, ``[timesteps]`` float32) is kept.
    """

    def __init__(self, scheduler: DDPMScheduler, device: torch.device) -> None:
        self.scheduler = scheduler
        self.timesteps = int(scheduler.config.num_train_timesteps)
        self.prediction_type: str = scheduler.config.prediction_type
        self.alpha_bar = scheduler.alphas_cumprod.to(device)

    def noised(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """``x_t = √ᾱ_t x_0 + √(1−ᾱ_t) ε``."""
        return self.scheduler.add_noise(x_0, noise, t)

    def target(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the model's output is compared with: ``ε``, or ``v = √ᾱ_t ε − √(1−ᾱ_t) x_0``."""
        return noise if self.prediction_type == "epsilon" else self.scheduler.get_velocity(x_0, noise, t)

    def to_eps(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The model's output as the noise it predicts."""
        return to_eps(output, x_t, self.alpha_bar[t], self.prediction_type)
