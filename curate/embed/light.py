"""``luminance``, ``edges`` and ``chroma``: weight-free looks at the pixels themselves, at low resolution.

They know nothing of what is shown and forgive no edit but a change of contrast and brightness; the first two see no
colour, the third nothing else. What an embedder of objects can be talked out of by other colours and texture, or by
other strokes in the same colours, these still see. Beside an embedder they are views of an index
(:mod:`curate.stages.views`); alone they are too strict to find edited copies with.
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
_GREY = 1e-2  # a difference of colour, root mean square, below which an image has none: keeps noise from unit length


class LightEmbedder:
    """Luminance at 16 × 16 places, the length of its gradient at 32 × 32 places averaged in fours, or blue and red less
    luminance (the colour differences of YCbCr) at 8 × 8 places; each map less its mean.

    The cosine of two images is the correlation of these maps; of an image without light and shade, or without colour,
    it is 0.

    Args:
        name: luminance, edges or chroma.
    """

    size = 64
    _SIDE, _FINE, _COARSE = 16, 32, 8

    def __init__(self, name: str) -> None:
        self.name: str = name
        self.dim = 2 * self._COARSE**2 if name == "chroma" else self._SIDE**2

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
        if self.name == "chroma":
            maps = (pixels[:, [2, 0]] - light[:, None]).reshape(-1, self.size, self.size)
            return _unit(_averaged(maps, self._COARSE).reshape(len(pixels), 2, -1), self.dim * _GREY**2)
        if self.name == "edges":
            fine = _averaged(light, self._FINE)
            dx = fine[:, 1:-1, 2:] - fine[:, 1:-1, :-2]
            dy = fine[:, 2:, 1:-1] - fine[:, :-2, 1:-1]
            length = (dx**2 + dy**2 + _STILL**2) ** 0.5 - _STILL
            light = fine * 0
            light[:, 1:-1, 1:-1] = length
        return _unit(_averaged(light, self._SIDE).reshape(len(pixels), 1, -1), 1e-8)


def _unit(maps: Any, still: float) -> Any:
    """Maps ``[n, k, d]``, each less its mean, as ``[n, k·d]``, of unit length where their square is above ``still``."""
    rows = (maps - maps.mean(2)[:, :, None]).reshape(len(maps), -1)
    return rows / ((rows**2).sum(1)[:, None] + still) ** 0.5


def _averaged(maps: Any, side: int) -> Any:
    """``[n, h, h]`` → ``[n, side, side]``, means of squares."""
    n, h, _ = maps.shape
    return maps.reshape(n, side, h // side, side, h // side).mean((2, 4))
