"""What the evaluation is about: the images drawn in one setting, and what was measured of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from afresh.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Drawn:
    """The images of one table row."""

    model: str
    guidance: str
    prompts: str
    """Kind of the prompts: repeated, held_out, …"""
    images: Sequence[Image]
    captions: Sequence[str]
    """What each image was drawn for; images of one caption are its seeds."""
    seconds_per_image: float | NDArray[np.float64] = float("nan")
    """Of all images, or of each."""
    fired: int | None = None
    """How many of the images guidance corrected at some step; None without guidance, or where nobody counted."""

    def same_images(self, other: Drawn) -> bool:
        """Whether both hold the same pixels for the same captions of the same model, image by image."""
        if (self.model, self.prompts, list(self.captions)) != (other.model, other.prompts, list(other.captions)):
            return False
        pairs = zip(self.images, other.images, strict=True)
        return all(one.size == two.size and one.tobytes() == two.tobytes() for one, two in pairs)


@dataclass(frozen=True)
class Measured:
    """A table row, and what it rests on, image by image."""

    row: dict[str, Any]
    images: dict[str, NDArray[Any]]
    """``[n]`` by column, for the numbers that are made of single images; shares as booleans."""


def read_drawn(folder: str | Path, model: str, guidance: str, prompts: str) -> Drawn:
    """What ``train sample`` wrote into a folder, without the images that it withheld.

    Raises:
        UserError: the folder holds no ``samples.parquet``, or an image is missing.
    """
    import pyarrow.parquet as parquet

    from curate.reading.images import decode_image

    folder = Path(folder)
    table = folder / "samples.parquet"
    if not table.is_file():
        raise UserError(f"{table}: missing; train sample writes it")
    rows = [row for row in parquet.read_table(table).to_pylist() if not row.get("withheld")]
    try:
        images = [decode_image((folder / row["file"]).read_bytes()) for row in rows]
    except OSError as error:
        raise UserError(f"{folder}: an image of samples.parquet is missing ({error})") from None
    seconds = np.array([row["seconds"] for row in rows], np.float64)
    fired = None if guidance == "none" else sum(row["steps_fired"] > 0 for row in rows)
    return Drawn(model, guidance, prompts, images, [row["prompt"] for row in rows], seconds, fired)

