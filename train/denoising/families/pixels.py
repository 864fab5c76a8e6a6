"""Unconditional and class-conditional models of pixel space behind the same two notions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from train.denoising.conditioning import Conditioning

if TYPE_CHECKING:
    from diffusers import UNet2DModel


class PixelDenoiser:
    """A ``UNet2DModel``; a class-conditional one is conditioned on ``labels [n]``.

    Args:
        unet: predicts ``[n, c, h, w]``, or twice the channels if it predicts variances too.
    """

    def __init__(self, unet: UNet2DModel) -> None:
        self.network = unet

    def __call__(self, x_t: Tensor, t: Any, conditioning: Conditioning | None) -> Tensor:
        """The model's output for images ``[n, c, h, w]``."""
        labels = None if conditioning is None else conditioning.parts["labels"]
        return self.network(x_t, t, class_labels=labels).sample
