"""Images to compare with: those of shards, and the originals that prompts name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from afresh.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image



def read_images(shards: Sequence[str]) -> tuple[list[Image], list[str]]:
    """The distinct images of shards (by their pixels), and all captions; what cannot be read is left out."""
    from curate.reading.images import ImageError, decode_image, pixel_hash
    from curate.reading.samples import Sample, read_samples
    from curate.reading.urls import expand_shards

    images: dict[str, Image] = {}
    captions: dict[str, None] = {}
    for shard in expand_shards(list(shards)):
        for sample in read_samples(shard):
            if not isinstance(sample, Sample):
                continue
            try:
                image = decode_image(sample.image)
            except ImageError:
                continue
            images.setdefault(pixel_hash(image), image)
            if sample.caption:
                captions[sample.caption] = None
    if not images:
        raise UserError(f"{', '.join(shards)}: no readable image")
    return list(images.values()), list(captions)


def read_originals(prompts: Sequence[Any]) -> dict[str, Image]:
    """The original image of every caption whose prompt names one."""
    from curate.reading.images import ImageError, decode_image

    originals: dict[str, Image] = {}
    for prompt in prompts:
        if prompt.image is not None and prompt.caption not in originals:
            try:
                originals[prompt.caption] = decode_image(Path(prompt.image).read_bytes())
            except (OSError, ImageError) as error:
                raise UserError(f"{prompt.image}: the original of {prompt.caption!r}: {error}") from None
    return originals

