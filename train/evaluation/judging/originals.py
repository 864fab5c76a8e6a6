"""Images to compare with: those of shards, and the originals that prompts name."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from afresh.errors import UserError, reason
from afresh.progress import get_logger

if TYPE_CHECKING:
    from PIL.Image import Image

log = get_logger(__name__)


def read_images(shards: Sequence[str]) -> tuple[list[Image], list[str]]:
    """The distinct images of shards (by their pixels), and all captions; what cannot be read is left out."""
    from curate.reading.images import pixel_hash
    from curate.reading.pipeline import SafeShards, Skipped, image_and_caption

    skipped = Skipped(log_at_most=0)
    whole = SafeShards(list(shards), handler=skipped, nodesplitter=None, workersplitter=None)  # every process sees all
    images: dict[str, Image] = {}
    captions: dict[str, None] = {}
    for sample in whole.map(partial(image_and_caption, missing_caption="empty"), handler=skipped):
        images.setdefault(pixel_hash(sample["image"]), sample["image"])
        if sample["caption"]:
            captions[sample["caption"]] = None
    if not images:
        raise UserError(f"{', '.join(shards)}: no readable image")
    return list(images.values()), list(captions)


def never_trained_on(held_out: Sequence[Image], training: Sequence[Image]) -> list[Image]:
    """The held-out images without those that are training images, to the pixel: with them no image would be a copy, as
    the judges' thresholds rest on images that are none.

    Raises:
        UserError: none, or one alone, is left.
    """
    from curate.reading.images import pixel_hash

    known = {pixel_hash(image) for image in training}
    left = [image for image in held_out if pixel_hash(image) not in known]
    found = len(held_out) - len(left)
    if found and len(left) < 2:
        raise UserError(
            f"held_out: {found} of {len(held_out)} images are training images: name shards that no model was trained on"
        )
    if found:
        log.warning(f"held_out: {found} of {len(held_out)} images are training images, and are left out")
    return left


def read_originals(prompts: Sequence[Any]) -> dict[str, Image]:
    """The original image of every caption whose prompt names one."""
    originals: dict[str, Image] = {}
    for prompt in prompts:
        if prompt.image is not None and prompt.caption not in originals:
            originals[prompt.caption] = read_image(prompt.image, prompt.caption)
    return originals


def read_image(path: str | Path, caption: str) -> Image:
    """One original.

    Raises:
        UserError: it is missing or no image; names the file and the caption.
    """
    from curate.reading.images import ImageError, decode_image

    try:
        return decode_image(Path(path).read_bytes())
    except (OSError, ImageError) as error:
        raise UserError(f"{path}: the original of {caption!r}: {reason(error)}") from None
