"""Photographs for the benchmarks: those that scikit-image and scikit-learn carry, and as many more made of them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SHORTER_SIDE = 512


def library_photographs() -> list[Image.Image]:
    """The photographs that come with scikit-image and scikit-learn, RGB; empty where neither is installed."""
    found: list[NDArray[np.uint8]] = []
    try:
        import skimage.data

        names = ("astronaut", "brick", "camera", "chelsea", "coffee", "coins", "grass", "gravel", "hubble_deep_field",
                 "rocket", "stereo_motorcycle")  # fmt: skip
        for name in names:
            try:
                opened = getattr(skimage.data, name)()
            except Exception:  # not all of them come with the package, some are fetched
                continue
            found.append(np.asarray(opened[0] if isinstance(opened, tuple) else opened))
    except ImportError:
        pass
    try:
        from sklearn.datasets import load_sample_images

        found += list(load_sample_images().images)
    except ImportError:
        pass
    return [Image.fromarray(array[..., :3] if array.ndim == 3 else array).convert("RGB") for array in found]


def grain(side: int, rng: np.random.Generator, scales: tuple[tuple[int, float], ...]) -> NDArray[np.float32]:
    """A field of noise: float32 ``[side, side]``, the sum of ``(pixels, deviation)`` in grey levels, one a scale."""
    field = np.zeros((side, side), np.float32)
    for scale, deviation in scales:
        noise = rng.standard_normal((side // scale, side // scale)).astype(np.float32)
        field += deviation * np.asarray(Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC))
    return field


def photograph(sources: list[Image.Image], noise: NDArray[np.int16], rng: np.random.Generator) -> Image.Image:
    """A random crop of one of ``sources`` in other colours, its shorter side 512 pixels.

    Args:
        sources: RGB.
        noise: ``[side, side]`` grey levels, side ≥ 1024, of which a random window is added, as a sensor's grain.
        rng: of everything that is random.
    """
    source = sources[rng.integers(len(sources))].rotate(float(rng.uniform(-5, 5)), Image.Resampling.BILINEAR)
    ratio = rng.uniform(1.0, 1.5)
    width, height = (ratio, 1.0) if rng.random() < 0.5 else (1.0, ratio)
    largest = min(source.width / width, source.height / height)
    side = rng.uniform(0.35, 0.7) * largest
    left, top = (rng.uniform(0.1, 0.9) * (whole - side * part) for whole, part in
                 ((source.width, width), (source.height, height)))  # fmt: skip
    size = (round(SHORTER_SIDE * width), round(SHORTER_SIDE * height))
    box = (left, top, left + side * width, top + side * height)
    image = source.resize(size, Image.Resampling.BICUBIC, box=box)
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    image = Image.merge("RGB", [image.getchannel(int(channel)) for channel in rng.permutation(3)])
    levels = np.linspace(0, 1, 256)
    curves = [rng.uniform(0.7, 1.0) * levels ** rng.uniform(0.6, 1.6) + rng.uniform(0.0, 0.1) for _ in range(3)]
    pixels = np.asarray(image.point([round(255 * min(1.0, level)) for curve in curves for level in curve]), np.int16)
    y, x = (int(rng.integers(len(noise) - side + 1)) for side in (size[1], size[0]))
    pixels = pixels + noise[y : y + size[1], x : x + size[0], None]
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
