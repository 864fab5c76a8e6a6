"""Consistency among initial noises: a memorized prompt pulls every noise to one image, at the first step already.

Source: Hintersdorf et al., "Finding NeMo: Localizing Neurons Responsible For Memorization in Diffusion Models" (NeurIPS
2024); MS-SSIM: Wang, Simoncelli and Bovik, "Multiscale structural similarity for image quality assessment" (2003).
"""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, conv2d

from train.memorization.ssim import rescaled

if TYPE_CHECKING:
    from train.memorization.signals import Seen

KERNEL, WIDTH = 11, 1.5
"""Side and standard deviation of SSIM's Gaussian window, in latents."""
BETAS = (0.33, 0.33, 0.33)
"""Exponents of the scales, the finest first."""
SMALLEST = 3
"""Side below which a scale is left out."""


class Consistency:
    """MS-SSIM between the first-step noise differences ``δ = ε(x_T, e_p) − x_T`` of a prompt's seeds.

    Of a seed: the highest score with another of the prompt's seeds. Of the prompt: the highest of all pairs, as in the
    paper, which takes ten seeds.
    """

    name = "consistency"
    compares_seeds = True
    every_step = unconditional = low_noise = attention = False

    def observe(self, seen: Seen) -> Tensor:
        """``[n, c, h, w]``: δ with each channel brought to [0, 1]."""
        return rescaled(seen.eps_cond - seen.x_t)

    def combine(self, observed: Tensor) -> Tensor:
        """``[seeds, 1, c, h, w]`` → ``[seeds]``, in [0, 1]."""
        return highest_with_another(observed[:, 0])

    def of_prompt(self, values: Tensor) -> Tensor:
        """The highest."""
        return values.max()


def highest_with_another(images: Tensor) -> Tensor:
    """The highest MS-SSIM of each image with another one: ``[n, c, h, w]`` in [0, 1], n ≥ 2 → ``[n]``."""
    i, j = torch.tensor(list(combinations(range(len(images)), 2))).T
    scores = images.new_zeros(len(images), len(images))
    scores[i, j] = scores[j, i] = ms_ssim(images[i], images[j])
    return scores.amax(dim=1)


def ms_ssim(x: Tensor, y: Tensor) -> Tensor:
    """Multi-scale structural similarity of pairs of images whose values lie in [0, 1].

    Latents of 64 × 64 and more have the paper's three scales with a window of 11. A scale that is smaller than the
    window has the largest odd window that fits, with the same Gaussian cut to it, and scales with a side below 3 are
    left out: latents of 16 × 16 have windows of 11, 7 and 3. Only whole windows count. Negative terms are taken as 0.

    Args:
        x: ``[n, c, h, w]`` float.
        y: the same shape.

    Returns:
        ``[n]``, 1 for equal images, ≥ 0.

    Raises:
        ValueError: a side is below 3, or the shapes differ.
    """
    if x.shape != y.shape or min(x.shape[-2:]) < SMALLEST:
        raise ValueError(f"ms_ssim compares images of one shape with sides from {SMALLEST}: {tuple(x.shape)}")
    scales = sum(min(x.shape[-2:]) >> scale >= SMALLEST for scale in range(len(BETAS)))
    result = x.new_ones(len(x))
    for scale, beta in enumerate(BETAS[:scales]):
        if scale:
            x, y = avg_pool2d(x, 2), avg_pool2d(y, 2)
        luminance, structure = ssim_terms(x, y)
        term = structure if scale + 1 < scales else luminance * structure
        result = result * term.mean((1, 2, 3)).clamp_min(0) ** beta
    return result


def ssim_terms(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """SSIM's luminance term, and its contrast and structure terms as one, at every whole window ``[n, c, h', w']``."""
    c_1, c_2 = 0.01**2, 0.03**2
    side = min(KERNEL, (min(x.shape[-2:]) - 1) // 2 * 2 + 1)
    offsets = torch.arange(side, dtype=x.dtype, device=x.device) - side // 2
    window = torch.exp(-(offsets**2) / (2 * WIDTH**2))
    window = window / window.sum()

    def mean(values: Tensor) -> Tensor:
        flat = values.flatten(0, 1).unsqueeze(1)
        flat = conv2d(conv2d(flat, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))
        return flat.view(*values.shape[:2], *flat.shape[-2:])

    mu_x, mu_y = mean(x), mean(y)
    # In float32 a constant image's variance may come out below 0.
    var_x, var_y = (mean(x * x) - mu_x**2).clamp_min(0), (mean(y * y) - mu_y**2).clamp_min(0)
    cov = mean(x * y) - mu_x * mu_y
    luminance = (2 * mu_x * mu_y + c_1) / (mu_x**2 + mu_y**2 + c_1)
    return luminance, (2 * cov + c_2) / (var_x + var_y + c_2)
