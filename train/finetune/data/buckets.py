"""The sizes that images are brought to: one square, or a bucket for each aspect ratio; by squashing or cropping.

Buckets as in NovelAI's recipe (Aspect Ratio Bucketing, 2022), which the trainers of Stable Diffusion follow: sizes
whose sides are multiples of a step and whose area is at most that of the square, and each image in the one whose
aspect ratio is nearest to its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Size = tuple[int, int]
"""Width and height in pixels."""
Box = tuple[float, float, float, float]
"""Left, top, right and bottom in pixels, not rounded."""
Crop = Literal["none", "center", "random"]


def bucket_sizes(resolution: int, step: int, min_side: int = 0, max_side: int = 0) -> list[Size]:
    """All sizes for images of any aspect ratio, the tallest first.

    Args:
        resolution: side of the square that bounds the area, in pixels.
        step: sides are multiples of it.
        min_side: smallest side; 0 is half the resolution.
        max_side: largest side; 0 is twice the resolution.

    Returns:
        For every width the largest height that the area allows, and the same turned; of sizes with the same aspect
        ratio the largest. Empty if the limits leave none.
    """
    low = max(-(-(min_side or resolution // 2) // step) * step, step)
    high = max_side or 2 * resolution
    by_ratio: dict[float, Size] = {}
    for width in range(low, high + 1, step):
        height = min(resolution**2 // width, high) // step * step
        if height >= low:
            for size in ((width, height), (height, width)):
                ratio = size[0] / size[1]
                by_ratio[ratio] = max(size, by_ratio.get(ratio, size))
    return [by_ratio[ratio] for ratio in sorted(by_ratio)]


def nearest_bucket(width: NDArray[np.int32], height: NDArray[np.int32], sizes: Sequence[Size]) -> NDArray[np.uint16]:
    """The bucket of each image: nearest is the smallest quotient of the aspect ratios.

    Args:
        width, height: of the images, ``[n]`` pixels.
        sizes: from :func:`bucket_sizes`, in its order.

    Returns:
        Indices into ``sizes``, ``[n]`` uint16.
    """
    ratio = np.array([w / h for w, h in sizes])
    # The border between two ratios is their geometric mean; squares are compared, which rounds alike on every machine.
    border = ratio[:-1] * ratio[1:]
    return np.searchsorted(border, (width / height) ** 2).astype(np.uint16)


def sizes_without_enlarging(resolution: int, step: int, max_side: int = 0) -> list[Size]:
    """All sizes that an image may shrink to: sides that are multiples of a step, down to one of it.

    Args:
        resolution, step, max_side: see :func:`bucket_sizes`.
    """
    sides = range(step, (max_side or 2 * resolution) + 1, step)
    return [(width, height) for width in sides for height in sides if width * height <= resolution**2]


def fitting_bucket(width: NDArray[np.int32], height: NDArray[np.int32], sizes: Sequence[Size]) -> NDArray[np.uint16]:
    """The bucket of each image among those that are no larger than it: the one for which it is shrunk least, on the
    side that is shrunk more; where none is that small, the smallest.

    Args:
        width, height: of the images, ``[n]`` pixels.
        sizes: from :func:`sizes_without_enlarging`.

    Returns:
        Indices into ``sizes``, ``[n]`` uint16.
    """
    wide, high = np.array(sizes, dtype=np.float64).T
    across, down = wide / width[:, None], high / height[:, None]
    fits = (across <= 1) & (down <= 1)
    # Of those that shrink one side alike, the one that keeps more of the other.
    scale = np.where(fits, np.minimum(across, down) + 1e-6 * np.maximum(across, down), 0.0)
    return np.where(fits.any(axis=1), scale.argmax(axis=1), (wide * high).argmin()).astype(np.uint16)


def crop_box(image: Size, target: Size, crop: Crop, at: Sequence[float] = (0.5, 0.5)) -> Box:
    """The part of an image that fills the target.

    Args:
        image: its size.
        target: the size that it is brought to.
        crop: ``none`` takes the whole image, which is squashed; ``center`` and ``random`` the largest part of the
            target's aspect ratio.
        at: of ``random``, where that part lies, horizontally and vertically, in [0, 1].

    Returns:
        Of the image.
    """
    if crop == "none":
        return 0.0, 0.0, float(image[0]), float(image[1])
    scale = min(image[0] / target[0], image[1] / target[1])
    part = min(scale * target[0], image[0]), min(scale * target[1], image[1])
    x, y = at if crop == "random" else (0.5, 0.5)
    left, top = (image[0] - part[0]) * x, (image[1] - part[1]) * y
    return left, top, min(left + part[0], image[0]), min(top + part[1], image[1])


def bring_to(image: Image.Image, target: Size, box: Box) -> NDArray[np.uint8]:
    """A part of an RGB image at a size, antialiased: ``[3, height, width]`` uint8."""
    if image.size != target or box != (0.0, 0.0, float(image.width), float(image.height)):
        image = image.resize(target, Image.Resampling.BICUBIC, box=box)
    return np.ascontiguousarray(np.asarray(image, dtype=np.uint8).transpose(2, 0, 1))

