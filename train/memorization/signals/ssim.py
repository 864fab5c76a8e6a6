"""Structural similarity of small images at several scales, for latents as well as pixels.

Source: Wang, Simoncelli, Bovik, "Multiscale structural similarity for image quality assessment" (Asilomar 2003), with
the constants of Hintersdorf et al. (NeMo, NeurIPS 2024): a Gaussian window of 11 pixels, three scales of weight 0.33.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

KERNEL, SIGMA = 11, 1.5
"""Side and standard deviation of the Gaussian window, in pixels of its scale."""
SCALES, WEIGHT = 3, 0.33
SMALLEST = 3
"""Side below which a scale is left out."""
C_1, C_2 = 0.01**2, 0.03**2


def windows(side: int) -> list[int]:
    """The windows of an image's scales, the finest first, each of which halves the image.

    NeMo's three scales with a window of 11 pixels fit Stable Diffusion's 64 × 64 latents (64, 32, 16). A scale that is
    smaller than the window has the largest odd one that fits, with the same Gaussian cut to it, and scales with a side
    below 3 are left out: 16 × 16 has windows of 11, 7 and 3.

    Args:
        side: the image's shorter side in pixels.

    Returns:
        1 to 3 odd numbers; none for images of less than 3 pixels a side.
    """
    sides = (side >> scale for scale in range(SCALES))
    return [min(KERNEL, side - 1 + side % 2) for side in sides if side >= SMALLEST]


def ms_ssim(x: Tensor, y: Tensor) -> Tensor:
    """``Π_j relu(cs_j)^0.33 · relu(ssim_M)^0.33`` of each pair.

    That is contrast and structure at the finer scales, and luminance too at the coarsest. Only whole windows count.

    Args:
        x: ``[n, channels, h, w]`` float, values in [0, 1], sides from 3 (see :func:`windows`).
        y: the same shape.

    Returns:
        ``[n]`` float32 in [0, 1]; 1 for equal images, and 0 where a scale is correlated negatively. Averages run over
        the channels too.

    Raises:
        ValueError: the shapes differ, or a side is below 3.
    """
    if x.shape != y.shape or x.ndim != 4 or min(x.shape[-2:]) < SMALLEST:
        shapes = f"{list(x.shape)} and {list(y.shape)}"
        raise ValueError(f"expected two batches [n, channels, h, w] with sides from {SMALLEST}, got {shapes}")
    x, y = x.float(), y.float()
    similarity = torch.ones(len(x), device=x.device)
    sizes = windows(min(x.shape[-2:]))
    for scale, size in enumerate(sizes):
        if scale:
            x, y = functional.avg_pool2d(x, 2), functional.avg_pool2d(y, 2)
        luminance, contrast = _ssim_maps(x, y, _gaussian(size, x))
        last = scale + 1 == len(sizes)
        mean = (luminance * contrast if last else contrast).flatten(1).mean(dim=1)
        similarity = similarity * mean.clamp(min=0) ** WEIGHT
    return similarity


def rescaled(x: Tensor) -> Tensor:
    """Each channel of each image brought to [0, 1] by its least and largest value; a constant one becomes 0.

    Args:
        x: ``[n, channels, h, w]``.
    """
    low, high = x.amin(dim=(2, 3), keepdim=True), x.amax(dim=(2, 3), keepdim=True)
    return (x - low) / (high - low).clamp(min=torch.finfo(x.dtype).tiny)


def _gaussian(size: int, like: Tensor) -> Tensor:
    offset = torch.arange(size, device=like.device, dtype=like.dtype) - size // 2
    weights = torch.exp(-(offset**2) / (2 * SIGMA**2))
    return weights / weights.sum()


def _ssim_maps(x: Tensor, y: Tensor, window: Tensor) -> tuple[Tensor, Tensor]:
    """Luminance, and contrast times structure, wherever the whole window lies inside the image."""
    channels = x.shape[1]
    # one pass over all five moments: at the size of latents the calls cost more than the sums
    moments = torch.cat([x, y, x * x, y * y, x * y], dim=1)
    rows = window.view(1, 1, -1, 1).expand(5 * channels, 1, -1, 1)
    columns = window.view(1, 1, 1, -1).expand(5 * channels, 1, 1, -1)
    moments = functional.conv2d(functional.conv2d(moments, rows, groups=5 * channels), columns, groups=5 * channels)
    mean_x, mean_y, xx, yy, xy = moments.chunk(5, dim=1)
    # rounding may leave a constant image's variance below 0
    variance = (xx - mean_x**2).clamp_min(0) + (yy - mean_y**2).clamp_min(0)
    covariance = xy - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + C_1) / (mean_x**2 + mean_y**2 + C_1)
    return luminance, (2 * covariance + C_2) / (variance + C_2)

