"""Latents → pixels in float32, differentiable, whatever dtype and place the VAE has."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from train.denoising.latents.scaling import to_vae


class Decoder:
    """Latents as the UNet sees them → pixels in [0, 1], in float32 and differentiable.

    A half-precision, compiled or offloaded VAE gets a float32 copy of its decoder on first use: gradients through a
    half-precision decoder overflow.

    Args:
        vae: an ``AutoencoderKL``, or a tiny one (``AutoencoderTiny``), perhaps compiled.
        device: to decode on.
    """

    def __init__(self, vae: Any, device: torch.device) -> None:
        self._original, self._device = vae, device
        self._vae: Any = None

    def __call__(self, latents: Tensor) -> Tensor:
        if self._vae is None:
            self._vae = self._float32()
        pixels = self._vae.decode(to_vae(latents.float(), self._vae), return_dict=False)[0]
        return (pixels / 2 + 0.5).clamp(0, 1)

    def _float32(self) -> Any:
        vae = self._original
        offloaded = any(hasattr(module, "_hf_hook") for module in vae.modules())
        if vae.dtype == torch.float32 and not offloaded:
            return vae
        with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext():
            plain = getattr(vae, "_orig_mod", vae)
            copy = type(plain).from_config(plain.config)
            copy.load_state_dict(whole_weights(vae))  # all of them, or it raises
            for part in ("encoder", "quant_conv"):
                if hasattr(copy, part):
                    setattr(copy, part, None)
            return copy.to(self._device, torch.float32).eval().requires_grad_(False)


def whole_weights(module: torch.nn.Module) -> dict[str, Tensor]:
    """A module's weights under its plain names: also of one that is compiled, or whose weights are offloaded."""
    state = module.state_dict()
    if any(tensor.is_meta for tensor in state.values()):
        from accelerate.utils.modeling import get_state_dict_offloaded_model

        state = get_state_dict_offloaded_model(module)
    return {name.replace("_orig_mod.", ""): tensor for name, tensor in state.items()}
