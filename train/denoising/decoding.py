"""Latents → pixels in float32, differentiable, whatever dtype and place the VAE has."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from diffusers import AutoencoderKL
from torch import Tensor


class _Decoder:
    """Latents → pixels in [0, 1], in float32 and differentiable, whatever dtype and place the VAE has.

    A half-precision or offloaded VAE gets a float32 copy of its decoder on first use: gradients through a
    half-precision decoder overflow.
    """

    def __init__(self, vae: AutoencoderKL, device: torch.device) -> None:
        self._original, self._device = vae, device
        self._vae: AutoencoderKL | None = None

    def __call__(self, latents: Tensor) -> Tensor:
        if self._vae is None:
            self._vae = self._float32()
        pixels = self._vae.decode(latents.float() / self._vae.config.scaling_factor, return_dict=False)[0]
        return (pixels / 2 + 0.5).clamp(0, 1)

    def _float32(self) -> AutoencoderKL:
        vae = self._original
        if vae.dtype == torch.float32 and not hasattr(vae, "_hf_hook"):
            return vae
        with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext():
            copy = AutoencoderKL.from_config(vae.config)
            copy.encoder = copy.quant_conv = None
            copy.load_state_dict(vae.state_dict(), strict=False)
            return copy.to(self._device, torch.float32).eval().requires_grad_(False)

