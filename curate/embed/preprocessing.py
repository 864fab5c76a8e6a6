"""How an image becomes the input of a network: resized, cut out, normalised, as the network was trained.

One description, :class:`Preprocessing`, serves both sides of an embedder: PIL images for curation, and torch pixels,
differentiably, for samplers. It is read from the file that comes with a model, without the library (or torchvision)
that wrote it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from afresh.errors import UserError
from afresh.files import read_json
from curate.reading.images import image_array

if TYPE_CHECKING:
    import torch


Filter = Literal["bilinear", "bicubic", "lanczos"]
Triple = tuple[float, float, float]
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
_PIL_FILTERS: dict[Filter, Image.Resampling] = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
# How many times as long as wide an image may be, whole and cut; of what is longer still, only the middle is resized: a
# line of pixels would become gigabytes.
_LONGEST, _LONGEST_CUT = 8, 64


@dataclass(frozen=True)
class Preprocessing:
    """Resize, centre crop, normalise.

    Attributes:
        size: side of the square, or length of the shorter edge, in pixels.
        fit: ``squash`` makes squares, whatever the image's shape; ``shortest`` brings the shorter edge to ``size`` and
            keeps the shape (of images more than 8 times as long as wide, or 64 times before a crop, the middle).
        crop: side of the square cut from the middle then; None leaves the image whole, and with ``shortest`` images
            differ in shape.
        filter: as PIL resizes, antialiased.
        mean, std: subtracted from and dividing the [0, 1] pixels, by channel.
        rounds: where a margin is odd, the crop begins at its rounded half, as in torchvision, instead of its half
            rounded down, as in transformers.

    Raises:
        UserError: the crop is larger than what it is cut from.
    """

    size: int
    fit: Literal["squash", "shortest"] = "squash"
    crop: int | None = None
    filter: Filter = "bicubic"
    mean: Triple = (0.0, 0.0, 0.0)
    std: Triple = (1.0, 1.0, 1.0)
    rounds: bool = False

    def __post_init__(self) -> None:
        if self.size < 1 or not 1 <= (self.crop or self.size) <= self.size:
            raise UserError(f"preprocessing: a crop of {self.crop} pixels cannot be cut from {self.size} pixels")

    @property
    def side(self) -> int:
        """Of the square that the network sees; of the shorter edge, where there is no square."""
        return self.crop or self.size

    def stacks(self, images: Sequence[Image.Image]) -> list[tuple[list[int], NDArray[np.float32]]]:
        """Images resized and cut out, not yet normalised.

        Returns:
            ``(places, pixels)`` for each shape that occurs: which images, and float32 ``[k, 3, h, w]`` in [0, 1].
        """
        by_shape: dict[tuple[int, ...], tuple[list[int], list[NDArray[np.float32]]]] = {}
        for place, image in enumerate(images):
            width, height = self._looked_at(image.width, image.height)
            if (width, height) != image.size:
                left, top = (image.width - width) // 2, (image.height - height) // 2
                image = image.crop((left, top, left + width, top + height))
            width, height = self._scaled(width, height)
            pixels = self._cut(image_array(image, (width, height), _PIL_FILTERS[self.filter]))
            places, arrays = by_shape.setdefault(pixels.shape, ([], []))
            places.append(place)
            arrays.append(pixels)
        return [(places, np.stack(arrays)) for places, arrays in by_shape.values()]

    def resized(self, pixels: torch.Tensor) -> torch.Tensor:
        """The same of ``[n, 3, H, W]`` pixels in [0, 1], not yet normalised: float32 ``[n, 3, h, w]``; differentiable.

        Differs from PIL's answer by the rounding to 8 bits; ``lanczos``, which torch lacks, is ``bicubic`` here.
        """
        from torch.nn.functional import interpolate

        pixels = pixels.float()
        width, height = self._looked_at(pixels.shape[-1], pixels.shape[-2])
        left, top = (pixels.shape[-1] - width) // 2, (pixels.shape[-2] - height) // 2
        pixels = pixels[..., top : top + height, left : left + width]
        width, height = self._scaled(width, height)
        if pixels.shape[-2:] != (height, width):
            mode = "bilinear" if self.filter == "bilinear" else "bicubic"
            # Bicubic overshoots; PIL's answer lies in [0, 255] by its type.
            pixels = interpolate(pixels, size=(height, width), mode=mode, antialias=True).clamp(0, 1)
        return self._cut(pixels)

    def normalised(self, pixels: torch.Tensor) -> torch.Tensor:
        """``(pixels − mean) / std``, by channel."""
        mean, std = (pixels.new_tensor(values).reshape(1, 3, 1, 1) for values in (self.mean, self.std))
        return (pixels - mean) / std

    def _looked_at(self, width: int, height: int) -> tuple[int, int]:
        """``(width, height)`` of the middle that is looked at."""
        if self.fit == "squash":
            return width, height
        longest = _LONGEST if self.crop is None else _LONGEST_CUT
        return min(width, longest * height), min(height, longest * width)

    def _scaled(self, width: int, height: int) -> tuple[int, int]:
        """``(width, height)`` after resizing; a longer edge is rounded down."""
        if self.fit == "squash":
            return self.size, self.size
        if width <= height:
            return self.size, int(self.size * height / width)
        return int(self.size * width / height), self.size

    def _cut(self, pixels: Any) -> Any:
        if self.crop is None:
            return pixels
        halve = (lambda margin: round(margin / 2)) if self.rounds else (lambda margin: margin // 2)
        top, left = halve(pixels.shape[-2] - self.crop), halve(pixels.shape[-1] - self.crop)
        return pixels[..., top : top + self.crop, left : left + self.crop]


def read_processor(folder: Path) -> Preprocessing:
    """What a transformers image processor of a folder does.

    Args:
        folder: holds ``preprocessor_config.json``, or ``processor_config.json`` with an ``image_processor``.

    Raises:
        UserError: neither file is there, or it asks for what this does not do; names the file and the key.
    """
    for name in PROCESSOR_FILES:
        if (folder / name).is_file():
            fields = read_json(folder / name)
            fields = fields.get("image_processor", fields)
            if "size" in fields:
                return _from_processor(fields, folder / name)
    raise UserError(f"{folder} has no {PROCESSOR_FILES[0]}, which says how its images are prepared")


def _from_processor(fields: Mapping[str, Any], path: Path) -> Preprocessing:
    def refuse(what: str) -> UserError:
        return UserError(f"{path}: {what} is not supported")

    if not fields.get("do_resize", True):
        raise refuse("do_resize: false")
    if fields.get("do_pad"):
        raise refuse("do_pad: true")
    if not fields.get("do_rescale", True) or abs(fields.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-3:
        raise refuse("a rescale_factor other than 1/255")
    filters = {value.value: name for name, value in _PIL_FILTERS.items()}
    if (resample := fields.get("resample", Image.Resampling.BICUBIC)) not in filters:
        raise refuse(f"resample: {resample}")
    crop = _side(fields.get("crop_size"), refuse) if fields.get("do_center_crop", False) else None
    size, fit = fields["size"], "squash"
    if isinstance(size, Mapping) and set(size) == {"shortest_edge"}:
        size, fit = size["shortest_edge"], "shortest"
    elif isinstance(size, int) and crop is not None:
        fit = "shortest"  # as older files say it
    if not fields.get("do_normalize", True):
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    elif "image_mean" in fields and "image_std" in fields:
        mean, std = triple(fields["image_mean"], path), triple(fields["image_std"], path)
    else:
        raise UserError(f"{path} has no image_mean and image_std")
    try:
        return Preprocessing(
            size=_side(size, refuse),
            fit="shortest" if fit == "shortest" else "squash",
            crop=crop,
            filter=filters[resample],
            mean=mean,
            std=std,
        )
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _side(size: Any, refuse: Any) -> int:
    """The side of a square given as a number or as height and width."""
    if isinstance(size, int):
        return size
    if isinstance(size, Mapping) and set(size) == {"height", "width"} and size["height"] == size["width"]:
        return int(size["height"])
    raise refuse(f"the size {json.dumps(size)}")


def triple(values: Any, path: object) -> Triple:
    """Three numbers, one a channel.

    Raises:
        UserError: something else; names ``path``, where it stands.
    """
    try:
        red, green, blue = (float(value) for value in values)
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: {values!r} are no three numbers, one a channel") from error
    return red, green, blue
