"""The join and decide stages of curation: what is near what, in this set and in others, and who is kept.

Pairs are found once and cached; verdicts, and what other thresholds would do, are made of them anew every time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from curate import ledger as ledgers
from curate.config import DedupConfig
from curate.console import UsageError, digest, progress
from curate.idlist import refuse_missing
from curate.read import Rows, preferred_fields

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from curate.decide import Verdicts
    from curate.embed import CaptionEmbedder, Embedder
    from curate.index import TrainingIndex
    from curate.pairs import Pairs

EXACT_ROWS = 2_000_000  # up to here ``join: auto`` is exact
CAPTION_BLOCK = 1 << 13  # captions embedded at a time
CROWD = 100  # near rows above which a row is crowded (curate.neighbors): bounds the pairs that are held


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
    from curate.embed import normalise_caption

    image_of, first = _numbered(rows.column("pixels"))
    normalised = [normalise_caption(caption) for caption in rows.captions]
    caption_of, first_with_caption = _numbered(np.array(normalised, dtype=object))
    captions = [normalised[row] for row in first_with_caption]

    measured = [config.join, config.recall_sample, config.seed]
    lowest = min(sweep_thresholds(config))
    images_key = digest([list(keys), config.missing_caption, lowest, measured])
    images_cache = work / f"pairs-{images_key}.parquet"
    image_pairs, recall = _joined(images_cache, lambda: rows.embeddings[first], lowest, config, "joining images")

    # A few letters are near by chance, and embeddings of them say little: equal or not is all that counts.
    long = np.array(
        [row for row, text in enumerate(captions) if len(text) >= config.min_caption_chars], dtype=np.int64
    )
    near_captions = [
        list(keys), config.missing_caption, config.caption_threshold, config.min_caption_chars, measured,
        captioner.digest,
    ]  # fmt: skip
    captions_cache = work / f"pairs-{digest(near_captions)}.parquet"
    caption_pairs, caption_recall = _joined(
        captions_cache,
        lambda: embedded_captions(captioner, [captions[row] for row in long]),
        config.caption_threshold,
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
    """``[n, dim]``, a block at a time: in half of float32's memory, as images' embeddings are held."""
    result = np.empty((len(captions), captioner.dim), np.float16)
    for start in range(0, len(captions), CAPTION_BLOCK):
        block = captions[start : start + CAPTION_BLOCK]
        result[start : start + len(block)] = captioner.embed(block)
    return result


def _numbered(values: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Number of each value in order of appearance, and where each number appears first."""
    number: dict[Any, int] = {}
    numbers = np.fromiter((number.setdefault(value, len(number)) for value in values), np.int64, len(values))
    first = np.full(len(number), len(values), dtype=np.int64)
    np.minimum.at(first, numbers, np.arange(len(values)))
    return numbers, first


def _joined(
    cache: Path, embed: Callable[[], NDArray[Any]], threshold: float, config: DedupConfig, desc: str
) -> tuple[Pairs, float]:
    """Near pairs and their measured recall: from the cache, or found and put there."""
    from curate.cells import find_pairs_in_cells
    from curate.neighbors import find_pairs, recall
    from curate.pairs import Crowd, Pairs

    if cache.is_file():
        table = pq.read_table(cache)
        measured, crowd = (json.loads(table.schema.metadata[name]) for name in (b"recall", b"crowd"))
        i, j, similarity = (table[name].to_numpy() for name in ("i", "j", "similarity"))
        left_out = Crowd(embed(), np.array(crowd), np.array(crowd), threshold) if crowd else None
        return Pairs(i, j, similarity, left_out), measured
    embeddings = embed()
    if len(embeddings) < 2:
        pairs, measured = Pairs.empty(), 1.0
    else:
        n = len(embeddings)
        exact = config.join == "exact" or (config.join == "auto" and n <= EXACT_ROWS)
        find = partial(find_pairs, memory=_join_memory(config)) if exact else find_pairs_in_cells
        with progress(total=n * (n + 1) // 2, desc=desc, unit="pairs") as bar:
            pairs = find(embeddings, threshold, crowd=CROWD, threads=config.workers, bar=bar)
        measured = recall(embeddings, pairs, threshold, sample=config.recall_sample, seed=config.seed)
    table = pa.table({"i": pairs.i, "j": pairs.j, "similarity": pairs.similarity})
    crowd = [] if pairs.crowd is None else pairs.crowd.rows.tolist()
    metadata = {"recall": json.dumps(measured), "crowd": json.dumps(crowd)}
    ledgers.write_table(table.replace_schema_metadata(metadata), cache)
    return pairs, measured


def _join_memory(config: DedupConfig) -> int:
    """In bytes."""
    return int(config.join_memory * 1e9)


@dataclass(frozen=True)
class Elsewhere:
    """What stands in other sets, among the n readable rows.

    Attributes:
        shard: object [n], ``folder:shard`` of the nearest sample of another set; None where none is near.
        key: object [n], its key.
        similarity: float32 [n], cosine with it; NaN where none is near.
    """

    shard: NDArray[np.object_]
    key: NDArray[np.object_]
    similarity: NDArray[np.float32]


def open_others(config: DedupConfig, embedder: Embedder) -> dict[str, TrainingIndex]:
    """The indexes of the sets to keep apart from, by the folders that name them."""
    from curate.index import TrainingIndex

    others = {folder: TrainingIndex.load(folder) for folder in config.against}
    for folder, index in others.items():
        if index.embedder != embedder.name:
            raise UsageError(
                f"against: {folder} was curated with the embedder {index.embedder!r}, not {embedder.name!r}; "
                "give image_embedder the same one"
            )
    return others


def against_stage(
    rows: Rows, joined: Joined, others: Mapping[str, TrainingIndex], config: DedupConfig
) -> Elsewhere | None:
    """The nearest sample of other sets, kept there or dropped there, for each distinct image."""
    from curate.neighbors import find_nearest

    if not others:
        return None
    images = rows.embeddings[joined.first]
    shard, key = (np.full(len(images), None, dtype=object) for _ in range(2))
    similarity = np.full(len(images), np.nan, dtype=np.float32)
    for folder, index in others.items():
        near, cosine = find_nearest(
            images, index.embeddings, config.threshold, memory=_join_memory(config), threads=config.workers
        )
        for image in np.flatnonzero((near >= 0) & ~(cosine <= similarity)).tolist():
            shard[image], key[image] = f"{folder}:{index.shards[near[image]]}", index.keys[near[image]]
            similarity[image] = cosine[image]
    image_of = joined.image_of
    return Elsewhere(shard[image_of], key[image_of], similarity[image_of])


def exclude_stage(
    rows: Rows, names: Sequence[str], listed: Sequence[Set[str]], config: DedupConfig
) -> NDArray[np.bool_]:
    """``[n]``, which readable rows the list ``exclude`` names; ``listed`` are its keys in each shard.

    Raises:
        UserError: a listed sample is not in its shard.
    """
    shards, keys = rows.shard_number.tolist(), rows.table["key"].to_pylist()
    excluded = np.array([key in listed[shard] for shard, key in zip(shards, keys, strict=True)], dtype=bool)
    there: list[set[str]] = [set() for _ in listed]
    for row in np.flatnonzero(excluded).tolist():
        there[shards[row]].add(keys[row])
    refuse_missing(config.exclude, names, listed, there)
    return excluded[rows.readable]


def sweep_thresholds(config: DedupConfig) -> list[float]:
    """The thresholds that are tried, ascending: the one that decides, five below and five above it, at most 1."""
    steps = {round(config.threshold + config.sweep * step / 5, 6) for step in range(-5, 6)}
    return sorted({config.threshold, *(step for step in steps if 0 < step <= 1)})


def decide_stage(
    rows: Rows, joined: Joined, elsewhere: Elsewhere | None, excluded: NDArray[np.bool_] | None, config: DedupConfig
) -> tuple[Verdicts, list[dict[str, Any]]]:
    """The verdicts, and the table of other thresholds."""
    from curate.decide import decide, sweep

    prefer = _preference(rows, config.prefer)
    options: dict[str, Any] = {
        "rule": config.rule,
        "keep_copies": config.keep_copies,
        "max_per_caption": config.max_per_caption,
        "on_caption_differs": config.on_caption_differs,
        "elsewhere": None if elsewhere is None else ~np.isnan(elsewhere.similarity),
        "excluded": excluded,
    }
    verdicts = decide(joined, rows.captions, prefer, threshold=config.threshold, **options)
    others = sweep_thresholds(config) if config.sweep else []
    with progress(others, desc="trying thresholds", unit="thresholds") as bar:
        return verdicts, sweep(joined, rows.captions, prefer, bar, **options)


def _preference(rows: Rows, prefer: Sequence[str]) -> NDArray[np.int64]:
    """Rank of each row, 0 for the one to be kept before all others; ties go by input order."""
    width, height = rows.column("width").astype(np.int64), rows.column("height").astype(np.int64)
    criteria: dict[str, NDArray[Any]] = {
        "lossless": -rows.column("lossless").astype(np.int64),
        "resolution": -(width * height),
        "caption_length": -np.array([len(caption) for caption in rows.captions], dtype=np.int64),
    }
    numbers = rows.column("numbers")
    for place, field in enumerate(preferred_fields(prefer)):
        values = np.array([np.nan if of_row[place] is None else of_row[place] for of_row in numbers], dtype=np.float64)
        for sign, name in ((-1, f"+{field}"), (1, f"-{field}")):
            criteria[name] = np.where(np.isnan(values), np.inf, sign * values)
    order = np.lexsort([np.arange(len(width)), *(criteria[name] for name in reversed(prefer))])
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order))
    return rank
