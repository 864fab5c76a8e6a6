"""A linear preview of a VAE's decoder: what watching every step of a run costs next to nothing.

Decoding takes as long as the denoiser's own pass on small models, and more on Stable Diffusion. What a latent shows is
almost linear in it: :class:`LinearDecoder` is one convolution, each latent pixel with its neighbours → its square of
image pixels. It is fitted by least squares to what the decoder makes of *dead leaves*, discs of every size that cover
one another, whose edges and scales are distributed much as those of photographs (Lee, Mumford, Huang, IJCV 2001): no
image is needed, and a VAE has one preview, whatever it is used for.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from train.denoising.latents.scaling import to_network, without_overflow

IMAGES, LATENT_SIDE, LEAVES = 16, 16, 200
RIDGE = 1e-3
"""Of the mean squared latent, which is near 1."""
_fitted: WeakKeyDictionary[Any, LinearDecoder] = WeakKeyDictionary()


class LinearDecoder:
    """Latents ``[n, c, h, w]`` → pixels ``[n, 3, f·h, f·w]`` in [0, 1], linear but for the clamp.

    Args:
        weight: ``[3 f², c, 3, 3]`` float32.
        bias: ``[3 f²]``.
        factor: ``f``, image pixels to a latent pixel along a side.
    """

    def __init__(self, weight: Tensor, bias: Tensor, factor: int) -> None:
        self.weight, self.bias, self.factor = weight, bias, factor

    def __call__(self, latents: Tensor) -> Tensor:
        weight, bias = self.weight.to(latents.device), self.bias.to(latents.device)
        padded = F.pad(latents.float(), (1, 1, 1, 1), mode="replicate")
        return F.pixel_shuffle(F.conv2d(padded, weight, bias), self.factor).clamp(0, 1)

    @classmethod
    def fit(cls, latents: Tensor, pixels: Tensor) -> LinearDecoder:
        """Least squares with a small ridge.

        Args:
            latents: ``[n, c, h, w]`` float32.
            pixels: ``[n, 3, f·h, f·w]`` in [0, 1], what they decode to.
        """
        factor = pixels.shape[-1] // latents.shape[-1]
        padded = F.pad(latents, (1, 1, 1, 1), mode="replicate")
        x = F.unfold(padded, 3).transpose(1, 2).flatten(0, 1).double()
        x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
        y = F.pixel_unshuffle(pixels, factor).flatten(2).transpose(1, 2).flatten(0, 1).double()
        ridge = RIDGE * len(x) * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        solved = torch.linalg.solve(x.T @ x + ridge, x.T @ y).T.float()
        weight = solved[:, :-1].unflatten(1, (latents.shape[1], 3, 3)).contiguous()
        return cls(weight, solved[:, -1].contiguous(), factor)


def preview_of(vae: Any, decode: Any, device: torch.device) -> LinearDecoder:
    """The linear preview of a VAE; fitted once, then kept for as long as the VAE lives.

    Args:
        vae: an ``AutoencoderKL``, or a tiny one.
        decode: its decoder in float32, latents as the UNet sees them → pixels in [0, 1].
        device: to compute on.
    """
    if vae not in _fitted:
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        images = dead_leaves(IMAGES, LATENT_SIDE * factor)
        with torch.no_grad(), without_overflow(vae):
            pairs = []
            for image in images.split(1):  # in slices: a real VAE's activations are large
                image = image.to(device, vae.dtype)
                encoded = vae.encode(image * 2 - 1)
                latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
                latents = to_network(latents, vae).float()
                pairs.append((latents, decode(latents)))
            latents, pixels = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        _fitted[vae] = LinearDecoder.fit(latents, pixels)
    return _fitted[vae]


def dead_leaves(n: int, side: int, leaves: int = LEAVES, seed: int = 0) -> Tensor:
    """``[n, 3, side, side]`` float32 in [0, 1]: discs of even colour, each laid over those before it.

    Radii have the density ``r⁻³``, which makes the images look alike at every scale.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    y, x = torch.meshgrid(torch.arange(side) + 0.5, torch.arange(side) + 0.5, indexing="ij")
    images = uniform(n, 3, 1, 1).expand(n, 3, side, side)
    for _ in range(leaves):
        radius = 0.04 * side * (1 - uniform(n, 1, 1)) ** -0.5
        inside = (x - uniform(n, 1, 1) * side) ** 2 + (y - uniform(n, 1, 1) * side) ** 2 < radius**2
        images = torch.where(inside[:, None], uniform(n, 3, 1, 1), images)
    return images

