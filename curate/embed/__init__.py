"""Embedders: images and captions → unit vectors whose inner product is a similarity.

Every embedder keeps a protocol (``protocol.py``) and is found by name (``registry.py``, which lists the names). Each
kind has a file: the weight-free ones, ``layout`` and ``ngrams``; the carried copy detector; TorchScript files; and the
towers of other libraries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from afresh.lazy import handed_on

if TYPE_CHECKING:
    from curate.embed.protocol import CaptionEmbedder, Embedder
    from curate.embed.registry import load_caption_embedder, load_embedder

__all__ = [
    "CaptionEmbedder",
    "Embedder",
    "load_caption_embedder",
    "load_embedder",
]

__getattr__ = handed_on(
    __name__,
    {
        "CaptionEmbedder": "protocol",
        "Embedder": "protocol",
        "load_caption_embedder": "registry",
        "load_embedder": "registry",
    },
)
