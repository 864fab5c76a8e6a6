"""Agreement among initial noises on the image: whether all of them are on the way to one.

Consistency (NeMo) compares ``ε(x_T, e_p) − x_T`` among seeds, which is all but ``x̂_0``: at t ≈ T, where
``√(1−ᾱ_t) ≈ 1``, ``x̂_0 = (x_t − √(1−ᾱ_t) ε) / √ᾱ_t`` is its negative, scaled. Taking ``x̂_0`` itself carries the
comparison over to any step. The form is this project's own.

Agreement and magnitude err on different prompts and noises: :class:`Joint` is their product.

The first step is not where noise tells most. At t ≈ T little of the output is image. Told that the same noise is a
latent of t = 0.8 T, the denoiser has to find an image in it, and for a memorized prompt finds the same one in any noise
(:class:`JointOnNoise`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from train.memorization.signals.consistency import highest_with_another
from train.memorization.signals.magnitude import Form, magnitude
from train.memorization.signals.ssim import rescaled

if TYPE_CHECKING:
    from train.memorization.signals.protocol import LooksAt, Seen


class Agreement:
    """MS-SSIM among a prompt's seeds of the images ``x̂_0`` that the prompt alone predicts at the last step scored.

    The prediction is the conditional one: the guided one leaves the range of images in the first steps. Of a seed: the
    highest score with another seed. Of the prompt: the highest of all.
    """

    name = "agreement"
    looks_at: ClassVar[LooksAt] = "every step"
    noise_level: ClassVar[float | None] = None
    compares_seeds = True
    unconditional = attention = False

    def observe(self, seen: Seen) -> Tensor:
        """``[n, c, h, w]``: ``x̂_0`` with each channel brought to [0, 1], which makes its factor ``√ᾱ_t`` idle."""
        return rescaled(seen.x_t - seen.at.noise * seen.eps_cond)

    def combine(self, observed: Tensor) -> Tensor:
        """``[seeds, steps, c, h, w]`` → ``[seeds]``, in [0, 1]."""
        return highest_with_another(observed[:, -1])

    def of_prompt(self, values: Tensor) -> Tensor:
        """The highest."""
        return values.max()


class Joint(Agreement):
    """:class:`Agreement` times the magnitude, averaged over the steps and the prompt's seeds.

    Args:
        form: of the magnitude.
    """

    name = "joint"
    unconditional = True

    def __init__(self, form: Form = "l2") -> None:
        self.form = form

    def observe(self, seen: Seen) -> Tensor:
        """``[n, c + 1, h, w]``: what agreement observes, and the magnitude all over one more channel."""
        assert seen.eps_uncond is not None
        m = magnitude(seen.eps_cond, seen.eps_uncond, form=self.form)
        image = super().observe(seen)
        return torch.cat([image, m[:, None, None, None].expand_as(image[:, :1])], dim=1)

    def combine(self, observed: Tensor) -> Tensor:
        """``[seeds, steps, c + 1, h, w]`` → ``[seeds]``."""
        return super().combine(observed[:, :, :-1]) * observed[:, :, -1].mean()


class JointOnNoise(Joint):
    """The same from pure noise taken for a latent of ``t = 0.8 T``: no step of a trajectory is needed."""

    name = "joint_on_noise"
    looks_at: ClassVar[LooksAt] = "no step"
    noise_level: ClassVar[float | None] = 0.8

