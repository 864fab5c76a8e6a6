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

    What is described is the image within its plain borders, in coordinates of its own (see ``_borders``): a frame or
    a wider margin changes nothing. Four blocks, weighted and joined, and a last number:

    1. how empty the image is, and how bright and of what colour then: plain images are alike only if their colour is,
    2. the 7 × 7 lowest cosine coefficients of luminance, without the mean, of about unit length, whitened by a power of
       their frequency (images have more power at low ones); what is much brighter or darker than the rest is brought
       nearer before, so that a sticker does not outweigh the image,
    3. the 4 × 4 lowest of both chroma channels, likewise: short enough that an image is near its own grey copy, and
       long enough that it is not near the same shape in an opposite colour,
    4. smooth histograms of 8 edge directions in 3 × 3 overlapping cells, less their common mean,
    5. how little of luminance is symmetric, from top to bottom and from left to right: the more, the higher is the
       cosine with every image of which the same holds. Drawings are symmetric, a thing in the middle of its ground, and
       like many others by chance: they are compared strictly. Photographs are like their own copies only, and those are
       often cropped: at one threshold for both, they are compared leniently.

    Contrast drops out by normalisation, brightness with the mean. Every block is the sum of a part that stays and a
    part that changes its sign where the image is mirrored; the second is multiplied by a smooth sign of its own, so
    mirror images have equal vectors. ``embed`` computes in numpy, ``features`` the same formulas in torch.
    """

    name = "layout"
    digest = "layout-2"  # of this description: another number with every change that moves vectors
    size = 64

    _LUMA, _CHROMA, _EDGES, _CELLS, _DIRECTIONS = 7, 4, 32, 3, 8
    _CHROMA_WEIGHT, _EDGE_WEIGHT = 0.45, 0.8
    # Mean squares of [0, 1] pixels below which an image counts as empty, and as grey.
    _EMPTY, _GREY = 3e-5, 2e-4
    _SIGN = 2.0  # steepness of the smooth sign
    _STILL = 1e-4  # variance of luminance that is noise
    # The square of the last number before all is brought to unit length, at most; and of luminance, the shares that are
    # not symmetric from which it grows and at which it is that.
    _LENIENCE, _STRICT, _LENIENT = 1.8, 0.3, 0.7

    _TOGETHER = 64  # images described at a time: more fall out of a processor's cache, and take half as long again

    dim = 5 + _LUMA**2 - 1 + 2 * _CHROMA**2 + _CELLS**2 * _DIRECTIONS

    def __init__(self) -> None:
        frequency = np.hypot(*np.meshgrid(np.arange(self._LUMA), np.arange(self._LUMA), indexing="ij"))
        whitening = (np.maximum(frequency, 0.7) ** 0.75).astype(np.float32)
        whitening_luma = whitening.copy()
        whitening_luma[0, 0] = 0
        turns = np.arange(self._DIRECTIONS) * np.pi / self._DIRECTIONS
        places = np.arange(self.size, dtype=np.float32)
        cells, directions = self._CELLS, self._DIRECTIONS
        order = np.arange(directions * cells**2).reshape(directions, cells, cells)
        # Every second column of frequencies changes its sign in the mirror.
        odd = np.arange(self._LUMA) % 2 == 1
        odd_luma = np.broadcast_to(odd, (self._LUMA, self._LUMA)).astype(np.float32)
        odd_chroma = np.broadcast_to(odd[: self._CHROMA], (2, self._CHROMA, self._CHROMA)).astype(np.float32)
        self._constants: dict[str, Any] = {
            "ycc": np.array([[0.299, 0.587, 0.114], [-0.169, -0.331, 0.5], [0.5, -0.419, -0.081]], np.float32),
            "places": places,
            "frequencies": np.arange(self._LUMA, dtype=np.float32)[:, None],
            "amplitudes": np.where(np.arange(self._LUMA) == 0, 1, np.sqrt(2)).astype(np.float32)[:, None],
            "luma": whitening_luma,
            "chroma": whitening[: self._CHROMA, : self._CHROMA].copy(),
            "slanted": (odd | odd[:, None]).astype(np.float32).reshape(1, -1)[:, 1:].copy(),
            "odd_luma": odd_luma.reshape(1, -1)[:, 1:].copy(),
            "odd_chroma": odd_chroma.reshape(1, -1).copy(),
            # What each sign is taken of: the slope of light and colour from left to right, and of edges any mixture.
            "sign_luma": np.eye(1, self._LUMA**2 - 1, 0, dtype=np.float32),
            "sign_chroma": np.tile(np.eye(1, self._CHROMA**2, 1, dtype=np.float32), 2),
            "sign_edges": (np.sqrt(2) * np.cos(np.arange(order.size)[None] ** 2)).astype(np.float32),
            "mirror": order[(-np.arange(directions)) % directions][:, :, ::-1].reshape(-1).copy(),
            "blur": _gaussian_matrix(self.size, self._EDGES, sigma=1.5),
            "edge_places": (np.arange(1, self._EDGES - 1, dtype=np.float32) + 0.5) * (self.size / self._EDGES),
            "centres": ((np.arange(cells, dtype=np.float32) + 0.5) / cells)[:, None],
            "cos": np.cos(turns).astype(np.float32),
            "sin": np.sin(turns).astype(np.float32),
        }

    def embed(self, images: Sequence[Image], batch_size: int = 256) -> Floats:
        result = np.empty((len(images), self.dim), np.float32)
        step = min(batch_size, self._TOGETHER)
        for start in range(0, len(images), step):
            pixels = stack_images(images[start : start + step], self.size)
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
        cut = _borders(pixels, c["places"], xp)

        rows, columns = (self._waves(cut[:, 2 * axis : 2 * axis + 2], c, xp) for axis in (0, 1))
        columns = xp.swapaxes(columns, 1, 2)
        level = rows[:, :1] @ ycc[:, 0] @ columns[:, :, :1]
        light = ycc[:, 0] - level
        variance = rows[:, :1] @ light**2 @ columns[:, :, :1] + self._STILL
        luma = rows @ (light / (1 + light**2 / variance) ** 0.5) @ columns
        luma = (luma * c["luma"]).reshape(n, -1)[:, 1:]
        q = rows[:, None, : self._CHROMA] @ ycc[:, 1:] @ columns[:, None, :, : self._CHROMA]
        chroma = (q * c["chroma"]).reshape(n, -1)
        energy = (luma**2).sum(1)[:, None] + self._EMPTY
        slanted = (luma**2 * c["slanted"]).sum(1)[:, None] / energy
        luma = _compressed(luma / energy**0.5)
        chroma = _compressed(chroma / ((chroma**2).sum(1)[:, None] + self._GREY) ** 0.5)
        empty = (self._EMPTY / energy) ** 0.5
        brightness = level[:, 0] * (math.pi / 2)
        plain = xp.concatenate([xp.cos(brightness), xp.sin(brightness), 2 * q[:, :, 0, 0]], 1) * empty

        edges = self._edges(ycc[:, 0], cut, c, xp) * self._EDGE_WEIGHT
        mirrored = edges[:, c["mirror"]]
        blocks = [
            plain,
            self._turned(luma * (1 - c["odd_luma"]), luma * c["odd_luma"], c["sign_luma"], xp),
            self._turned(chroma * (1 - c["odd_chroma"]), chroma * c["odd_chroma"], c["sign_chroma"], xp)
            * self._CHROMA_WEIGHT,
            self._turned((edges + mirrored) / 2, (edges - mirrored) / 2, c["sign_edges"], xp),
        ]
        z = xp.concatenate(blocks, 1)
        z = z / (z**2).sum(1)[:, None] ** 0.5
        lenience = self._LENIENCE * xp.clip((slanted - self._STRICT) / (self._LENIENT - self._STRICT), 0, 1)
        return xp.concatenate([z, (lenience + 1e-9) ** 0.5], 1) / (1 + lenience) ** 0.5

    def _turned(self, even: Any, odd: Any, direction: Any, xp: Any) -> Any:
        """``even + s · odd``: s follows the sign of ``odd · direction``, and is small where chance would decide on it.

        Both parts are ``[n, k]``, ``direction`` is ``[1, k]``. In the mirror ``odd`` and s both change their sign.
        """
        length = ((odd**2).sum(1)[:, None] + 1e-9) ** 0.5
        return even + odd * xp.tanh(self._SIGN * (odd * direction).sum(1)[:, None] / length)

    def _waves(self, cut: Any, c: dict[str, Any], xp: Any) -> Any:
        """``[n, frequencies, size]``: cosines over what ``cut`` ``[n, 2]`` leaves of an axis, rows that take means."""
        within = _within(cut, c["places"], self.size, xp)
        t = (c["places"] + 0.5 - cut[:, :1]) / (self.size - cut.sum(1)[:, None])
        weight = within / within.sum(1)[:, None]
        return xp.cos(math.pi * c["frequencies"] * t[:, None]) * (c["amplitudes"] * weight[:, None])

    def _edges(self, light: Any, cut: Any, c: dict[str, Any], xp: Any) -> Any:
        """Luminance ``[n, size, size]`` → ``[n, directions · cells²]``, about unit rows; 0 where there is no edge."""
        n = len(light)
        light = c["blur"] @ light @ c["blur"].T
        dx = (light[:, 1:-1, 2:] - light[:, 1:-1, :-2])[:, None]
        dy = (light[:, 2:, 1:-1] - light[:, :-2, 1:-1])[:, None]
        along = dx * c["cos"][:, None, None] + dy * c["sin"][:, None, None]
        # The root of the gradient's length, shared out by cos⁴. A fourth power is a general one to numpy, and ten
        # times as slow.
        votes = (along**2) ** 2 / ((dx**2 + dy**2) ** 2 + 1e-8) ** 0.875
        cells = []
        for axis in (0, 1):
            span = cut[:, 2 * axis : 2 * axis + 2]
            t = (c["edge_places"] - span[:, :1]) / (self.size - span.sum(1)[:, None])
            window = xp.exp(-0.5 * ((t[:, None] - c["centres"]) * (self._CELLS / 0.8)) ** 2)
            # Less two pixels, or the step between a frame and the image would count as an edge of the image.
            window = window * _within(span + 2, c["edge_places"] - 0.5, self.size, xp)[:, None]
            cells.append(window / window.sum(2)[:, :, None])
        edges = (cells[0][:, None] @ votes @ xp.swapaxes(cells[1], 1, 2)[:, None]).reshape(n, -1)
        edges = edges / ((edges**2).sum(1)[:, None] + 1e-5) ** 0.5
        edges = edges - edges.mean(1)[:, None]
        return edges / ((edges**2).sum(1)[:, None] + 1e-2) ** 0.5


def _compressed(x: Any) -> Any:
    """To the power of 0.6, smooth at 0: a few large coefficients would decide alone."""
    return x * (x**2 + 1e-5) ** -0.2


def _within(cut: Any, places: Any, size: int, xp: Any) -> Any:
    """``[n, k]``: of the pixel that begins at each of k places, the share that ``cut`` ``[n, 2]`` leaves of an axis."""
    return xp.clip(places + 1 - cut[:, :1], 0, 1) * xp.clip(size - places - cut[:, 1:], 0, 1)


_ROUNDS, _MOST = 3, 10  # a frame, a margin within it and one more; how much of a side of 64 pixels is cut at most
_PLAIN, _SUDDEN, _SLOW, _ALIKE = 0.15, 2.5, 6.0, 0.1


def _borders(pixels: Any, places: Any, xp: Any) -> Any:
    """How much of each side is plain border: ``[n, 4]`` pixels from the top, the bottom, the left and the right.

    A line's deviation is the root mean square of its pixels' distances from the mean colour of the outermost line. Up
    to ``_PLAIN`` of what lines deviate on average, a line counts as plain, from the average on as content, and in
    between in part, as does what lies behind it: fractions of pixels count, and noise moves a cut little. Cuts that any
    edit would move are not made:

    - a border goes around a corner, so the outermost lines of two sides that meet are plain and of one colour, up to
      ``_ALIKE`` (a sky or the stripe of a flag is no border);
    - a border ends suddenly: up to ``_SUDDEN`` lines, neither plain nor content, are passed over freely, and from
      ``_SLOW`` on nothing is cut.

    What was cut once is looked at again, ``_ROUNDS`` times in all, for a margin within the frame.
    """
    size = pixels.shape[-1]
    both = xp.concatenate([pixels, (pixels**2).sum(1)[:, None]], 1)  # [n, 4, size, size]
    cut = xp.zeros_like(pixels[:, 0, :4, 0])
    for _ in range(_ROUNDS):
        rows, columns = (_within(cut[:, k : k + 2], places, size, xp) for k in (0, 2))
        share_rows, share_columns = (lines / lines.sum(1)[:, None] for lines in (rows, columns))
        across = (both @ share_columns[:, None, :, None])[..., 0]
        down = (share_rows[:, None, None, :] @ both)[..., 0, :]
        means = xp.stack([across, xp.flip(across, (2,)), down, xp.flip(down, (2,))], 1)  # [n, side, 4, size]
        shares = xp.stack([share_rows, xp.flip(share_rows, (1,)), share_columns, xp.flip(share_columns, (1,))], 1)
        # The outermost line that lies in the image with its whole width.
        first = xp.ceil(xp.clip(cut - 1e-3, 0, size))[:, :, None]
        outermost = xp.where(places == first, xp.ones_like(shares), xp.zeros_like(shares))
        colour = (means[:, :, :3] * outermost[:, :, None]).sum(3)[..., None]
        square = means[:, :, 3] - 2 * (means[:, :, :3] * colour).sum(2) + (colour**2).sum(2)
        deviation = (xp.clip(square, 0, 3) + 1e-7) ** 0.5
        average = ((square * shares).sum(2)[:, :, None] + 4e-4) ** 0.5
        content = xp.clip((deviation / average - _PLAIN) / (1 - _PLAIN), 0, 1) * xp.clip(places + 1 - first, 0, 1)
        plain = xp.cumprod(1 - content, 2)
        sudden = xp.clip((_SLOW - (4 * plain * (1 - plain)).sum(2)) / (_SLOW - _SUDDEN), 0, 1)
        still = xp.clip(2 - (deviation * outermost).sum(2) / average[..., 0] / _PLAIN, 0, 1)
        apart = ((colour[:, :2, None] - colour[:, None, 2:]) ** 2).sum(3)[..., 0] / _ALIKE**2
        corner = still[:, :2, None] * still[:, None, 2:] * xp.clip(2 - apart, 0, 1)
        gate = sudden * xp.concatenate([xp.amax(corner, 2), xp.amax(corner, 1)], 1)
        begun = (first[..., 0] - cut) * (1 - (content * outermost).sum(2))  # the rest of a line cut in part
        cut = xp.clip(cut + (begun + plain.sum(2) - first[..., 0]) * gate, 0, _MOST)
    return cut


def _gaussian_matrix(n: int, places: int, sigma: float) -> Floats:
    """``[places, n]``: Gaussian windows at evenly spread places, rows summing to 1."""
    centres = (np.arange(places) + 0.5) * n / places - 0.5
    window = np.exp(-0.5 * ((np.arange(n)[None] - centres[:, None]) / sigma) ** 2)
    return (window / window.sum(1, keepdims=True)).astype(np.float32)
