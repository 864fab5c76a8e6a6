"""Consistency among initial noises: a memorized prompt pulls every noise to one image, at the first step already.

Source: Hintersdorf et al., "Finding NeMo: Localizing Neurons Responsible For Memorization in Diffusion Models" (NeurIPS
2024), §3.1.
"""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from train.memorization.signals.ssim import ms_ssim, rescaled

if TYPE_CHECKING:
    from train.memorization.signals.protocol import LooksAt, Seen


class Consistency:
    """MS-SSIM between the first-step noise differences ``δ = ε(x_T, e_p) − x_T`` of a prompt's seeds.

    Of a seed: the highest score with another of the prompt's seeds. Of the prompt: the highest of all pairs, as in the
    paper, which takes ten seeds.
    """

    name = "consistency"
    compares_seeds = True
    looks_at: ClassVar[LooksAt] = "first step"
    noise_level: ClassVar[float | None] = None
    unconditional = attention = False

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

