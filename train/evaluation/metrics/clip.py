"""CLIP score and CLIP-FID, by any CLIP or SigLIP model of transformers: its folder or its hub name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from train.evaluation.config import Protocol
from train.evaluation.judging.distances import frechet
from train.evaluation.judging.drawn import Drawn
from train.evaluation.judging.intervals import Values, mean
from train.evaluation.metrics.protocol import Column, Reference

if TYPE_CHECKING:
    from PIL.Image import Image


BATCH = 32


class Clip:
    """Cosine of image and caption (Hessel et al., 2021, without their factor 2.5), and a Fréchet distance on the image
    embeddings before they are normalised (Kynkäänniemi et al., 2023).

    Args:
        reference: ``weights`` names the model; the distance needs held-out images.
    """

    name = "clip"
    columns = (
        Column("clip_score", "CLIP score", "Mean cosine of image and caption under CLIP.", better=1),
        Column(
            "clip_fid",
            "CLIP-FID",
            "Fréchet distance to the held-out images on CLIP’s image embeddings (comparable only between rows with "
            "equally many images of the same captions).",
            better=-1,
        ),
    )

    def __init__(self, reference: Reference):
        from curate.embed.image_towers import load_image_tower
        from curate.embed.text_towers import load_text_tower

        source = reference.weights[self.name]
        self.about = f"CLIP: {source}"
        self.images = load_image_tower("transformers", source, name=source, half=None)
        self.texts = load_text_tower("transformers", source, name=source, half=None)
        self.held_out = self.features(reference.held_out) if len(reference.held_out) > 1 else None

    @staticmethod
    def lacking(protocol: Protocol) -> str:
        return "" if protocol.weights.get("clip") else "weights: {clip: a transformers folder or hub name}"

    def measure(self, drawn: Drawn) -> dict[str, Values]:
        """Its columns, the distance only where there are held-out images."""
        features = self.features(drawn.images)
        unit = features / np.linalg.norm(features, axis=1, keepdims=True)
        captions = list(dict.fromkeys(drawn.captions))
        texts = dict(zip(captions, self.texts.embed(captions), strict=True))
        cosine = np.sum(unit * np.stack([texts[caption] for caption in drawn.captions]), axis=1)
        found = {"clip_score": mean(cosine)}
        return found if self.held_out is None else {**found, "clip_fid": frechet(features, self.held_out)}

    def features(self, images: Sequence[Image]) -> NDArray[np.float32]:
        """Image embeddings before they are normalised, float32 ``[n, d]``."""
        preprocessing, model = self.images.preprocessing, self.images.model
        device = next(model.parameters()).device
        rows = np.empty((len(images), self.images.dim), np.float32)
        with torch.inference_mode():
            for start in range(0, len(images), BATCH):
                for places, stack in preprocessing.stacks(images[start : start + BATCH]):
                    pixels = preprocessing.normalised(torch.from_numpy(stack).to(device))
                    rows[start + np.array(places)] = model(pixels).float().cpu().numpy()
        return rows
