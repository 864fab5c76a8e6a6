"""Structural similarity of small images at several scales, for latents as well as pixels.

Source: Wang, Simoncelli, Bovik, "Multiscale structural similarity for image quality assessment" (Asilomar 2003), with
the constants of Hintersdorf et al. (NeMo, NeurIPS 2024): a Gaussian window of 11 pixels, three scales of weight 0.33.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

KERNEL, SCALES, WEIGHT = 11, 3, 0.33
SIGMA_PER_KERNEL = 1.5 / 11
C_1, C_2 = 0.01**2, 0.03**2


def fit_window(side: int, *, kernel: int = KERNEL, scales: int = SCALES) -> tuple[int, int]:
    """The window and number of scales that fit an image: ``(kernel, scales)``.

    Each scale halves the image, and the window has to fit into the smallest one. NeMo's 11 pixels and three scales fit
    Stable Diffusion's 64 × 64 latents (64, 32, 16). A smaller image keeps the scales and gets a smaller window, 16 × 16
    one of 3 pixels, which is about as large a part of it; only an image below 12 pixels has fewer scales too.

    Args:
        side: the image's shorter side in pixels.
        kernel: the largest window, odd.
        scales: the most scales.

    Raises:
        ValueError: the image has fewer than 3 pixels a side.
    """
    while scales > 1 and side >> (scales - 1) < 3:
        scales -= 1
    smallest = side >> (scales - 1)
    if smallest < 3:
        raise ValueError(f"MS-SSIM needs images of at least 3 pixels a side, not {side}")
    return min(kernel, smallest - 1 + smallest % 2), scales


def ms_ssim(x: Tensor, y: Tensor, *, kernel: int | None = None, scales: int | None = None) -> Tensor:
    """``Π_j relu(cs_j)^0.33 · relu(ssim_M)^0.33`` of each pair.

    That is contrast and structure at the finer scales, and luminance too at the coarsest.

    Args:
        x: ``[n, channels, h, w]`` float, values in [0, 1].
        y: the same shape.
        kernel: window in pixels, odd; None takes what fits (:func:`fit_window`). Its σ is ``1.5 / 11`` of it.
        scales: number of scales; None takes what fits.

    Returns:
        ``[n]`` float32 in [0, 1]; 1 for equal images, and 0 where a scale is correlated negatively. Averages run over
        the channels too.

    Raises:
        ValueError: the shapes differ, or the window does not fit.
    """
    if x.shape != y.shape or x.ndim != 4:
        raise ValueError(f"expected two batches [n, channels, h, w], got {list(x.shape)} and {list(y.shape)}")
    side = min(x.shape[-2:])
    fitting = fit_window(side, scales=scales or SCALES)
    kernel, scales = kernel or fitting[0], scales or fitting[1]
    if side >> (scales - 1) < kernel:
        raise ValueError(f"a window of {kernel} pixels does not fit into {side} pixels at {scales} scales")
    x, y = x.float(), y.float()
    window = _gaussian(kernel, x)
    similarity = torch.ones(len(x), device=x.device)
    for scale in range(scales):
        luminance, contrast = _ssim_maps(x, y, window)
        last = scale + 1 == scales
        mean = (luminance * contrast if last else contrast).flatten(1).mean(dim=1)
        similarity = similarity * mean.clamp(min=0) ** WEIGHT
        if not last:
            x, y = functional.avg_pool2d(x, 2), functional.avg_pool2d(y, 2)
    return similarity


def rescaled(x: Tensor) -> Tensor:
    """Each channel of each image brought to [0, 1] by its least and largest value; a constant one becomes 0.

    Args:
        x: ``[n, channels, h, w]``.
    """
    low, high = x.amin(dim=(2, 3), keepdim=True), x.amax(dim=(2, 3), keepdim=True)
    return (x - low) / (high - low).clamp(min=torch.finfo(x.dtype).tiny)


def _gaussian(kernel: int, like: Tensor) -> Tensor:
    offset = torch.arange(kernel, device=like.device, dtype=like.dtype) - (kernel - 1) / 2
    weights = torch.exp(-(offset**2) / (2 * (SIGMA_PER_KERNEL * kernel) ** 2))
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
    variance = xx + yy - mean_x**2 - mean_y**2
    covariance = xy - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + C_1) / (mean_x**2 + mean_y**2 + C_1)
    return luminance, (2 * covariance + C_2) / (variance + C_2)
