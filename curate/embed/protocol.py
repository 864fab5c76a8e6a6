"""What curation and the sampler ask of an embedder of images, and of one of captions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image


Floats = NDArray[np.float32]


class Embedder(Protocol):
    """What dedup, the index and the sampler ask of an image embedder.

    One that runs on a GPU where there is one says so with an attribute ``accelerated``: curation then runs as many of
    it as the GPUs have room for, each in a process that sees one GPU.
    """

    name: str
    dim: int
    size: int  # images are looked at as squares of this many pixels, or with a shorter edge of as many

    @property
    def digest(self) -> str:
        """Hex or a name: another one where weights or settings are others. What was embedded is cached under it."""

    def embed(self, images: Sequence[Image], batch_size: int = 256) -> Floats:
        """Images → float32 ``[n, dim]``, unit rows; a row does not depend on the others but in its last bits."""

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """``[n, 3, H, W]`` in [0, 1], any H and W → float32 ``[n, dim]``, unit rows; differentiable."""


class CaptionEmbedder(Protocol):
    """What the join of captions and the search ask of a caption embedder."""

    name: str
    dim: int

    @property
    def digest(self) -> str:
        """As of :class:`Embedder`."""

    def embed(self, captions: Sequence[str]) -> Floats:
        """Captions → float32 ``[n, dim]``, unit rows; a row does not depend on the others but in its last bits."""

