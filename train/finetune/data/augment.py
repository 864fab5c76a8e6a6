"""Random shift, scale, flip and colour of image batches, as a pure function of explicit random numbers.

Every image has its own generator, seeded by what identifies the draw, so that an image is augmented alike whatever
batch, worker or process it falls in (the exact-resume contract of the trainer).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from train.finetune.config import Augmentation


def draw(generators: list[torch.Generator]) -> torch.Tensor:
    """Nine uniform numbers in [0, 1) for each image: ``[n, 9]``."""
    return torch.stack([torch.rand(9, generator=generator) for generator in generators])


def augment(pixels: torch.Tensor, uniform: torch.Tensor, how: Augmentation) -> torch.Tensor:
    """Apply the drawn changes.

    Args:
        pixels: ``[n, 3, H, W]`` float in [0, 1]; what moves in from outside is white.
        uniform: ``[n, 9]`` numbers in [0, 1) from :func:`draw`.
        how: the ranges.

    Returns:
        ``[n, 3, H, W]`` in [0, 1].
    """
    if not how.active:
        return pixels
    n = len(pixels)
    signed = uniform * 2 - 1
    scale = torch.exp(signed[:, 0] * torch.log1p(torch.tensor(how.scale)))
    flip = torch.where(uniform[:, 1] < how.flip, -1.0, 1.0)
    angle = torch.deg2rad(signed[:, 8] * how.rotate)
    cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0], theta[:, 0, 1] = cos * flip, -sin
    theta[:, 1, 0], theta[:, 1, 1] = sin * flip, cos
    theta[:, :, 2] = signed[:, 2:4] * 2 * how.shift  # the grid spans [-1, 1]: two units a side
    grid = F.affine_grid(theta, list(pixels.shape), align_corners=False)
    out = F.grid_sample(pixels - 1, grid, mode="bilinear", padding_mode="zeros", align_corners=False) + 1
    if how.colour or how.hue:
        ink = out
        luma = (ink * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)
        factor = 1 + how.colour * signed[:, 4:7].reshape(n, 3, 1, 1, 1)
        ink = luma + (ink - luma) * factor[:, 0]
        ink = (ink - 1) * factor[:, 1] + 1  # contrast about white, so that the background stays white
        ink = 1 - (1 - ink) * (1 + (factor[:, 2] - 1) * 0.5)
        if how.hue:
            ink = rotate_hue(ink, signed[:, 7] * how.hue)
        out = ink
    return out.clamp(0, 1)


def rotate_hue(pixels: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """Rotate colours about the grey axis: ``pixels [n, 3, H, W]``, ``turns [n]`` in whole turns."""
    angle = 2 * torch.pi * turns
    c, s = torch.cos(angle).view(-1, 1, 1), torch.sin(angle).view(-1, 1, 1)
    axis = torch.full((3, 3), 1 / 3)  # the projection onto (1, 1, 1)
    r = 3**-0.5
    cross = torch.tensor([[0.0, -r, r], [r, 0.0, -r], [-r, r, 0.0]])
    matrix = c * torch.eye(3) + s * cross + (1 - c) * axis  # Rodrigues' formula
    return torch.einsum("nij,njhw->nihw", matrix, pixels)

