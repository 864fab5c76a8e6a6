"""The independent judge: a dual encoder and plain pixels, neither followed by anything."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from curate.neighbors.brute_force import nearest
from train.evaluation.judging.drawn import Drawn
from train.evaluation.judging.metrics import (
    copy_threshold,
    frechet_distance,
    memorized_share,
    retrieval_rank,
    thumbnails,
)

if TYPE_CHECKING:
    from PIL.Image import Image

    from train.evaluation.judging.dual_encoder import DualEncoder


PIXEL_COPY = 0.9
"""Correlation of 16 × 16 pixels above which an image counts as a pixel copy."""


class Judge:
    """The independent judge: a dual encoder, the training images, and images that were never trained on.

    Args:
        encoder: see :class:`~train.evaluation.judging.dual_encoder.DualEncoder`.
        training: the images that the models were trained on (each once; copies change nothing).
        held_out: images that no model was trained on and that are no copies of training images.
        captions: candidates among which an image has to find its own caption.
        quantile: of the held-out images' nearest-neighbour similarities, above which an image is a copy.
    """

    def __init__(
        self,
        encoder: DualEncoder,
        training: Sequence[Image],
        held_out: Sequence[Image],
        captions: Sequence[str],
        quantile: float = 0.99,
    ):
        self.encoder = encoder
        self.training_copy = encoder.copy_features(training)
        self.training_thumbnails = thumbnails(_stack(training))
        self.held_out_features = encoder.image_features(held_out)
        held_out_copy = encoder.copy_from_features(self.held_out_features)
        self.held_out_nearest = (held_out_copy @ self.training_copy.T).max(axis=1)
        self.threshold = copy_threshold(self.held_out_nearest, quantile)
        self.candidates = list(dict.fromkeys(captions))
        self.candidate_texts = encoder.embed_texts(self.candidates)

    def nearest(self, copy_features: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Similarity to the nearest training image, and which one: ``[n]`` each."""
        similarity, row = nearest(copy_features, [(0, self.training_copy)])
        return similarity[:, 0], row[:, 0]

    def measure(self, drawn: Drawn) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        """The judge's part of a table row, and its values image by image."""
        features = self.encoder.image_features(drawn.images)
        judged, nearest = self.nearest(self.encoder.copy_from_features(features))
        pixel = (thumbnails(_stack(drawn.images)) @ self.training_thumbnails.T).max(axis=1)
        joint = self.encoder.joint_from_features(features)
        own_texts = self.encoder.embed_texts(drawn.captions)
        # A caption that is no candidate yet joins for its own images' ranking.
        extra = [caption for caption in dict.fromkeys(drawn.captions) if caption not in self.candidates]
        candidates = self.candidates + extra
        texts = np.concatenate([self.candidate_texts, self.encoder.embed_texts(extra)])
        where = {caption: i for i, caption in enumerate(candidates)}
        rank = retrieval_rank(joint, texts, [where[caption] for caption in drawn.captions])
        row = {
            "copied_share": memorized_share(judged, self.threshold),
            "pixel_copied_share": memorized_share(pixel, PIXEL_COPY),
            "alignment": float(np.mean(np.sum(joint * own_texts, axis=1))),
            "retrieval_rank": float(np.median(rank)),
            "quality": frechet_distance(features, self.held_out_features) if len(features) > 1 else float("nan"),
        }
        return row, {"judged": judged, "nearest": nearest, "copied": judged > self.threshold, "pixel": pixel}


def _stack(images: Sequence[Image]) -> NDArray[np.float32]:
    from curate.reading.images import stack_images

    return stack_images(images, 64)

