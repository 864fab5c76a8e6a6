"""Denoisers that are known in closed form, in the place of a pipeline's UNet."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from train.denoising.families.stable_diffusion import encode_captions

SHAPE = (4, 16, 16)


class KnownDenoiser(torch.nn.Module):
    """The exact denoiser of data that is a mixture of equally likely Gaussians of one width; the prompt says which.

    With ``p(x_0) = Σ_k N(μ_k, s²) / K`` and ``σ² = ᾱ_t s² + 1 − ᾱ_t``:
    ``ε(x_t) = √(1−ᾱ_t) Σ_k r_k (x_t − √ᾱ_t μ_k) / σ²``, ``r = softmax_k(−‖x_t − √ᾱ_t μ_k‖² / 2σ²)``. With s = 0 and
    one μ the data is one image. The empty prompt stands for N(0, 1).

    Args:
        pipe: whose text encoder tells prompts apart, and whose schedule is used.
        means: caption → ``[K, c, h, w]``, or ``[c, h, w]`` of one.
        s: width.
        prediction_type: ``epsilon`` or ``v_prediction``.
    """

    def __init__(self, pipe: Any, means: Mapping[str, Tensor], s: float, prediction_type: str = "epsilon"):
        super().__init__()
        self.config = SimpleNamespace(sample_size=SHAPE[1], in_channels=SHAPE[0])
        self.dtype, self.device = torch.float32, torch.device("cpu")
        self.known = [(encode_captions(pipe, [""])[0], torch.zeros(1, *SHAPE), 1.0)]
        self.known += [(encode_captions(pipe, [one])[0], mean.view(-1, *SHAPE), s) for one, mean in means.items()]
        self.alphas_cumprod = pipe.scheduler.alphas_cumprod.double()
        self.prediction_type = prediction_type

    def forward(self, x: Tensor, t: int, encoder_hidden_states: Tensor, return_dict: bool) -> tuple[Tensor]:
        rows = []
        a = self.alphas_cumprod[int(t)]
        for x_t, embeds in zip(x.double(), encoder_hidden_states, strict=True):
            _, means, s = min(self.known, key=lambda known: (known[0] - embeds).abs().max().item())
            eps = mixture_eps(x_t, means.double(), s, a)
            v = (eps - (1 - a).sqrt() * x_t) / a.sqrt()
            rows.append(v if self.prediction_type == "v_prediction" else eps)
        return (torch.stack(rows).float(),)


def mixture_eps(x_t: Tensor, means: Tensor, s: float, alpha_bar: Tensor) -> Tensor:
    """The formula above, for one ``x_t`` ``[c, h, w]`` and ``means`` ``[K, c, h, w]``."""
    variance = alpha_bar * s**2 + 1 - alpha_bar
    away = x_t - alpha_bar.sqrt() * means
    r = (-away.flatten(1).square().sum(1) / (2 * variance)).softmax(0)
    return (1 - alpha_bar).sqrt() * torch.einsum("k,kchw->chw", r, away) / variance


def with_denoiser(pipe: Any, unet: torch.nn.Module, prediction_type: str = "epsilon") -> Any:
    """What scoring needs of a pipeline, with another denoiser."""
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config, prediction_type=prediction_type)
    return SimpleNamespace(unet=unet, scheduler=scheduler, tokenizer=pipe.tokenizer, text_encoder=pipe.text_encoder)
