"""The carried dual encoder as a metric: copies, alignment and quality, by a network that nothing follows."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from train.evaluation.config import Protocol
from train.evaluation.judging.distances import frechet
from train.evaluation.judging.drawn import Drawn
from train.evaluation.judging.dual_encoder import DualEncoder
from train.evaluation.judging.intervals import Values, mean, median, ratio, share
from train.evaluation.judging.metrics import retrieval_rank
from train.evaluation.metrics.copies import QUANTILE, Copies, lacks_images
from train.evaluation.metrics.protocol import Column, Reference


class DualEncoderJudge:
    """Copies by its copy space, alignment by its joint space, quality by the features before both.

    Args:
        reference: training, held-out images and captions are needed.
        encoder: the network; by default the one that ``reference.weights`` names, or else the carried one.
        quantile: of the held-out images' nearest-neighbour similarities, above which an image is a copy.
    """

    name = "dual-encoder"
    columns = (
        Column(
            "copied_share",
            "copied (independent judge)",
            "Share of images that a dual encoder which nothing optimises holds for copies: nearer to a training "
            "image than 99 % of the held-out images are.",
            "share",
            -1,
        ),
        Column(
            "alignment",
            "alignment",
            "Mean cosine of image and caption in the dual encoder’s joint space.",
            better=1,
        ),
        Column(
            "alignment_of_real",
            "of real images",
            "Alignment as a share of what the real images of the same captions earn, the originals that the prompts "
            "name. The carried dual encoder was trained on none of those that the quickstart repeats or holds out; "
            "images that a judge was trained on earn more.",
            "share",
            1,
        ),
        Column(
            "retrieval_rank",
            "caption rank",
            "Median rank of the image’s own caption among all captions at hand, under the dual encoder.",
            "rank",
            -1,
        ),
        Column(
            "quality",
            "Fréchet distance",
            "Fréchet distance to the held-out images on the dual encoder’s image features (not Inception’s; "
            "comparable only between rows with equally many images of the same captions).",
            better=-1,
        ),
    )

    def __init__(self, reference: Reference, encoder: DualEncoder | None = None, quantile: float = QUANTILE):
        self.encoder = encoder = encoder or DualEncoder.load(reference.weights.get(self.name) or None)
        self.about = "a dual encoder of images and captions; " + (reference.weights.get(self.name) or "the carried one")
        self.held_out_features = encoder.image_features(reference.held_out)
        self.copies = Copies(
            encoder.copy_features(reference.training), encoder.copy_from_features(self.held_out_features), quantile
        )
        self.candidates = list(dict.fromkeys(reference.captions))
        self.candidate_texts = encoder.embed_texts(self.candidates)
        self.originals = reference.originals
        self._real: dict[str, float] = {}

    @staticmethod
    def lacking(protocol: Protocol) -> str:
        return lacks_images(protocol, held_out=True)

    def measure(self, drawn: Drawn) -> dict[str, Values]:
        """Its columns, and image by image ``judged``, the cosine to the nearest training image, and ``nearest``, which
        one.
        """
        features = self.encoder.image_features(drawn.images)
        judged, nearest = self.copies.nearest(self.encoder.copy_from_features(features))
        joint = self.encoder.joint_from_features(features)
        # A caption that is no candidate yet joins for its own images' ranking.
        extra = [caption for caption in dict.fromkeys(drawn.captions) if caption not in self.candidates]
        texts = np.concatenate([self.candidate_texts, self.encoder.embed_texts(extra)])
        where = {caption: i for i, caption in enumerate([*self.candidates, *extra])}
        own = np.array([where[caption] for caption in drawn.captions])
        alignment = np.sum(joint * texts[own], axis=1)
        found = {
            "copied_share": share(judged > self.copies.threshold),
            "alignment": mean(alignment),
            "retrieval_rank": median(retrieval_rank(joint, texts, own)),
            "quality": frechet(features, self.held_out_features),
            "judged": mean(judged),
            "nearest": mean(nearest),
        }
        real = self._of_real(drawn)
        return found if np.isnan(real).all() else {**found, "alignment_of_real": ratio(alignment, real)}

    def _of_real(self, drawn: Drawn) -> NDArray[np.float64]:
        """``[n]``: what the real images of each image's caption earn, NaN where there are none."""
        for caption in dict.fromkeys(drawn.captions):
            if caption not in self._real and self.originals.get(caption):
                joint = self.encoder.embed_images(list(self.originals[caption]))
                self._real[caption] = float((joint @ self.encoder.embed_texts([caption])[0]).mean())
        return np.array([self._real.get(caption, np.nan) for caption in drawn.captions])
