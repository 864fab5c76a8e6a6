"""Seeded edits of images: what happens to copies of an image as they travel.

``EDITS`` are the named edits that descriptors are measured under, each a function ``(image, rng) → image``;
``strong_edit`` composes several at random. All take and return PIL images in RGB and draw every random number
from the generator that they are given, so the same image and seed give the same pixels. The size of an image
is kept, unless the edit is a border, a quarter turn or a crop at its own resolution.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont, ImageOps

Edit = Callable[[Image.Image, np.random.Generator], Image.Image]
WHITE = (255, 255, 255)


def jpeg(image: Image.Image, rng: np.random.Generator, quality: int | None = None) -> Image.Image:
    """Stored as JPEG and read again; quality 30 to 90 unless given."""
    buffer = io.BytesIO()
    image.save(buffer, "jpeg", quality=int(rng.integers(30, 91)) if quality is None else quality)
    return Image.open(buffer).convert("RGB")


def resize(image: Image.Image, rng: np.random.Generator, factor: float | None = None) -> Image.Image:
    """Brought to 0.5–0.9 or 1.2–2.0 of its size (or ``factor``); the result has that size."""
    if factor is None:
        factor = float(rng.uniform(0.5, 0.9) if rng.random() < 0.5 else rng.uniform(1.2, 2.0))
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    return image.resize(size, Image.Resampling.BICUBIC)


def brightness(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Darkened or brightened by a factor of 0.7 to 1.3, never by less than a tenth."""
    factor = rng.uniform(0.7, 0.9) if rng.random() < 0.5 else rng.uniform(1.1, 1.3)
    return ImageEnhance.Brightness(image).enhance(float(factor))


def contrast(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Contrast changed by a factor of 0.6 to 1.4, never by less than a tenth."""
    factor = rng.uniform(0.6, 0.9) if rng.random() < 0.5 else rng.uniform(1.1, 1.4)
    return ImageEnhance.Contrast(image).enhance(float(factor))


def crop(image: Image.Image, rng: np.random.Generator, share: float | None = None) -> Image.Image:
    """Less 5–25 % (or ``share``) of the area: a window at a random place, at its own size."""
    share = float(rng.uniform(0.05, 0.25)) if share is None else share
    side = (1 - share) ** 0.5
    width, height = max(1, round(image.width * side)), max(1, round(image.height * side))
    left = int(rng.integers(0, image.width - width + 1))
    top = int(rng.integers(0, image.height - height + 1))
    return image.crop((left, top, left + width, top + height))


def flip(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Mirrored, left to right."""
    return ImageOps.mirror(image)


def rotate(image: Image.Image, rng: np.random.Generator, angle: float | None = None) -> Image.Image:
    """Turned by 3 to 15 degrees either way (or by ``angle``, anticlockwise); the corners are white.

    A quarter turn keeps every pixel, and its result has width and height exchanged.
    """
    if angle is None:
        angle = float(rng.uniform(3, 15) * rng.choice((-1, 1)))
    return image.rotate(angle, Image.Resampling.BICUBIC, expand=angle % 90 == 0, fillcolor=WHITE)


def blur(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Gaussian blur, sigma 1–2.5 % of the shorter side."""
    radius = float(rng.uniform(0.01, 0.025)) * min(image.size)
    return image.filter(ImageFilter.GaussianBlur(radius))


def overlay(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A word, or a coloured sticker that covers 4–9 % of the image, at a random place."""
    result = image.copy()
    draw = ImageDraw.Draw(result)
    colour = tuple(int(c) for c in rng.integers(0, 256, 3))
    if rng.random() < 0.5:
        _write(draw, image.size, colour, rng)
    else:
        side = rng.uniform(0.2, 0.3)
        left, top = rng.uniform(0, 1 - side, 2)
        box = (
            left * image.width,
            top * image.height,
            (left + side) * image.width,
            (top + side) * image.height,
        )
        (draw.ellipse if rng.random() < 0.5 else draw.rectangle)(box, fill=colour)
    return result


def text(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A word in a colour, a sixth of the image high, at a random place."""
    result = image.copy()
    colour = tuple(int(c) for c in rng.integers(0, 256, 3))
    _write(ImageDraw.Draw(result), image.size, colour, rng)
    return result


def _write(
    draw: ImageDraw.ImageDraw, size: tuple[int, int], colour: tuple[int, ...], rng: np.random.Generator
) -> None:
    width, height = size
    word = "".join(rng.choice(list("ABCDEFGHKLMNPRSTUVXYZ"), int(rng.integers(3, 7))))
    font = ImageFont.load_default(size=max(6, height // 6))
    draw.text((rng.uniform(0, 0.4) * width, rng.uniform(0, 0.8) * height), word, fill=colour, font=font)


def border(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A frame of one colour around the image, 4–12 % of its shorter side; the result is that much larger."""
    width = max(1, round(float(rng.uniform(0.04, 0.12)) * min(image.size)))
    return ImageOps.expand(image, width, fill=tuple(int(c) for c in rng.integers(0, 256, 3)))


def grayscale(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Without colour."""
    return ImageOps.grayscale(image).convert("RGB")


def colour_shift(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Hue turned by 20 to 60 degrees either way, saturation by a factor of 0.6 to 1.4."""
    hue, saturation, value = image.convert("HSV").split()
    turn = int(rng.uniform(20, 60) * rng.choice((-1, 1)) * 256 / 360)
    factor = float(rng.uniform(0.6, 1.4))
    hue = hue.point(lambda h: (h + turn) % 256)
    saturation = saturation.point(lambda s: min(255, round(s * factor)))
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


EDITS: dict[str, Edit] = {
    "jpeg": jpeg,
    "resize": resize,
    "brightness": brightness,
    "contrast": contrast,
    "crop": crop,
    "flip": flip,
    "rotate": rotate,
    "blur": blur,
    "overlay": overlay,
    "border": border,
    "grayscale": grayscale,
    "colour_shift": colour_shift,
}


def strong_edit(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Two to four different edits of ``EDITS`` in a random order, at the image's own size in the end."""
    names = rng.choice(list(EDITS), int(rng.integers(2, 5)), replace=False)
    result = image
    for name in names:
        result = EDITS[name](result, rng)
    return result.resize(image.size, Image.Resampling.BICUBIC) if result.size != image.size else result

