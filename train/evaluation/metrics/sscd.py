"""SSCD, the copy detector of the literature (Pizzi et al., CVPR 2022), from its TorchScript file."""

from __future__ import annotations

import numpy as np

from train.evaluation.config import Protocol
from train.evaluation.judging.drawn import Drawn
from train.evaluation.judging.intervals import Values, mean, share
from train.evaluation.metrics.copies import lacks_images
from train.evaluation.metrics.protocol import Column, Reference
from train.memorization.config import MEMORIZED


class SSCD:
    """Similarity to the nearest training image, and to the prompt's own originals as Wen et al. and MemBench report it.

    Args:
        reference: ``weights`` names the file, as ``curate.embed.load_embedder`` takes it (``FILE.pt@320``).
    """

    name = "sscd"
    columns = (
        Column(
            "sscd_share",
            "copied (SSCD)",
            f"Share of images whose SSCD similarity to the nearest training image is above {MEMORIZED}.",
            "share",
            -1,
        ),
        Column("sscd", "SSCD", "Mean SSCD similarity to the nearest training image.", better=-1),
        Column(
            "sscd_own",
            "SSCD (own)",
            "Mean SSCD similarity to the nearest of the prompt’s own originals, as published comparisons give it.",
            better=-1,
        ),
    )

    def __init__(self, reference: Reference):
        from curate.embed.registry import load_embedder

        source = reference.weights[self.name]
        self.about = f"SSCD: {source}"
        self.embedder = load_embedder(source)
        self.training = self.embedder.embed(list(reference.training))
        self.own = {caption: self.embedder.embed(list(images)) for caption, images in reference.originals.items()}

    @staticmethod
    def lacking(protocol: Protocol) -> str:
        if not protocol.weights.get("sscd"):
            return "weights: {sscd: its TorchScript file}"
        return lacks_images(protocol, held_out=False)

    def measure(self, drawn: Drawn) -> dict[str, Values]:
        """Its columns; the prompt's own only where a prompt names originals."""
        vectors = self.embedder.embed(list(drawn.images))
        nearest = (vectors @ self.training.T).max(axis=1)
        found = {"sscd_share": share(nearest > MEMORIZED), "sscd": mean(nearest)}
        own = np.full(len(vectors), np.nan)
        for row, caption in enumerate(drawn.captions):
            if len(self.own.get(caption, ())):
                own[row] = (self.own[caption] @ vectors[row]).max()
        return found if np.isnan(own).all() else {**found, "sscd_own": mean(own)}
