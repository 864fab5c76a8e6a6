"""``layout``: a weight-free descriptor of images, where light, colour and edges lie."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from curate.embed.preprocessing import Preprocessing
from curate.embed.protocol import Floats
from curate.reading.images import stack_images

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image


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

