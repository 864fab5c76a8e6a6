"""Between a VAE's own latents and those that its network denoises: scale, shift, and means by channel."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def to_network(z: Tensor, vae: Any) -> Tensor:
    """``x_0 = (z − shift) · scaling_factor``, or by channel ``(z − mean) · scaling_factor / std``: as its config says.

    Args:
        z: ``[n, c, h, w]`` as the VAE encodes.
        vae: an ``AutoencoderKL``, or a tiny one.
    """
    mean, std, factor = _statistics(z, vae)
    if mean is not None:
        return (z - mean) * factor / std
    shift = getattr(vae.config, "shift_factor", None)
    return (z - shift) * factor if shift else z * factor


def to_vae(x_0: Tensor, vae: Any) -> Tensor:
    """The inverse of :func:`to_network`, as the stock pipelines compute it, to the bit."""
    mean, std, factor = _statistics(x_0, vae)
    if mean is not None:
        return x_0 * std / factor + mean
    shift = getattr(vae.config, "shift_factor", None)
    return x_0 / factor + shift if shift else x_0 / factor


@contextlib.contextmanager
def without_overflow(vae: Any) -> Iterator[Any]:
    """The VAE, in float32 while the block runs if its config says that it overflows in float16 (``force_upcast``)."""
    upcast = vae.dtype == torch.float16 and getattr(vae.config, "force_upcast", False)
    if upcast:
        vae.to(dtype=torch.float32)
    try:
        yield vae
    finally:
        if upcast:
            vae.to(dtype=torch.float16)


def _statistics(latents: Tensor, vae: Any) -> tuple[Any, Any, float]:
    """Mean and standard deviation ``[1, c, 1, 1]`` by channel, None where the VAE has none, and the scale."""
    mean, std = getattr(vae.config, "latents_mean", None), getattr(vae.config, "latents_std", None)
    factor = getattr(vae.config, "scaling_factor", None)
    if mean is None or std is None:
        return None, None, 1.0 if factor is None else factor
    shaped = (torch.tensor(one).view(1, -1, 1, 1).to(latents.device, latents.dtype) for one in (mean, std))
    return *shaped, 1.0 if factor is None else factor  # type: ignore[return-value]
