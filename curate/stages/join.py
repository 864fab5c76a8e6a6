"""The join stage of curation: which images and which captions of this set are near one another.

Pairs are found once and cached.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from afresh.errors import printable
from afresh.files import digest
from afresh.progress import get_logger, progress
from curate.config import RULES, DedupConfig
from curate.results import ledger
from curate.stages.rows import Rows

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from curate.embed.protocol import CaptionEmbedder
    from curate.neighbors.verify import Pairs


log = get_logger(__name__)
EXACT_ROWS = 2_000_000  # up to here ``join: auto`` is exact
CAPTION_BLOCK = 1 << 13  # captions embedded at a time
CROWD = 100  # near rows above which a row is crowded (curate.neighbors.join): bounds the pairs that are held


@dataclass(frozen=True)
class Joined:
    """What is near what, among the n readable rows.

    Attributes:
        image_of: int64 [n], number of each row's distinct image (by its pixels), in order of appearance.
        first: int64 [images], the first row with each image.
        image_pairs: near pairs of distinct images, down to the lowest threshold of the sweep.
        caption_of: int64 [n], number of each row's distinct normalised caption, in order of appearance.
        captions: the distinct normalised captions.
        caption_pairs: near pairs of distinct captions.
        recall: measured of image_pairs, in [0, 1].
        caption_recall: measured of caption_pairs, in [0, 1].
        caches: files that hold the pairs.
    """

    image_of: NDArray[np.int64]
    first: NDArray[np.int64]
    image_pairs: Pairs
    caption_of: NDArray[np.int64]
    captions: list[str]
    caption_pairs: Pairs
    recall: float
    caption_recall: float
    caches: tuple[Path, Path]


def join_stage(
    work: Path, rows: Rows, keys: Sequence[str], captioner: CaptionEmbedder, config: DedupConfig
) -> Joined:
    """Exact copies are collapsed by hash first, so that a group of many of them costs nothing.

    Args:
        work: folder of the caches of pairs.
    """
    from curate.reading.captions import normalise_caption

    image_of, first = _numbered(rows.column("pixels"))
    normalised = [normalise_caption(caption) for caption in rows.captions]
    caption_of, first_with_caption = _numbered(np.array(normalised, dtype=object))
    captions = [normalised[row] for row in first_with_caption]

    measured = [config.join, config.recall_sample, config.seed]
    lowest = min(sweep_thresholds(config))
    # Rules of one's own are shown every pair; ours ask for those within crowds one by one.
    crowd = CROWD if config.rule in RULES else None
    every_pair = [] if crowd else ["every pair"]
    images_key = digest([list(keys), config.missing_caption, lowest, measured, *every_pair])
    images_cache = work / f"pairs-{images_key}.parquet"
    all_differ = len(first) == len(rows.embeddings)

    def distinct() -> NDArray[Any]:
        return rows.embeddings if all_differ else rows.embeddings[first]  # no copy for nothing

    image_pairs, recall = _joined(images_cache, distinct, lowest, crowd, config, "joining images")

    # A few letters are near by chance, and embeddings of them say little: equal or not is all that counts.
    long = np.array(
        [row for row, text in enumerate(captions) if len(text) >= config.min_caption_chars], dtype=np.int64
    )
    near_captions = [
        list(keys), config.missing_caption, config.caption_threshold, config.min_caption_chars, measured,
        captioner.digest, *every_pair,
    ]  # fmt: skip
    captions_cache = work / f"pairs-{digest(near_captions)}.parquet"
    caption_pairs, caption_recall = _joined(
        captions_cache,
        lambda: embedded_captions(captioner, [captions[row] for row in long]),
        config.caption_threshold,
        crowd,
        config,
        "joining captions",
    )
    return Joined(
        image_of=image_of,
        first=first,
        image_pairs=image_pairs,
        caption_of=caption_of,
        captions=captions,
        caption_pairs=caption_pairs.renumbered(long),
        recall=recall,
        caption_recall=caption_recall,
        caches=(images_cache, captions_cache),
    )


def embedded_captions(captioner: CaptionEmbedder, captions: Sequence[str]) -> NDArray[np.float16]:
    """``[n, dim]``, a block at a time: in half of float32's memory, as images' embeddings are held.

    A row that is not finite becomes zeros, which are near nothing.
    """
    result = np.empty((len(captions), captioner.dim), np.float16)
    for start in range(0, len(captions), CAPTION_BLOCK):
        block = captions[start : start + CAPTION_BLOCK]
        result[start : start + len(block)] = captioner.embed(block)
    lost = ~np.isfinite(result).all(axis=1)
    if lost.any():
        first = printable(captions[int(np.argmax(lost))][:60])
        log.warning(
            "the caption embedder %s gives %d captions vectors with numbers that are not finite: these are near equal "
            "ones only (the first: %s)", captioner.name, int(lost.sum()), first,
        )  # fmt: skip
        result[lost] = 0  # near nothing
    return result


def _numbered(values: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Number of each value in order of appearance, and where each number appears first."""
    number: dict[Any, int] = {}
    numbers = np.fromiter((number.setdefault(value, len(number)) for value in values), np.int64, len(values))
    first = np.full(len(number), len(values), dtype=np.int64)
    np.minimum.at(first, numbers, np.arange(len(values)))
    return numbers, first


def _joined(
    cache: Path,
    embed: Callable[[], NDArray[Any]],
    threshold: float,
    crowd: int | None,
    config: DedupConfig,
    desc: str,
) -> tuple[Pairs, float]:
    """Near pairs and their measured recall: from the cache, or found and put there."""
    from curate.neighbors.cells import find_pairs_in_cells
    from curate.neighbors.join import find_pairs
    from curate.neighbors.recall import recall
    from curate.neighbors.verify import Crowd, Pairs

    if cache.is_file():
        table = pq.read_table(cache)
        measured, crowded = (json.loads(table.schema.metadata[name]) for name in (b"recall", b"crowd"))
        i, j, similarity = (table[name].to_numpy() for name in ("i", "j", "similarity"))
        left_out = Crowd(embed(), np.array(crowded), np.array(crowded), threshold) if crowded else None
        return Pairs(i, j, similarity, left_out), measured
    embeddings = embed()
    if len(embeddings) < 2:
        pairs, measured = Pairs.empty(), 1.0
    else:
        n = len(embeddings)
        exact = config.join == "exact" or (config.join == "auto" and n <= EXACT_ROWS)
        find = partial(find_pairs, memory=join_memory(config)) if exact else find_pairs_in_cells
        with progress(total=n * (n + 1) // 2, desc=desc, unit="pairs") as bar:
            pairs = find(embeddings, threshold, crowd=crowd, threads=config.workers, bar=bar)
        measured = recall(embeddings, pairs, threshold, sample=config.recall_sample, seed=config.seed)
    table = pa.table({"i": pairs.i, "j": pairs.j, "similarity": pairs.similarity})
    crowded = [] if pairs.crowd is None else pairs.crowd.rows.tolist()
    metadata = {"recall": json.dumps(measured), "crowd": json.dumps(crowded)}
    ledger.write_table(table.replace_schema_metadata(metadata), cache)
    return pairs, measured


def join_memory(config: DedupConfig) -> int:
    """What the join's screen may take, in bytes."""
    return int(config.join_memory * 1e9)


def sweep_thresholds(config: DedupConfig) -> list[float]:
    """The thresholds that are tried, ascending: the one that decides, five below and five above it, at most 1."""
    steps = {round(config.threshold + config.sweep * step / 5, 6) for step in range(-5, 6)}
    return sorted({config.threshold, *(step for step in steps if 0 < step <= 1)})

