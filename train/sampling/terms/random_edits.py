"""Edited versions of images, differentiable: the gradient of a similarity that is not fooled by one view."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def random_edits(pixels: Tensor, n: int, generator: torch.Generator) -> list[Tensor]:
    """``n`` edited versions of images, differentiable: shifted and cropped, with other brightness, contrast
    and colour.

    The same edit for every image of the batch, so that an image's gradient does not depend on its neighbours.

    Args:
        pixels: ``[k, 3, H, W]`` in [0, 1].
        n: number of versions.
        generator: on the CPU; decides everything.

    Returns:
        ``n`` tensors like ``pixels``.
    """

    def uniform(low: float, high: float, size: int = 1) -> Tensor:
        return torch.rand(size, generator=generator) * (high - low) + low

    edited = []
    for _ in range(n):
        zoom, aspect, shift = uniform(0.75, 1.05), uniform(-0.05, 0.05), uniform(-0.15, 0.15, 2)
        theta = torch.zeros(1, 2, 3)
        theta[0, 0, 0], theta[0, 1, 1], theta[0, :, 2] = zoom + aspect, zoom - aspect, shift
        gain, bias, contrast, colour = (
            uniform(0.8, 1.2, 3),
            uniform(-0.1, 0.1, 3),
            uniform(0.8, 1.2),
            uniform(0.4, 1.2),
        )
        gain, bias = gain.view(1, 3, 1, 1).to(pixels), bias.view(1, 3, 1, 1).to(pixels)
        grid = F.affine_grid(theta.expand(len(pixels), -1, -1), list(pixels.shape), align_corners=False)
        image = F.grid_sample(pixels, grid.to(pixels), padding_mode="border", align_corners=False)
        image = (image - 0.5) * contrast.to(pixels) + 0.5
        grey = image.mean(1, keepdim=True)
        edited.append((grey + (image - grey) * colour.to(pixels)) * gain + bias)
    return edited

