"""The read stage of curation: each shard once, to hashes, sizes, captions and image embeddings."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from curate import ledger as ledgers
from curate.config import DedupConfig
from curate.console import get_logger
from curate.engine import Engine, one_thread
from curate.shards import BadSample, read_samples

if TYPE_CHECKING:
    from curate.embed import Embedder

log = get_logger(__name__)

BATCH_PIXELS = 32_000_000  # decoded pixels held at a time, whatever the batch size

READ_COLUMNS = (
    ("shard", pa.string()),
    ("key", pa.string()),
    ("reason", pa.string()),  # why the image cannot be used; null when it can
    ("caption_problem", pa.string()),
    ("caption", pa.string()),
    ("sha256", pa.string()),
    ("pixels", pa.string()),
    ("width", pa.int32()),
    ("height", pa.int32()),
    ("lossless", pa.bool_()),
)


@dataclass(frozen=True)
class _ReadTask:
    url: str
    name: str
    cache: Path
    embedder: str
    max_pixels: int
    batch_size: int


def read_stage(
    engine: Engine,
    out: Path,
    urls: Sequence[str],
    names: Sequence[str],
    keys: Sequence[str],
    config: DedupConfig,
) -> list[Path]:
    caches = [out / "work" / "read" / f"{key}.parquet" for key in keys]
    tasks = [
        _ReadTask(url, name, cache, config.image_embedder, config.max_pixels, config.batch_size)
        for url, name, cache in zip(urls, names, caches, strict=True)
        if not cache.is_file()
    ]
    if len(tasks) < len(caches):
        log.info("%d of %d shards were read before", len(caches) - len(tasks), len(caches))
    engine.map(_read_shard, tasks, desc="reading")
    return caches


def _read_shard(task: _ReadTask) -> None:
    """Hash and embed one shard's samples: READ_COLUMNS, and ``embedding`` (float16 [dim] as bytes)."""
    from curate.images import ImageError, decode_image, is_lossless, pixel_hash

    embedder = cached_embedder(task.embedder)
    columns: dict[str, list[Any]] = {name: [] for name, _ in READ_COLUMNS}
    vectors: list[bytes] = []
    nothing = bytes(2 * embedder.dim)
    batch: list[tuple[int, Any]] = []

    def flush() -> None:
        embedded = embedder.embed([image for _, image in batch], batch_size=task.batch_size)
        for (row, _), vector in zip(batch, np.asarray(embedded, dtype=np.float16), strict=True):
            vectors[row] = vector.tobytes()
        batch.clear()

    pixels_held = 0
    with one_thread():
        for item in read_samples(task.url, name=task.name):
            row: dict[str, Any] = {"shard": item.shard, "key": item.key}
            if isinstance(item, BadSample):
                row["reason"] = item.reason
            else:
                row["caption"], row["caption_problem"] = item.caption, item.caption_problem
                row["sha256"] = hashlib.sha256(item.image).hexdigest()
                try:
                    image = decode_image(item.image, max_pixels=task.max_pixels)
                except ImageError as error:
                    row["reason"] = str(error)
                else:
                    row["width"], row["height"] = image.size
                    row["pixels"] = pixel_hash(image)
                    row["lossless"] = is_lossless(item.image)
                    batch.append((len(vectors), image))
                    pixels_held += image.width * image.height
            for name in columns:
                columns[name].append(row.get(name))
            vectors.append(nothing)
            if len(batch) == task.batch_size or pixels_held > BATCH_PIXELS:
                flush()
                pixels_held = 0
        if batch:
            flush()
    arrays = {name: pa.array(columns[name], kind) for name, kind in READ_COLUMNS}
    arrays["embedding"] = pa.array(vectors, pa.binary(len(nothing)))
    ledgers.write_table(pa.table(arrays), task.cache)


@lru_cache(maxsize=2)
def cached_embedder(name: str) -> Embedder:
    from curate.embed import load_embedder

    return load_embedder(name)
