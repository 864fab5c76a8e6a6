"""The join stage of curation: which images and which captions of this set are near one another.

Pairs are found once and cached. The exact join runs on the cores of this machine: up to two million rows that is
minutes, and its screen is made once. Cells are compared by an engine's tasks (:mod:`curate.stages.cells`).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
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
from curate.columns import BLOCK, Column, array_on_disk, arrays_on_disk, numbered, on_disk
from curate.config import RULES, DedupConfig
from curate.engines.protocol import Engine
from curate.reading.captions import normalise_caption
from curate.results import ledger
from curate.stages.cells import PAIR, pairs_by_tasks
from curate.stages.rows import Rows

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from curate.embed.protocol import CaptionEmbedder
    from curate.neighbors.verify import Pairs


log = get_logger(__name__)
PAIRS_FORMAT = 2
EXACT_ROWS = 2_000_000  # up to here ``join: auto`` is exact
CAPTION_BLOCK = 1 << 13  # captions embedded at a time
PAIRS_BLOCK = 1 << 20  # pairs that are in memory at a time
CROWD = 100  # near rows above which a row is crowded (curate.neighbors.join): bounds the pairs that are held


@dataclass(frozen=True)
class Joined:
    """What is near what, among the n readable rows; memory-mapped but for the crowd's rows.

    Attributes:
        image_of: int64 [n], number of each row's distinct image (by its pixels), in order of appearance.
        first: int64 [images], the first row with each image.
        images: float16 [images, dim], their embeddings.
        image_pairs: near pairs of distinct images, down to the lowest threshold of the sweep.
        caption_of: int64 [n], number of each row's distinct normalised caption, in order of appearance.
        caption_pairs: near pairs of distinct captions.
        recall: measured of image_pairs, in [0, 1].
        caption_recall: measured of caption_pairs, in [0, 1].
        caches: files that hold the pairs.
    """

    image_of: NDArray[np.int64]
    first: NDArray[np.int64]
    images: NDArray[Any]
    image_pairs: Pairs
    caption_of: NDArray[np.int64]
    caption_pairs: Pairs
    recall: float
    caption_recall: float
    caches: tuple[Path, Path]


def join_stage(
    engine: Engine | None,
    work: Path,
    rows: Rows,
    keys: Sequence[str],
    captioner: CaptionEmbedder,
    config: DedupConfig,
) -> Joined:
    """Exact copies are collapsed by hash first, so that a group of many of them costs nothing.

    Args:
        engine: where cells are compared; None for the threads of this process.
        work: folder of the caches of pairs.
        rows: of the set.
        keys: of the caches that these come from.
        captioner: what captions are compared by.
        config: the settings.
    """
    n = len(rows.readable)
    image_of, first = (on_disk(work, one) for one in numbered(rows.of_readable("pixels", ""), n))
    texts = rows.captions
    caption_of, first_with = (on_disk(work, one) for one in numbered(map(normalise_caption, texts), n))

    measured = [config.join, config.recall_sample, config.seed]
    lowest = min(sweep_thresholds(config))
    # Rules of one's own are shown every pair; ours ask for those within crowds one by one.
    crowd = CROWD if config.rule in RULES else None
    every_pair = [] if crowd else ["every pair"]
    images_key = digest([PAIRS_FORMAT, list(keys), config.missing_caption, lowest, measured, *every_pair])
    images_cache = work / f"pairs-{images_key}.parquet"
    images = rows.embeddings
    if len(first) < n:
        blocks = (images[first[start : start + BLOCK]] for start in range(0, len(first), BLOCK))
        images = array_on_disk(work, blocks, images.shape[1], images.dtype)
    image_pairs, recall = _joined(engine, images_cache, lambda: images, lowest, crowd, config, "joining images")

    # A few letters are near by chance, and embeddings of them say little: equal or not is all that counts.
    long = np.flatnonzero(_lengths(texts, first_with) >= config.min_caption_chars)
    near_captions = [
        PAIRS_FORMAT, list(keys), config.missing_caption, config.caption_threshold, config.min_caption_chars, measured,
        captioner.digest, *every_pair,
    ]  # fmt: skip
    captions_cache = work / f"pairs-{digest(near_captions)}.parquet"
    caption_pairs, caption_recall = _joined(
        engine,
        captions_cache,
        lambda: embedded_captions(captioner, _normalised(texts, first_with[long]), work),
        config.caption_threshold,
        crowd,
        config,
        "joining captions",
    )
    return Joined(
        image_of=image_of,
        first=first,
        images=images,
        image_pairs=image_pairs,
        caption_of=caption_of,
        caption_pairs=caption_pairs if len(long) == len(first_with) else pairs_on_disk(work, caption_pairs, long),
        recall=recall,
        caption_recall=caption_recall,
        caches=(images_cache, captions_cache),
    )


def _normalised(texts: Column, rows: NDArray[np.int64]) -> Iterator[list[str]]:
    """The normalised captions of some rows, a block at a time."""
    for start in range(0, len(rows), CAPTION_BLOCK):
        yield [normalise_caption(text) for text in texts.take(rows[start : start + CAPTION_BLOCK])]


def _lengths(texts: Column, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Characters of the normalised captions of some rows."""
    every = (len(text) for block in _normalised(texts, rows) for text in block)
    return np.fromiter(every, np.int64, len(rows))


def embedded_captions(
    captioner: CaptionEmbedder, blocks: Iterable[Sequence[str]], folder: Path
) -> NDArray[np.float16]:
    """``[n, dim]`` of all captions of all blocks, as a memory map of a file in ``folder`` without a name.

    A row that is not finite becomes zeros, which are near nothing.
    """
    strange: list[str] = []  # a part of each caption whose row is not finite

    def embedded() -> Iterator[NDArray[np.float16]]:
        for block in blocks:
            with np.errstate(over="ignore"):
                result = np.asarray(captioner.embed(list(block))).astype(np.float16)
            lost = ~np.isfinite(result).all(axis=1)
            result[lost] = 0  # near nothing
            strange.extend(block[place][:60] for place in np.flatnonzero(lost).tolist())
            yield result

    result = array_on_disk(folder, embedded(), captioner.dim)
    if strange:
        log.warning(
            "the caption embedder %s gives %d captions vectors with numbers that are not finite: these are near equal "
            "ones only (the first: %s)", captioner.name, len(strange), printable(strange[0]),
        )  # fmt: skip
    return result


def _joined(
    engine: Engine | None,
    cache: Path,
    embed: Callable[[], NDArray[Any]],
    threshold: float,
    crowd: int | None,
    config: DedupConfig,
    desc: str,
) -> tuple[Pairs, float]:
    """Near pairs and their measured recall: from the cache, or found and put there."""
    from curate.neighbors.recall import recall
    from curate.neighbors.verify import Pairs

    if cache.is_file():
        return _read_pairs(cache, embed, threshold)
    embeddings = embed()
    if len(embeddings) < 2:
        pairs, measured = Pairs.empty(), 1.0
    else:
        exact = config.join == "exact" or (config.join == "auto" and len(embeddings) <= EXACT_ROWS)
        if exact or engine is None:
            found = _found_here(embeddings, threshold, crowd, config, desc, exact=exact)
            pairs = pairs_on_disk(cache.parent, found)
            del found
        else:
            folder = cache.with_suffix("")
            pairs = pairs_by_tasks(engine, folder, embeddings, threshold, crowd, join_memory(config), desc)
        measured = recall(embeddings, pairs, threshold, sample=config.recall_sample, seed=config.seed)
    _write_pairs(cache, pairs, measured)
    shutil.rmtree(cache.with_suffix(""), ignore_errors=True)
    return pairs, measured


def _found_here(
    embeddings: NDArray[Any], threshold: float, crowd: int | None, config: DedupConfig, desc: str, *, exact: bool
) -> Pairs:
    """Near pairs, found on this process's threads."""
    from curate.neighbors.cells import find_pairs_in_cells
    from curate.neighbors.join import find_pairs

    n = len(embeddings)
    find = partial(find_pairs, memory=join_memory(config)) if exact else find_pairs_in_cells
    with progress(total=n * (n + 1) // 2, desc=desc, unit="pairs") as bar:
        return find(embeddings, threshold, crowd=crowd, threads=config.workers, bar=bar)


def _write_pairs(cache: Path, pairs: Pairs, measured: float) -> None:
    """Rows ``i, j, similarity``, the pairs first; a row without ``j`` says that ``i`` stands in the crowd."""
    schema = pa.schema([("i", pa.int64()), ("j", pa.int64()), ("similarity", pa.float32())])
    table = pa.table({"i": pairs.i, "j": pairs.j, "similarity": pairs.similarity}, schema=schema)
    if pairs.crowd is not None:
        crowded = pa.table({"i": pairs.crowd.rows}, schema=pa.schema([schema.field("i")]))
        table = pa.concat_tables([table, crowded], promote_options="default")
    ledger.write_table(table.replace_schema_metadata({"recall": json.dumps(measured)}), cache)


def _read_pairs(cache: Path, embed: Callable[[], NDArray[Any]], threshold: float) -> tuple[Pairs, float]:
    """What ``_write_pairs`` wrote."""
    from curate.neighbors.verify import Crowd, Pairs

    crowded = [np.empty(0, np.int64)]
    with pq.ParquetFile(cache) as file:

        def blocks() -> Iterator[list[NDArray[Any]]]:
            for group in range(file.num_row_groups):
                table = file.read_row_group(group)
                near = table.num_rows - table["j"].null_count
                crowded.append(table["i"].slice(near).to_numpy())
                yield [table[name].slice(0, near).to_numpy() for name in table.column_names]

        i, j, similarity = arrays_on_disk(cache.parent, blocks(), PAIR)
        measured = json.loads(file.schema_arrow.metadata[b"recall"])
    rows = np.concatenate(crowded)
    return Pairs(i, j, similarity, Crowd(embed(), rows, rows, threshold) if len(rows) else None), measured


def pairs_on_disk(folder: Path, pairs: Pairs, numbers: NDArray[np.int64] | None = None) -> Pairs:
    """The same pairs as memory maps of files in ``folder`` without a name, with row r called ``numbers[r]``."""
    from curate.neighbors.verify import Pairs

    def blocks() -> Iterator[list[NDArray[Any]]]:
        for start in range(0, len(pairs), PAIRS_BLOCK):
            some = slice(start, start + PAIRS_BLOCK)
            i, j = (ends if numbers is None else numbers[ends] for ends in (pairs.i[some], pairs.j[some]))
            yield [i, j, pairs.similarity[some]]

    crowd = pairs.crowd if numbers is None or pairs.crowd is None else pairs.crowd.renumbered(numbers)
    i, j, similarity = arrays_on_disk(folder, blocks(), PAIR)
    return Pairs(i, j, similarity, crowd)


def join_memory(config: DedupConfig) -> int:
    """What the join's screen may take, in bytes."""
    return int(config.join_memory * 1e9)


def sweep_thresholds(config: DedupConfig) -> list[float]:
    """The thresholds that are tried, ascending: the one that decides, five below and five above it, at most 1."""
    steps = {round(config.threshold + config.sweep * step / 5, 6) for step in range(-5, 6)}
    return sorted({config.threshold, *(step for step in steps if 0 < step <= 1)})

