"""``curate search``: the training samples nearest to an image or a caption."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from afresh.errors import UsageError, UserError, reason
from curate.columns import Column
from curate.config import SearchConfig

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from curate.index.training_index import TrainingIndex

_BLOCK = 1 << 14  # captions compared at a time


def run_search(config: SearchConfig) -> dict[str, Any]:
    """Search the index of a curation: kept samples and dropped ones, which are training images too.

    Returns:
        ``nearest``: rows rank, similarity, shard, key, status, caption (null where there is none); nearest first;
        ``image`` or ``caption``: what was searched for; ``samples``: how many the set has; ``seconds``.

    Raises:
        UsageError: not exactly one of image and caption is given, or k is not positive.
        UserError: the index or the image cannot be read.
    """
    start = time.monotonic()
    if (config.image is None) == (config.caption is None):
        raise UsageError("search takes either --image FILE or --caption TEXT")
    if config.k < 1:
        raise UsageError(f"k must be at least 1, got {config.k}")
    from curate.index.training_index import TrainingIndex
    from curate.reading.images import MAX_PIXELS
    from curate.results.report_page import read_summary

    summary = read_summary(config.out)  # says so when the curation is unfinished
    index = TrainingIndex.load(config.out)
    if config.image is not None:
        max_pixels = max(MAX_PIXELS, summary["settings"].get("max_pixels", 0))  # what was curated can be asked for
        similarity, rows = _by_image(index, config.image, config.k, max_pixels)
        asked = {"image": config.image}
    else:
        similarity, rows = _by_caption(index, str(config.caption), config.caption_embedder, config.k)
        asked = {"caption": str(config.caption)}
    nearest = [
        {
            "rank": rank,
            "similarity": round(float(value), 4),
            "shard": str(index.shards[row]),
            "key": str(index.keys[row]),
            "status": "kept" if index.kept[row] else "dropped",
            "caption": index.captions[row],
        }
        for rank, (value, row) in enumerate(zip(similarity, rows, strict=True), start=1)
    ]
    seconds = round(time.monotonic() - start, 3)
    return {"nearest": nearest, **asked, "samples": len(index.captions), "seconds": seconds}


def _by_image(index: TrainingIndex, file: str, k: int, max_pixels: int) -> tuple[Any, Any]:
    from curate.embed.registry import load_embedder
    from curate.index.training_index import refuse_other
    from curate.reading.images import ImageError, decode_image

    try:
        image = decode_image(Path(file).expanduser().read_bytes(), max_pixels=max_pixels)
    except OSError as error:
        raise UserError(f"image {file}: {reason(error)}") from error
    except ImageError as error:
        raise UserError(f"image {file}: {error}") from error
    embedder = load_embedder(index.embedder)
    refuse_other(index, embedder)
    similarity, rows = index.search(embedder.embed([image]), min(k, len(index)))
    return similarity[0], rows[0]


def _by_caption(index: TrainingIndex, caption: str, embedder_name: str, k: int) -> tuple[Any, Any]:
    from curate.embed.registry import load_caption_embedder
    from curate.neighbors.brute_force import nearest

    embedder = load_caption_embedder(embedder_name)
    there = np.flatnonzero([text is not None for text in index.captions])
    if not len(there):
        raise UserError("caption: no sample of this set has one; search it by --image")
    starts = range(0, len(there), _BLOCK)
    blocks = (
        (start, embedder.embed(_texts(index, there[start : start + _BLOCK]))) for start in starts
    )
    similarity, rows = nearest(embedder.embed([caption]), blocks, k)
    return similarity[0], there[rows[0]]


def _texts(index: TrainingIndex, rows: NDArray[np.int64]) -> list[str]:
    captions = index.captions
    return captions.take(rows) if isinstance(captions, Column) else [str(captions[row]) for row in rows]
