"""The strong edits that the dual encoder learns to look past: lost detail, other brightness, pasted patches, noise."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def strong_edits(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Blur or lost detail, other brightness, a pasted patch, lost colour, noise: each on a share of the
    images.

    Args:
        pixels: ``[n, 3, H, W]`` in [0, 1].
        generator: the source of all draws.
    """
    n, _, height, width = pixels.shape
    out = pixels.clone()

    def chosen(share: float) -> Tensor:
        return torch.nonzero(torch.rand(n, generator=generator) < share).flatten()

    rows = chosen(0.25)
    out[rows] = F.avg_pool2d(F.pad(out[rows], (1, 1, 1, 1), mode="replicate"), 3, 1)
    rows = chosen(0.2)
    half = F.interpolate(out[rows], scale_factor=0.5, mode="area")
    out[rows] = F.interpolate(half, size=(height, width), mode="bilinear")
    rows = chosen(0.25)
    out[rows] *= 0.7 + 0.5 * torch.rand(len(rows), 1, 1, 1, generator=generator)
    rows = chosen(0.1)
    out[rows] = (out[rows] * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)
    # A patch of plain colour or of another image of the batch, up to 40 % of each side.
    other = out.roll(1, dims=0)
    size = torch.rand(n, 2, generator=generator) * 0.3 + 0.1
    corner = torch.rand(n, 2, generator=generator) * (1 - size)
    plain = torch.rand(n, 3, 1, 1, generator=generator)
    for i in chosen(0.35).tolist():
        top, left = int(corner[i, 0] * height), int(corner[i, 1] * width)
        box = slice(top, top + int(size[i, 0] * height)), slice(left, left + int(size[i, 1] * width))
        out[i, :, *box] = plain[i] if i % 2 else other[i, :, *box]
    rows = chosen(0.4)
    strength = 0.1 * torch.rand(len(rows), 1, 1, 1, generator=generator)
    out[rows] += strength * torch.randn(out[rows].shape, generator=generator)
    return out.clamp(0, 1)
