"""How near finished images are to their nearest training images."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from afresh.errors import UsageError
from train.sampling.similarity import ObjectLevel, PixelIndex

if TYPE_CHECKING:
    from PIL import Image

    from curate.embed.protocol import Embedder
    from curate.index.training_index import TrainingIndex


class Judges:
    """Similarities of finished images to their nearest training images.

    Embeddings are taken from 8-bit images, as they are written to files. On pixels, images count as they are.

    Args:
        judges: ``(index, embedder)``, ``(pixel index, None)``.

    Raises:
        UserError: an index is empty, or was built with another embedder.
        UsageError: an index of embeddings came without its embedder.
    """

    def __init__(self, *judges: tuple[TrainingIndex | PixelIndex, Embedder | None]) -> None:
        self.levels: list[PixelIndex | ObjectLevel] = []
        self.names = tuple("pixels" if embedder is None else embedder.name for _, embedder in judges)
        for index, embedder in judges:
            if isinstance(index, PixelIndex):
                self.levels.append(index)
            elif embedder is None:
                raise UsageError("an index of embeddings judges with the embedder that it was built with")
            else:
                self.levels.append(ObjectLevel(index, embedder))
                index.hold()

    @property
    def memorized(self) -> float:
        """The similarity above which the literature counts an image as a copy, by the first judge."""
        return self.levels[0].memorized

    def __call__(self, images: Any) -> list[tuple[float, ...]]:
        """Of each image of a pipeline's output (PIL, np or pt): its similarity by each judge."""
        columns = []
        for level in self.levels:
            if isinstance(level, PixelIndex):
                with torch.no_grad():
                    columns.append(level.nearest(as_pixels(images), 1).sigma[:, 0].tolist())
            else:
                cosine, _ = level.index.search(level.embedder.embed(as_pil(images)), 1)
                columns.append(level.index.calibrate(cosine[:, 0]).tolist())
        return list(zip(*columns, strict=True))


def as_pixels(images: Any) -> torch.Tensor:
    """A pipeline's images (PIL, np or pt) as ``[n, 3, H, W]`` float32 in [0, 1]."""
    import numpy as np

    if isinstance(images, torch.Tensor):
        return images.float()
    if isinstance(images, list) and not isinstance(images[0], np.ndarray):
        images = [np.asarray(image.convert("RGB"), np.float32) / 255 for image in images]
    stacked = np.stack(images) if isinstance(images, list) else images
    return torch.from_numpy(np.ascontiguousarray(stacked, np.float32)).permute(0, 3, 1, 2)


def as_pil(images: Any) -> list[Image.Image]:
    """A pipeline's images (PIL, np or pt) in 8 bits, as diffusers rounds them."""
    import numpy as np
    from PIL import Image

    if isinstance(images, list) and not isinstance(images[0], (np.ndarray, torch.Tensor)):
        return images
    pixels = as_pixels(images).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(one) for one in (pixels * 255).round().clip(0, 255).astype(np.uint8)]

