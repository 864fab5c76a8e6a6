"""The index's own embedder, which guidance may follow: no independent evidence, but the scale of the literature."""

from __future__ import annotations

import numpy as np

from train.evaluation.config import Protocol
from train.evaluation.judging.drawn import Drawn
from train.evaluation.judging.intervals import Rows, Values, mean, share
from train.evaluation.judging.metrics import similarity_among_seeds
from train.evaluation.metrics.protocol import Column, Reference
from train.memorization.config import MEMORIZED


class Detector:
    """Similarity to the nearest training image in the index, on SSCD's scale."""

    name = "detector"
    columns = (
        Column(
            "memorized_share",
            "memorized",
            "Share of images whose nearest training image is above 0.5 by the index’s embedder, on SSCD’s scale. "
            "Guidance steers by this embedder, so under guidance it is no independent evidence.",
            "share",
            -1,
        ),
        Column(
            "similarity",
            "similarity",
            "Mean similarity to the nearest training image, on SSCD’s scale.",
            better=-1,
        ),
        Column(
            "similarity_among_seeds",
            "among seeds",
            "Mean similarity of images drawn for one caption from different noises: a memorized caption draws one "
            "image.",
            better=-1,
        ),
    )

    def __init__(self, reference: Reference):
        assert reference.index is not None and reference.embedder is not None  # lacking() saw to it
        self.index, self.embedder = reference.index, reference.embedder
        self.about = f"{self.index.embedder}, the index’s embedder, which guidance may follow"

    @staticmethod
    def lacking(protocol: Protocol) -> str:
        return "" if protocol.index else "index: the output folder of curate dedup"

    def measure(self, drawn: Drawn) -> dict[str, Values]:
        """Its columns; ``similarity`` image by image, too."""
        embeddings = self.embedder.embed(list(drawn.images))
        cosine, _ = self.index.search(embeddings, 1)
        similarity = np.asarray(self.index.calibrate(cosine[:, 0]), np.float32)
        captions = np.asarray(drawn.captions)
        alike, weight = np.full(len(captions), np.nan), np.ones(len(captions))
        for caption in np.unique(captions):
            mine = captions == caption
            alike[mine] = similarity_among_seeds(embeddings[mine], captions[mine])
            weight[mine] = 1 / mine.sum()  # prompts count alike, however many images of them there are

        def among_seeds(rows: Rows) -> float:
            rows = rows[~np.isnan(alike[rows])]
            if not len(rows):
                return float("nan")
            cosine = np.average(alike[rows], weights=weight[rows])
            return float(self.index.calibrate(np.array([cosine], np.float32))[0])

        return {
            "memorized_share": share(similarity > MEMORIZED),
            "similarity": mean(similarity),
            "similarity_among_seeds": Values(among_seeds),
        }
