"""Embedders: images and captions → unit vectors whose inner product is a similarity.

Every image embedder keeps one protocol, :class:`Embedder`: ``embed`` for curation (PIL images, numpy out) and
``features`` for samplers (torch pixels, differentiable). ``load_embedder`` finds one by name:

- ``layout``: weight-free; where light, colour and edges lie. Survives storage, resizing, brightness, mild
  crops.
- ``copy-detector``: the carried network (``curate/copy_detector.py``); small images, edits of every kind.
- ``FILE.pt``, ``FILE.torchscript``: a TorchScript file such as SSCD's, at its official preprocessing, the shorter edge
  brought to 288 pixels; ``FILE.pt@320`` squashes images to squares of 320, SSCD's other official way, and
  ``FILE.pt@short224`` brings the shorter edge to 224 (``curate/networks.py``).
- ``transformers:NAME``, ``timm:NAME``, ``open_clip:ARCH/PRETRAINED``: an image tower of another library, by its hub
  name or folder (``curate/towers.py``), prepared as its own files say. A folder is recognised without the prefix.

Captions have :class:`CaptionEmbedder` and ``load_caption_embedder``:

- ``ngrams``: weight-free; the same letters in the same order.
- ``transformers:NAME``: the text tower of a CLIP or SigLIP model; ``sentence-transformers:NAME``: a sentence encoder.

Neural embedders run on the GPU where there is one: ``embed`` in half precision there, ``features`` in float32.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from curate.console import UsageError, UserError
from curate.images import stack_images
from curate.preprocess import Preprocessing, read_json

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

EMBEDDERS = ("layout", "copy-detector")
CAPTION_EMBEDDERS = ("ngrams",)
# By prefix; the extra names what pip installs.
IMAGE_LIBRARIES = ("transformers", "timm", "open_clip")
CAPTION_LIBRARIES = ("transformers", "sentence-transformers")
_TORCHSCRIPT = re.compile(r"(?P<path>.+\.(?:pt|torchscript))(?:@(?P<short>short)?(?P<size>[0-9]+))?")

Floats = NDArray[np.float32]


class Embedder(Protocol):
    """What dedup, the index and the sampler ask of an image embedder."""

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


def load_embedder(name_or_path: str, *, half: bool | None = None) -> Embedder:
    """The embedder of that name (see the head of this module).

    Args:
        name_or_path: which one.
        half: whether ``embed`` of a neural one computes in float16; None does so on a GPU. Vectors are float32, and
            normalised in float32, either way.

    Raises:
        UsageError: no embedder has this name, no file this path; or its library is not installed.
        UserError: the file or folder is there and cannot be used.
    """
    if name_or_path == "layout":
        return LayoutEmbedder()
    if name_or_path == "copy-detector":
        from curate.copy_detector import CopyDetector
        from curate.networks import TorchEmbedder

        model = CopyDetector.load()
        preprocessing = Preprocessing(model.size)
        return TorchEmbedder("copy-detector", model, dim=model.dim, preprocessing=preprocessing, half=half)
    library, _, source = name_or_path.partition(":")
    if not (library in IMAGE_LIBRARIES and source):
        library, source = "", name_or_path
        if Path(source).expanduser().is_dir():
            library = _recognised(Path(source).expanduser(), captions=False)
    if library:
        from curate.towers import load_image_tower

        return load_image_tower(library, source, name=name_or_path, half=half)
    if named := _TORCHSCRIPT.fullmatch(name_or_path):
        from curate.networks import load_torchscript

        fit: Literal["squash", "shortest"] = "shortest" if named["short"] or not named["size"] else "squash"
        return load_torchscript(name_or_path, named["path"], int(named["size"] or 288), fit, half)
    raise UsageError(
        f"unknown embedder {name_or_path!r}: choose {', '.join(EMBEDDERS)}, a TorchScript file (*.pt, *.torchscript), "
        f"or a model by its library ({', '.join(f'{name}:NAME' for name in IMAGE_LIBRARIES)})"
    )


def _recognised(folder: Path, *, captions: bool) -> str:
    """The library that a model folder is of, by the files in it.

    Raises:
        UserError: none of those that this project loads.
    """
    if captions and (folder / "modules.json").is_file():
        return "sentence-transformers"
    if not captions and (folder / "open_clip_config.json").is_file():
        return "open_clip"
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    if "model_type" in config:
        return "transformers"
    if not captions and "architecture" in config:
        return "timm"
    libraries = CAPTION_LIBRARIES if captions else IMAGE_LIBRARIES
    raise UserError(
        f"{folder} is no model folder of {', '.join(libraries)}: it has no config.json that tells its model_type"
    )


# ------------------------------------------------------------------------------------- the layout descriptor


class LayoutEmbedder:
    """Weight-free descriptor: low cosine frequencies of light and colour, and edge directions by place.

    Three blocks, each of about unit length, weighted and joined:

    1. the 8 × 8 lowest DCT coefficients of luminance (without the mean) and the 4 × 4 lowest of both chroma
       channels, whitened by the square root of their frequency (images have more power at low ones),
    2. smooth histograms of 8 edge directions in 3 × 3 overlapping cells, less their common mean,
    3. how empty the image is, and how bright then: two plain images are alike only if their grey is.

    Contrast drops out by normalisation, brightness with the mean. ``embed`` computes in numpy, ``features``
    the same formulas in torch.
    """

    name = digest = "layout"
    size = 64

    _LUMA, _CHROMA, _EDGES, _CELLS, _DIRECTIONS = 8, 4, 32, 3, 8
    _CHROMA_WEIGHT, _EDGE_WEIGHT = 1.5, 0.6
    _EMPTY = 0.25  # DCT energy below which an image counts as empty, in squared units of [0, 1] pixels

    dim = 2 + _LUMA**2 - 1 + 2 * _CHROMA**2 + _CELLS**2 * _DIRECTIONS

    def __init__(self) -> None:
        frequency = np.hypot(*np.meshgrid(np.arange(self._LUMA), np.arange(self._LUMA), indexing="ij"))
        chroma_frequency = np.maximum(frequency, 0.7)[: self._CHROMA, : self._CHROMA]
        turns = np.arange(self._DIRECTIONS) * np.pi / self._DIRECTIONS
        self._constants = {
            "ycc": np.array([[0.299, 0.587, 0.114], [-0.169, -0.331, 0.5], [0.5, -0.419, -0.081]], np.float32),
            "dct": _dct_matrix(self.size, self._LUMA),
            "luma": np.sqrt(frequency).astype(np.float32),
            "chroma": (np.sqrt(chroma_frequency) * self._CHROMA_WEIGHT).astype(np.float32),
            "blur": _gaussian_matrix(self.size, self._EDGES, sigma=1.5),
            "cells": _gaussian_matrix(self._EDGES - 2, self._CELLS, sigma=0.5 * self._EDGES / self._CELLS),
            "cos": np.cos(turns).astype(np.float32),
            "sin": np.sin(turns).astype(np.float32),
        }

    def embed(self, images: Sequence[Image], batch_size: int = 256) -> Floats:
        result = np.empty((len(images), self.dim), np.float32)
        for start in range(0, len(images), batch_size):
            pixels = stack_images(images[start : start + batch_size], self.size)
            result[start : start + len(pixels)] = self._describe(pixels, self._constants, np)
        return result

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        import torch

        constants = {k: torch.as_tensor(v, device=pixels.device) for k, v in self._constants.items()}
        return self._describe(Preprocessing(self.size).resized(pixels), constants, torch)

    def _describe(self, pixels: Any, c: dict[str, Any], xp: Any) -> Any:
        """``pixels`` ``[n, 3, size, size]`` → ``[n, dim]``; ``xp`` is numpy or torch, ``c`` its constants."""
        n = len(pixels)
        ycc = (c["ycc"] @ pixels.reshape(n, 3, -1)).reshape(pixels.shape)

        q = c["dct"] @ ycc @ c["dct"].T
        luma = (q[:, 0] * c["luma"]).reshape(n, -1)[:, 1:]
        chroma = (q[:, 1:, : self._CHROMA, : self._CHROMA] * c["chroma"]).reshape(n, -1)
        waves = xp.concatenate([luma, chroma], 1)
        energy = (waves**2).sum(1)[:, None] + self._EMPTY
        waves = waves / energy**0.5
        # A few large coefficients would decide alone: compress them (to the power of 0.8, smooth at 0).
        waves = waves * (waves**2 + 1e-5) ** -0.1
        empty = (self._EMPTY / energy) ** 0.5
        brightness = q[:, :1, 0, 0] / self.size * (math.pi / 2)
        plain = xp.concatenate([empty * xp.cos(brightness), empty * xp.sin(brightness)], 1)

        light = c["blur"] @ ycc[:, 0] @ c["blur"].T
        dx = (light[:, 1:-1, 2:] - light[:, 1:-1, :-2])[:, None]
        dy = (light[:, 2:, 1:-1] - light[:, :-2, 1:-1])[:, None]
        along = dx * c["cos"][:, None, None] + dy * c["sin"][:, None, None]
        # The gradient's length, shared out by cos⁴. A fourth power is a general one to numpy, and ten times as slow.
        votes = (along**2) ** 2 / ((dx**2 + dy**2) ** 2 + 1e-8) ** 0.75
        edges = (c["cells"] @ votes @ c["cells"].T).reshape(n, -1)
        edges = edges / ((edges**2).sum(1)[:, None] + 1e-5) ** 0.5
        edges = edges - edges.mean(1)[:, None]
        edges = edges / ((edges**2).sum(1)[:, None] + 1e-2) ** 0.5

        z = xp.concatenate([plain, waves, edges * self._EDGE_WEIGHT], 1)
        return z / (z**2).sum(1)[:, None] ** 0.5


def _dct_matrix(n: int, frequencies: int) -> Floats:
    """``[frequencies, n]``: the orthonormal type-II cosines."""
    u, i = np.arange(frequencies)[:, None], np.arange(n)[None]
    scale = np.where(u == 0, 1.0, 2.0) / n
    return (np.sqrt(scale) * np.cos(np.pi * (i + 0.5) * u / n)).astype(np.float32)


def _gaussian_matrix(n: int, places: int, sigma: float) -> Floats:
    """``[places, n]``: Gaussian windows at evenly spread places, rows summing to 1."""
    centres = (np.arange(places) + 0.5) * n / places - 0.5
    window = np.exp(-0.5 * ((np.arange(n)[None] - centres[:, None]) / sigma) ** 2)
    return (window / window.sum(1, keepdims=True)).astype(np.float32)


# -------------------------------------------------------------------------------------------------- captions


class CaptionEmbedder(Protocol):
    """What the join of captions and the search ask of a caption embedder."""

    name: str
    dim: int

    @property
    def digest(self) -> str:
        """As of :class:`Embedder`."""

    def embed(self, captions: Sequence[str]) -> Floats:
        """Captions → float32 ``[n, dim]``, unit rows; a row does not depend on the others but in its last bits."""


def load_caption_embedder(name_or_path: str, *, half: bool | None = None) -> CaptionEmbedder:
    """The caption embedder of that name (see the head of this module).

    Args:
        name_or_path: which one.
        half: as in :func:`load_embedder`.

    Raises:
        UsageError: none has this name; or its library is not installed.
        UserError: the folder is there and cannot be used.
    """
    if name_or_path == "ngrams":
        return NgramEmbedder()
    library, _, source = name_or_path.partition(":")
    if not (library in CAPTION_LIBRARIES and source):
        library, source = "", name_or_path
        if Path(source).expanduser().is_dir():
            library = _recognised(Path(source).expanduser(), captions=True)
    if library:
        from curate.towers import load_text_tower

        return load_text_tower(library, source, name=name_or_path, half=half)
    raise UsageError(
        f"unknown caption embedder {name_or_path!r}: choose {', '.join(CAPTION_EMBEDDERS)}, or a model by its library "
        f"({', '.join(f'{name}:NAME' for name in CAPTION_LIBRARIES)})"
    )


class NgramEmbedder:
    """Weight-free: :func:`embed_captions`, hashed character n-grams."""

    name = digest = "ngrams"
    dim = 512

    def embed(self, captions: Sequence[str]) -> Floats:
        return embed_captions(captions, dim=self.dim)


def normalise_caption(caption: str) -> str:
    """Compatibility forms and letter case unified, runs of white space made one space, none at the ends."""
    return " ".join(unicodedata.normalize("NFKC", caption).casefold().split())


def embed_captions(captions: Sequence[str], dim: int = 512, block: int = 2048) -> Floats:
    """Hashed character n-grams (n = 2, 3, 4) of the normalised captions, weight-free.

    Each n-gram adds ±1 to one of ``dim`` places, both chosen by its hash (Weinberger et al. 2009, arXiv
    0902.2206), so the inner product estimates the cosine of n-gram counts without bias.

    Args:
        captions: any strings; the empty one has a vector of its own.
        dim: length of the vectors.
        block: captions worked on at a time, which bounds memory.

    Returns:
        float32 ``[n, dim]``, unit rows; the same caption gives the same row whatever stands beside it.
    """
    result = np.empty((len(captions), dim), np.float32)
    for start in range(0, len(captions), block):
        # The marks at both ends make n-grams of beginnings and ends, and one of the empty caption.
        texts = [f"\x02{normalise_caption(caption)}\x03" for caption in captions[start : start + block]]
        lengths = np.array([len(text) for text in texts])
        # surrogatepass: a lone surrogate in a caption is ugly but no reason to stop
        codes = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), "<u4").astype(np.uint64)
        row = np.repeat(np.arange(len(texts)), lengths)
        last = np.repeat(np.cumsum(lengths), lengths)
        hashed, counts = np.zeros(len(codes), np.uint64), np.zeros(len(texts) * dim, np.float32)
        for n in range(1, 5):
            # Rolling polynomial: of the n characters from each place on.
            hashed = hashed[: len(codes) - n + 1] * np.uint64(0x100000001B3) + codes[n - 1 :]
            if n == 1:
                continue
            whole = np.arange(len(hashed)) + n <= last[: len(hashed)]
            mixed = _mixed(hashed[whole] + np.uint64(n))
            place = row[: len(hashed)][whole] * dim + (mixed % np.uint64(dim)).astype(np.int64)
            sign = np.where(mixed >> np.uint64(63), 1.0, -1.0)
            counts += np.bincount(place, sign, minlength=len(counts)).astype(np.float32)
        vectors = counts.reshape(-1, dim)
        norm = np.sqrt((vectors**2).sum(1, keepdims=True))
        # All n-grams of a very short caption may cancel; then its hash alone places it.
        for i in np.flatnonzero(norm[:, 0] == 0):
            vectors[i, int(_mixed(codes[row == i].sum(keepdims=True))[0]) % dim] = 1.0
            norm[i] = 1.0
        result[start : start + len(texts)] = vectors / norm
    return result


def _mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser: every input bit moves every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
