"""The forward process: what a training step draws at random, and what it makes of an image with that.

Everything random is drawn per sample from generators of its position in the run, never from the global state, so that
a resumed run draws the same (exact resume). An option's numbers come from a generator of their own: switching it on
changes no other draw.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from afresh.errors import UsageError
from train.denoising.opening.checkpoints import check_scheduler
from train.denoising.schedules import FlowSchedule, NoiseSchedule, is_flow
from train.finetune.config import FinetuneConfig, Timesteps
from train.finetune.data.order import generator


class Draws(NamedTuple):
    """All random numbers of a batch of ``n``."""

    posterior: Tensor
    """``[n, c, h, w]`` normal, for the VAE's posterior."""
    noise: Tensor
    """``[n, c, h, w]``: ``ε``, from which the target is made."""
    input_noise: Tensor
    """``[n, c, h, w]``: what is added to the latents; ``noise`` itself unless it is perturbed."""
    t: Tensor
    """``[n]`` timesteps: int64, of flow matching float32."""
    uniform: Tensor
    """``[n, 2]`` in [0, 1): for the choice of the caption and its dropout."""


def draw_randomness(
    positions: Sequence[int],
    shape: tuple[int, ...],
    timesteps: int,
    seed: int,
    *,
    noise_offset: float = 0.0,
    input_perturbation: float = 0.0,
    timestep: Callable[[torch.Generator], Tensor] | None = None,
) -> Draws:
    """The random numbers of the samples at some positions.

    Args:
        positions: of the samples.
        shape: of one latent, ``(c, h, w)``.
        timesteps: ``t`` is uniform in [0, ``timesteps``), unless ``timestep`` draws it.
        seed: of the run.
        noise_offset: ``ε`` gets this times one normal number for each channel (Guttenberg, "Diffusion with Offset
            Noise", 2023), so that a model learns to change the mean.
        input_perturbation: ``γ``; the latents get ``ε + γ ξ`` with ``ξ`` normal, while the target keeps the clean
            ``ε`` (Ning et al., "Input Perturbation Reduces Exposure Bias in Diffusion Models", ICML 2023, algorithm 1).
        timestep: draws one timestep, where they are not uniform (:func:`timesteps_of`).
    """
    posterior, noise, times, uniform = [], [], [], []
    for position in positions:
        g = generator(seed, "step", position)
        posterior.append(torch.randn(shape, generator=g))
        noise.append(torch.randn(shape, generator=g))
        times.append(torch.randint(timesteps, (), generator=g))
        uniform.append(torch.rand(2, generator=g))
    if timestep is not None:
        times = [timestep(generator(seed, "timesteps", position)) for position in positions]
    eps = torch.stack(noise)
    if noise_offset:
        means = [torch.randn(shape[0], 1, 1, generator=generator(seed, "noise offset", p)) for p in positions]
        eps = eps + noise_offset * torch.stack(means)
    input_noise = eps
    if input_perturbation:
        xi = [torch.randn(shape, generator=generator(seed, "input perturbation", p)) for p in positions]
        input_noise = eps + input_perturbation * torch.stack(xi)
    return Draws(torch.stack(posterior), eps, input_noise, torch.stack(times), torch.stack(uniform))


def timesteps_of(schedule: NoiseSchedule, config: FinetuneConfig) -> Callable[[torch.Generator], Tensor] | None:
    """How a sample's timestep is drawn; None for uniformly, of a model that is defined by betas.

    Of flow matching it is one of the schedule's (shifted) noise levels, at a place ``u`` of their list: a logit-normal
    one, ``u = sigmoid(m + s z)``, or by the mode ``u = 1 − v − c (cos²(π v / 2) − 1 + v)``, or uniform (Esser et al.,
    ICML 2024, §3.1), as diffusers' scripts draw it.
    """
    if not isinstance(schedule, FlowSchedule):
        how = config.timesteps
        return None if how == Timesteps() else partial(draw_timestep, how, schedule.timesteps)
    flow, sigmas = config.flow, schedule.sigmas.cpu()

    def draw(g: torch.Generator) -> Tensor:
        if flow.density == "logit_normal":
            u = torch.sigmoid(flow.logit_mean + flow.logit_std * torch.randn((), generator=g))
        else:
            u = torch.rand((), generator=g)
            if flow.density == "mode":
                u = 1 - u - flow.mode_scale * (torch.cos(torch.pi * u / 2) ** 2 - 1 + u)
        return sigmas[(u * len(sigmas)).long().clamp(0, len(sigmas) - 1)] * schedule.timesteps

    return draw


def draw_timestep(how: Timesteps, timesteps: int, g: torch.Generator) -> Tensor:
    """One timestep of a model that is defined by betas, a scalar int64.

    Args:
        how: its distribution; what lies outside its range is brought into it in proportion.
        timesteps: of the noise schedule.
        g: what it is drawn from.
    """
    if how.kind == "logit_normal":
        share = torch.sigmoid(how.mean + how.spread * torch.randn((), generator=g))
    else:
        share = torch.rand((), generator=g)
    lowest, highest = (bound * timesteps // 1000 for bound in (how.lowest, how.highest))
    return (lowest + share * (highest - lowest)).long().clamp(lowest, highest - 1)


def sample_posterior(moments: Tensor, posterior: Tensor, scaling_factor: float) -> Tensor:
    """Latents ``x_0 [n, c, h, w]`` from the VAE's moments ``[n, 2c, h, w]`` (mean, log-variance) and normal noise."""
    mean, logvar = moments.chunk(2, dim=1)
    return (mean + (0.5 * logvar.clamp(-30, 20)).exp() * posterior) * scaling_factor


def sampling_scheduler(scheduler: Any, config: FinetuneConfig) -> Any:
    """The scheduler that the trained model is to be sampled with; the one that came with the model where that fits.

    ``prediction_type`` and ``zero_terminal_snr`` change what the model learns, so the saved scheduler has to say so:
    its ``prediction_type``, ``rescale_betas_zero_snr`` and ``timestep_spacing: trailing`` (Lin et al., "Common
    Diffusion Noise Schedules and Sample Steps are Flawed", WACV 2024, §3.1 and §3.3). A scheduler that has no such
    setting gives way to DDIM.

    Raises:
        UsageError: a zero terminal SNR for a model that predicts ε: at ``ᾱ_T = 0`` its input is its target, and the
            image cannot be recovered from what it predicts (§3.2).
        UserError: validation images cannot be drawn with it in so many steps.
    """
    from diffusers import DDIMScheduler

    kind: Any = type(scheduler)
    changes: dict[str, Any] = {}
    if is_flow(scheduler):
        for name, wrong in (
            ("prediction_type", config.prediction_type != "model"),
            ("zero_terminal_snr", config.zero_terminal_snr),
            ("snr_gamma", config.snr_gamma > 0),
            ("timesteps", config.timesteps != Timesteps()),
        ):
            if wrong:
                raise UsageError(f"{name} is for models with a schedule of betas; this one is of flow matching (flow)")
        return kind.from_config(scheduler.config, shift=config.flow.shift) if config.flow.shift else scheduler
    if config.prediction_type != "model":
        changes["prediction_type"] = config.prediction_type
    predicts = changes.get("prediction_type", scheduler.config.prediction_type)
    if config.zero_terminal_snr:
        if predicts != "v_prediction":
            raise UsageError(
                f"zero_terminal_snr needs a model that predicts v, and this one predicts {predicts}: "
                "set prediction_type to v_prediction to teach it, or leave zero_terminal_snr out"
            )
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        if "rescale_betas_zero_snr" not in scheduler.config:
            kind = DDIMScheduler
            changes["clip_sample"] = False  # DDIM's default, for pixels
    chosen = kind.from_config(scheduler.config, **changes) if changes else scheduler
    if config.validation.every:  # hours before the first image; on one of its own, since it sets the timesteps
        check_scheduler(type(chosen).from_config(chosen.config), "validation.steps", config.validation.steps)
    return chosen
