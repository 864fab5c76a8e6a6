"""Rejection with reseeding: draw, compare with the training set, draw again.

The honest cheap baseline, without a paper: it knows nothing of diffusion, changes no image that it keeps, and costs as
many drawings as it takes. It stands around a pipeline, not inside its loop, so it goes with any guidance:

    reject = Rejection(index, embedder)
    drawn = reject(lambda rows, seeds: pipe([prompts[i] for i in rows], generator=…), seeds)
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from train.sampling.config import RejectionConfig, configured
from train.sampling.similarity import ObjectLevel, PixelIndex, Similarity

if TYPE_CHECKING:
    from curate.embed import Embedder
    from curate.index import TrainingIndex


@dataclass
class Accepted:
    """What became of one image."""

    image: Any
    """As the pipeline gave it."""
    seed: int
    """That it was drawn from in the end."""
    similarity: float
    """To the nearest training image; above the limit if no try brought it below."""
    tries: int
    """Drawings made, 1 or more."""
    trace: list[dict[str, Any]]
    """The pipeline's, of this image."""


class Rejection:
    """Draws again, from other seeds, the images that come too close to a training image; keeps the farthest.

    Args:
        index: the training set, or its pixels.
        embedder: that the index was built with; none for pixels.
        config: settings.
        overrides: fields of :class:`RejectionConfig` to set otherwise.
    """

    def __init__(
        self,
        index: TrainingIndex | PixelIndex,
        embedder: Embedder | None = None,
        config: RejectionConfig | None = None,
        **overrides: Any,
    ) -> None:
        self.config = configured(RejectionConfig, config, overrides)
        self.similarity: Similarity
        if isinstance(index, PixelIndex):
            self.similarity = index
        else:
            assert embedder is not None, "an index of embeddings needs its embedder"
            self.similarity = ObjectLevel(index, embedder)
        self.limit = self.similarity.memorized if self.config.limit is None else self.config.limit

    def __call__(self, draw: Callable[[list[int], list[int]], Any], seeds: Sequence[int]) -> list[Accepted]:
        """Images for ``seeds``, each accepted or the farthest of its tries.

        Args:
            draw: ``(rows, seeds) → the pipeline's output`` for some of the images, in any output type.
            seeds: of each image's first try; the seeds of later ones follow from it.
        """
        best: dict[int, Accepted] = {}
        rows = list(range(len(seeds)))
        for attempt in range(self.config.tries):
            now = [reseeded(seeds[row], attempt) for row in rows]
            output = draw(rows, now)
            similarity = self._similarity(output.images)
            for i, row in enumerate(rows):
                trace = [{**step, "image": row} for step in output.trace if step["image"] == i]
                one = Accepted(output.images[i], now[i], similarity[i], attempt + 1, trace)
                if row not in best or one.similarity < best[row].similarity:
                    best[row] = one
                best[row].tries = attempt + 1
            rows = [row for row in rows if best[row].similarity > self.limit]
            if not rows:
                break
        return [best[row] for row in range(len(seeds))]

    def _similarity(self, images: Any) -> list[float]:
        with torch.no_grad():
            return self.similarity.nearest(as_pixels(images), 1).sigma[:, 0].tolist()


def reseeded(seed: int, attempt: int) -> int:
    """The seed of an image's n-th further try: the first is its own."""
    if attempt == 0:
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed} {attempt}".encode()).digest()[:4], "little")


def as_pixels(images: Any) -> torch.Tensor:
    """A pipeline's images (PIL, np or pt) as ``[n, 3, H, W]`` float32 in [0, 1]."""
    import numpy as np

    if isinstance(images, torch.Tensor):
        return images.float()
    if isinstance(images, list):
        images = np.stack([np.asarray(image.convert("RGB"), np.float32) / 255 for image in images])
    return torch.from_numpy(np.ascontiguousarray(images, np.float32)).permute(0, 3, 1, 2)
