"""Pixels: the judge without any learned part."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from train.evaluation.config import Protocol
from train.evaluation.judging.drawn import Drawn
from train.evaluation.judging.intervals import Values, mean, share
from train.evaluation.judging.metrics import PIXEL_COPY, thumbnails
from train.evaluation.metrics.copies import lacks_images
from train.evaluation.metrics.protocol import Column, Reference

if TYPE_CHECKING:
    from PIL.Image import Image


class Pixels:
    """Correlation with the training images at 16 × 16 pixels."""

    name = "pixels"
    about = "correlation at 16 × 16 pixels; nothing learned"
    columns = (
        Column(
            "pixel_copied_share",
            "copied (pixels)",
            f"Share of images whose 16 × 16 pixels correlate above {PIXEL_COPY} with a training image.",
            "share",
            -1,
        ),
    )

    def __init__(self, reference: Reference):
        self.training = thumbnails(stacked(reference.training))

    @staticmethod
    def lacking(protocol: Protocol) -> str:
        return lacks_images(protocol, held_out=False)

    def measure(self, drawn: Drawn) -> dict[str, Values]:
        """``pixel_copied_share``, and image by image ``pixel``, the highest correlation."""
        correlation = (thumbnails(stacked(drawn.images)) @ self.training.T).max(axis=1)
        return {"pixel_copied_share": share(correlation > PIXEL_COPY), "pixel": mean(correlation)}


def stacked(images: Sequence[Image]) -> NDArray[np.float32]:
    """``[n, 3, 64, 64]`` in [0, 1]."""
    from curate.reading.images import stack_images

    return stack_images(images, 64)
