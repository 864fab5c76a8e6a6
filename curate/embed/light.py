"""``luminance`` and ``edges``: weight-free looks at the pixels themselves, at low resolution.

They know nothing of what is shown and forgive no edit but a change of contrast and brightness, and of colour: what an
embedder of objects can be talked out of by other colours and texture, these still see. Beside an embedder they are
views of an index (:mod:`curate.stages.views`); alone they are too strict to find edited copies with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from curate.embed.preprocessing import Preprocessing
from curate.embed.protocol import Floats
from curate.reading.images import stack_images

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

_WEIGHTS = (0.299, 0.587, 0.114)  # of luminance
_STILL = 1e-2  # a gradient of luminance below which a place has no edge: keeps its length smooth at 0


class LightEmbedder:
    """Luminance at 16 × 16 places, or the length of its gradient at 32 × 32 places averaged in fours, less the mean.

    The cosine of two images is the correlation of these maps; of an image without light and shade it is 0.

    Args:
        name: luminance or edges.
    """

    dim, size = 256, 64
    _SIDE, _FINE = 16, 32

    def __init__(self, name: str) -> None:
        self.name: str = name

    @property
    def digest(self) -> str:
        """Of this description: another number with every change that moves vectors."""
        return f"{self.name}-1"

    def embed(self, images: Sequence[Image], batch_size: int = 256) -> Floats:
        result = np.empty((len(images), self.dim), np.float32)
        for start in range(0, len(images), batch_size):
            pixels = stack_images(images[start : start + batch_size], self.size)
            result[start : start + len(pixels)] = self._describe(pixels)
        return result

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        return self._describe(Preprocessing(self.size).resized(pixels))

    def _describe(self, pixels: Any) -> Any:
        """``[n, 3, size, size]`` → ``[n, dim]``, numpy or torch."""
        light = sum(weight * pixels[:, channel] for channel, weight in enumerate(_WEIGHTS))
        if self.name == "edges":
            fine = _averaged(light, self._FINE)
            dx = fine[:, 1:-1, 2:] - fine[:, 1:-1, :-2]
            dy = fine[:, 2:, 1:-1] - fine[:, :-2, 1:-1]
            length = (dx**2 + dy**2 + _STILL**2) ** 0.5 - _STILL
            light = fine * 0
            light[:, 1:-1, 1:-1] = length
        rows = _averaged(light, self._SIDE).reshape(len(pixels), -1)
        rows = rows - rows.mean(1)[:, None]
        return rows / ((rows**2).sum(1)[:, None] + 1e-8) ** 0.5


def _averaged(maps: Any, side: int) -> Any:
    """``[n, h, h]`` → ``[n, side, side]``, means of squares."""
    n, h, _ = maps.shape
    return maps.reshape(n, side, h // side, side, h // side).mean((2, 4))
