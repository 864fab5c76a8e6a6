"""The read stage of curation: each shard once, to hashes, sizes, captions and image embeddings.

One pass over the bytes of a shard, whose images are decoded on threads that run ahead of the embedder by a bounded
amount: memory holds some encoded images, others brought near the embedder's size, and a few thousand rows, whatever
the number of the samples. Not by webdataset's pipelines (:mod:`curate.reading.pipeline`): a shard has a cache of its
own, in which every sample has a row in its order, whole or not.
"""

from __future__ import annotations

import hashlib
import os
import socket
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from afresh.cores import cpu_count, in_order, one_thread, shares
from afresh.errors import UserError
from afresh.progress import get_logger
from curate.config import DedupConfig
from curate.engines.gpus import device_name, on_gpus
from curate.engines.protocol import Engine
from curate.reading.samples import BadSample, Sample, Shard, machine_named, sample_bytes
from curate.reading.urls import refuse_changed, shard_bytes
from curate.results import ledger
from curate.stages.accounts import duplicates_of
from curate.stages.filters import left_out_by
from curate.stages.rows import READ_COLUMNS

if TYPE_CHECKING:
    from PIL.Image import Image

    from curate.embed.protocol import Embedder


log = get_logger(__name__)
# Images are brought to no less than this many times the size that the embedder looks at, which then does the rest: what
# the coarser scale makes of the pixels is far below what it tells apart (tests/curate/stages/test_read.py has the
# tolerance).
SCALE_TO_SPARE = 2
BYTES_AHEAD = 1 << 26  # of samples that are decoded or wait for the embedder
PIXELS_AHEAD = 1 << 25  # of their images
BATCH_PIXELS = 32_000_000  # held for the embedder at a time, whatever the batch size
ROWS_HELD = 8192


Samples = Iterable[Sample | BadSample]
"""What one task reads: a :class:`~curate.reading.samples.Shard`, or another source that says how to read it again."""


@dataclass(frozen=True)
class _ReadTask:
    samples: Samples
    cache: Path
    embedder: str
    max_pixels: int
    batch_size: int
    pixel_hash: bool
    fields: tuple[str, ...]
    filters: tuple[str, ...]
    threads: int
    gpus: float

    @property
    def label(self) -> str:
        return str(getattr(self.samples, "name", "") or self.cache)


@dataclass(frozen=True)
class Pace:
    """How fast a task has read."""

    host: str
    device: str
    """That the embedder runs on."""
    process: int
    images: int
    """That were embedded."""
    seconds: float
    embedding: float
    """Seconds of these that it waited for the embedder, not for decoded images."""


def read_stage(
    engine: Engine,
    work: Path,
    urls: Sequence[str],
    names: Sequence[str],
    keys: Sequence[str],
    config: DedupConfig,
    fingerprints: Sequence[Sequence[str | int]] = (),
) -> list[Path]:
    """Read the shards that were not read before; one cache file each in ``work/read``, named by its key.

    A shard has threads by its share of the bytes, so that the cores are busy with one huge shard as with many small
    ones. The files do not depend on their number.

    Raises:
        UserError: a shard cannot be read, or has no longer the one of ``fingerprints`` that its key was made of.
    """
    caches = [work / "read" / f"{key}.parquet" for key in keys]
    missing = [number for number, cache in enumerate(caches) if not cache.is_file()]
    if len(missing) < len(caches):
        log.info("%d of %d shards were read before", len(caches) - len(missing), len(caches))
    workers = getattr(engine, "workers", 0) or config.workers or cpu_count()
    threads = shares([shard_bytes(urls[number]) for number in missing], workers)
    shards = [(Shard(urls[number], names[number], config.caption_field), caches[number]) for number in missing]
    read_into(engine, shards, threads, config)
    for number in missing if fingerprints else ():
        try:
            refuse_changed(urls[number], fingerprints[number])
        except UserError:
            caches[number].unlink(missing_ok=True)  # it is not what its name says
            raise
    for number, cache in enumerate(caches):
        if not cache.is_file():
            raise UserError(
                f"{names[number]} was read on another machine, which does not see {cache.parent}: all of a cluster "
                "must have out, or work_dir, under one path"
            )
    return caches


def read_into(
    engine: Engine, sources: Sequence[tuple[Samples, Path]], threads: Sequence[int], config: DedupConfig
) -> None:
    """Read each source into its cache file, and say how fast each device did.

    Where the embedder is a network and the engine has GPUs, a task takes ``config.gpu_share`` of one, and as many tasks
    run at a time as there is room for: each with the threads of its share of the cores.

    Args:
        engine: where. With several processes the sources are pickled.
        sources: samples, and the file that is to hold their rows.
        threads: of each, on the CPU.
        config: the settings.
    """
    gpus = 0.0
    if getattr(cached_embedder(config.image_embedder), "accelerated", False) and (there := getattr(engine, "gpus", 0)):
        gpus = config.gpu_share
        at_a_time = max(1, min(on_gpus(there, gpus), len(sources)))
        threads = [max(of_source, _cores(engine) // at_a_time) for of_source in threads]
    tasks = [
        _ReadTask(
            samples,
            cache,
            config.image_embedder,
            config.max_pixels,
            config.batch_size,
            config.pixel_hash,
            preferred_fields(config.prefer),
            tuple(config.steps),
            of_source,
            gpus,
        )
        for (samples, cache), of_source in zip(sources, threads, strict=True)
    ]
    for line in of_devices([pace for pace in engine.map(_read, tasks, desc="reading") if pace is not None]):
        log.info("%s", line)


def _cores(engine: Engine) -> int:
    """Of all tasks together."""
    return getattr(engine, "workers", 0) or cpu_count()


def of_devices(paces: Sequence[Pace]) -> list[str]:
    """A line for each device: what was embedded on it, how fast, and what it waited for."""
    devices: dict[tuple[str, str], list[Pace]] = defaultdict(list)
    for pace in paces:
        devices[pace.host, pace.device].append(pace)
    lines, several = [], len({pace.host for pace in paces}) > 1
    for (host, device), here in sorted(devices.items()):
        by_process: dict[int, list[Pace]] = defaultdict(list)
        for pace in here:
            by_process[pace.process].append(pace)
        rate = 0.0  # processes beside each other
        for those in by_process.values():
            rate += sum(pace.images for pace in those) / max(sum(pace.seconds for pace in those), 1e-9)
        busy = sum(pace.embedding for pace in here) / max(sum(pace.seconds for pace in here), 1e-9)
        lines.append(
            f"{host + ', ' if several else ''}{device}: {sum(pace.images for pace in here):,} images by "
            f"{len(by_process)} process{'es' if len(by_process) > 1 else ''}, {rate:,.0f} images/s, "
            f"{busy:.0%} of the time embedding"
        )
    return lines


def _read(task: _ReadTask) -> Pace | None:
    """Hash and embed one source's samples: READ_COLUMNS, and ``embedding`` (float16 [dim] as bytes)."""
    if task.cache.is_file():  # it was run before, and its worker was lost
        return None
    embedder = cached_embedder(task.embedder)
    began, embedding, images = time.perf_counter(), 0.0, 0
    nothing = bytes(2 * embedder.dim)
    schema = pa.schema([*READ_COLUMNS, ("embedding", pa.binary(len(nothing)))])
    rows: list[dict[str, Any]] = []
    batch: list[tuple[dict[str, Any], Image]] = []

    def embed() -> None:
        nonlocal embedding, images
        before = time.perf_counter()
        embedded = embedder.embed([image for _, image in batch], batch_size=task.batch_size)
        embedding, images = embedding + time.perf_counter() - before, images + len(batch)
        with np.errstate(over="ignore"):  # which is seen below
            vectors = np.asarray(embedded).astype(np.float16)
        for (row, _), vector in zip(batch, vectors, strict=True):
            if np.isfinite(vector).all():
                row["embedding"] = vector.tobytes()
            else:
                row["reason"] = f"the embedder {task.embedder} gives it a vector with numbers that are not finite"
        batch.clear()

    look = partial(_look, task, SCALE_TO_SPARE * embedder.size)
    ahead = max(2 * task.threads, PIXELS_AHEAD // (2 * SCALE_TO_SPARE * embedder.size) ** 2)
    looked_at = in_order(look, task.samples, task.threads, at_most=ahead, weigh=sample_bytes, weight=BYTES_AHEAD)
    with one_thread(), ledger.table_writer(schema, task.cache) as writer:
        pixels_held = 0
        for row, image in looked_at:
            rows.append(row)
            row["embedding"] = nothing
            if image is not None:
                batch.append((row, image))
                pixels_held += image.width * image.height
            if batch and (
                len(batch) == task.batch_size or pixels_held > BATCH_PIXELS or len(rows) == ROWS_HELD
            ):
                embed()
                pixels_held = 0
            if len(rows) == ROWS_HELD:
                writer.write_table(pa.Table.from_pylist(rows, schema=schema))
                rows.clear()
        if batch:
            embed()
        writer.write_table(pa.Table.from_pylist(rows, schema=schema))
    device = device_name(getattr(embedder, "accelerated", False))
    return Pace(socket.gethostname(), device, os.getpid(), images, time.perf_counter() - began, embedding)


def _look(task: _ReadTask, at_least: int, sample: Sample | BadSample) -> tuple[dict[str, Any], Image | None]:
    """What there is to say of a sample without its embedding; and its image for that, both sides ``at_least`` pixels
    as far as it has them, the shorter one below twice as many.
    """
    row: dict[str, Any] = {"shard": sample.shard, "key": sample.key}
    if isinstance(sample, BadSample):
        row["reason"] = sample.reason
        return row, None
    row["caption"], row["caption_problem"] = sample.caption, sample.caption_problem
    row["captionless"], row["duplicates"] = sample.captionless, duplicates_of(sample.account)
    row["others"] = [text for text in sample.captions if text != sample.caption]
    row["numbers"] = [sample.number(name) for name in task.fields]
    row["left_out"] = left_out_by(sample, task.filters)
    row["sha256"] = hashlib.sha256(sample.image).hexdigest()
    with machine_named(sample):
        return row, _look_at_image(task, at_least, sample.image, row)


def _look_at_image(task: _ReadTask, at_least: int, data: bytes, row: dict[str, Any]) -> Image | None:
    """Adds to ``row`` what the image tells; the image, or None where the row has the reason why there is none."""
    from curate.reading.images import ImageError, coded_hash, decode_scaled, is_lossless, pixel_hash, shrunk

    try:
        decoded = decode_scaled(data, None if task.pixel_hash else at_least, max_pixels=task.max_pixels)
    except ImageError as error:
        row["reason"] = str(error)
        return None
    row["width"], row["height"] = decoded.width, decoded.height
    row["lossless"] = is_lossless(data)
    # Whether an image is reduced depends on its size and format alone: equal JPEGs are compared by the same hash.
    if decoded.reduced:
        row["pixels"] = coded_hash(data, decoded.orientation) or row["sha256"]
    else:
        row["pixels"] = pixel_hash(decoded.image)
    return shrunk(decoded.image, at_least)


def preferred_fields(prefer: Sequence[str]) -> tuple[str, ...]:
    """The json fields among the criteria of preference."""
    return tuple(criterion[1:] for criterion in prefer if criterion[0] in "+-")


@lru_cache(maxsize=2)
def cached_embedder(name: str) -> Embedder:
    from curate.embed.registry import load_embedder

    return load_embedder(name)

