"""The curation job: drop copies from tar shards, and keep an account of every sample.

Stages, each of which leaves files so that a stopped run is continued where it was:

1. read: each shard once; hashes, sizes, captions and image embeddings → ``work/read/*.parquet``,
2. join: pairs of near images and of near captions → ``work/pairs-*.parquet``,
3. decide: who is kept, and who stands for whom (:mod:`curate.decide`); cheap, done anew every time,
4. write: the kept samples' bytes → ``shards/*.tar``,
5. publish: ledger, index, report and, last, ``summary.json``. A folder without it is unfinished.

Of the images, memory holds the few that are being read; what grows with the set are the embeddings and one row
of text a sample. Everything but ``work/`` depends on the input, the settings and the seed alone: not on the number of
workers, the clock, or the place where the set lies.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

import curate
from curate import ledger as ledgers
from curate.config import PREFERENCES, DedupConfig
from curate.console import UsageError, UserError, get_logger, locked, progress, write_json
from curate.engine import Engine, LocalEngine
from curate.read import READ_COLUMNS, cached_embedder, preferred_fields, read_stage
from curate.shards import (
    MAX_JSON_BYTES,
    Sample,
    expand_shards,
    open_shard,
    read_samples,
    shard_names,
    write_shard,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from curate.decide import Verdicts
    from curate.embed import CaptionEmbedder, Embedder
    from curate.index import TrainingIndex
    from curate.neighbors import Pairs

log = get_logger(__name__)

CACHE_FORMAT = 4
EXACT_ROWS = 2_000_000  # up to here ``join: auto`` is exact
CAPTION_BLOCK = 1 << 16  # captions embedded at a time
CROWD = 100  # near rows above which a row is crowded (curate.neighbors): bounds the pairs that are held
HISTOGRAM_SAMPLE = 2000


def run_dedup(config: DedupConfig) -> dict[str, Any]:
    """Curate ``config.shards`` into ``config.out``.

    Returns:
        ``samples, kept, dropped, unreadable, groups`` (of more than one sample), ``largest_group``,
        ``reasons`` (how many were dropped why), ``captions_pooled`` (kept samples that inherited captions),
        ``recall`` (of the image join, measured), ``caption_recall``, ``shards`` (written), ``sweep`` (what other
        thresholds would do), ``seconds``, and ``stages``, the seconds of each. ``summary.json`` has the settings in
        place of the seconds, which differ from run to run.

    Raises:
        UsageError: a setting is out of range, there are no shards, ``out`` is foreign or cannot be written.
        UserError: a shard cannot be opened, changed while it was read, or no sample can be read.
    """
    clock = _Clock()
    _check_settings(config)
    urls = expand_shards(config.shards)
    names = shard_names(urls)
    cached_embedder.cache_clear()  # a file of the same name may be another one by now
    _caption_embedder.cache_clear()
    embedder, captioner = cached_embedder(config.image_embedder), _caption_embedder(config.caption_embedder)
    others = _open_others(config, embedder)
    out = _prepare(config.out, urls)
    engine = LocalEngine(config.workers)
    with _locked(out):
        keys = [_read_key(url, name, embedder, config) for url, name in zip(urls, names, strict=True)]
        _note_changes(out, config, dict(zip(names, keys, strict=True)))

        caches = read_stage(engine, out, urls, names, keys, config)
        rows = _Rows.load(caches, embedder.dim, config.missing_caption)
        clock.lap("read")
        if len(rows.readable) == 0:
            _publish_ledger(out, rows, None, None)
            first = rows.table["reason"][0].as_py() if rows.table.num_rows else "the shards are empty"
            raise UserError(
                f"none of the {rows.table.num_rows} samples can be read ({first}); see {out}/ledger.parquet"
            )

        joined = _join_stage(out, rows, keys, captioner, config)
        elsewhere = _against_stage(rows, joined, others, config)
        clock.lap("join")
        verdicts, sweep = _decide_stage(rows, joined, elsewhere, config)
        clock.lap("decide")

        plan = _plan(out / "shards", rows, verdicts, urls, config.samples_per_shard, kept=True)
        dropped = _plan(out / "dropped", rows, verdicts, urls, config.samples_per_shard, kept=False)
        _write_stage(engine, out, [*plan, *(dropped if config.write_dropped else [])])
        clock.lap("write")

        table = _publish_ledger(out, rows, verdicts, elsewhere)
        _publish_index(out, rows, verdicts, embedder)
        summary = _summarise(table, joined, verdicts, config, shards=len(plan)) | {"sweep": sweep}
        _publish_report(engine, out, table, rows, joined, summary, urls, config)
        write_json(out / "summary.json", summary)
        _forget_stale(out, [*caches, *joined.caches])
        clock.lap("publish")
    shown = {key: value for key, value in summary.items() if key != "settings"}
    return {**shown, "seconds": clock.total(), "stages": clock.laps}


# ------------------------------------------------------------------------------------------- before the work


def _check_settings(config: DedupConfig) -> None:
    for name in ("threshold", "caption_threshold"):
        value = getattr(config, name)
        if not 0.0 < value <= 1.0:
            raise UsageError(f"{name} must be in (0, 1], got {value}")
    if not 0.0 <= config.sweep < 1.0:
        raise UsageError(f"sweep must be in [0, 1), got {config.sweep}")
    for name in ("keep_copies", "max_pixels", "samples_per_shard", "batch_size", "recall_sample"):
        value = getattr(config, name)
        if value < 1:
            raise UsageError(f"{name} must be at least 1, got {value}")
    for name in ("workers", "min_caption_chars", "seed"):
        value = getattr(config, name)
        if value < 0:
            raise UsageError(f"{name} must be 0 or more, got {value}")
    if config.max_per_caption is not None and config.max_per_caption < 1:
        raise UsageError(f"max_per_caption must be at least 1, or null, got {config.max_per_caption}")
    for criterion in config.prefer:
        if criterion not in PREFERENCES and not (len(criterion) > 1 and criterion[0] in "+-"):
            known = ", ".join(PREFERENCES)
            raise UsageError(f"prefer: unknown criterion {criterion!r}; choose {known}, +FIELD or -FIELD (of the json)")
    if len(set(config.prefer)) < len(config.prefer):
        raise UsageError(f"prefer names a criterion twice: {', '.join(config.prefer)}")
    if not config.out:
        raise UsageError("out: name the folder to write to")
    if "://" in config.out:
        raise UsageError(f"out: {config.out} must be a local folder")


def _prepare(out_name: str, urls: Sequence[str]) -> Path:
    """The output folder, made and found writable, and holding neither the input nor anything foreign."""
    out = Path(out_name).expanduser()
    for url in urls:
        if "://" not in url and Path(url).resolve().is_relative_to(out.resolve()):
            raise UsageError(
                f"out: {out} holds the input {url}; inputs are never changed, name another folder"
            )
    if out.exists() and not out.is_dir():
        raise UsageError(f"out: {out} is a file, not a folder")
    if out.is_dir() and not (out / "work").is_dir() and not (out / "ledger.parquet").is_file():
        foreign = next(iter(sorted(out.iterdir())), None)
        if foreign is not None:
            raise UsageError(f"out: {out} is not empty and no curation ({foreign.name}); name a new folder")
    try:
        (out / "work" / "read").mkdir(parents=True, exist_ok=True)
        (out / "shards").mkdir(exist_ok=True)
        probe = out / "work" / f".probe-{os.getpid()}"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise UsageError(f"out: cannot write to {out}: {error.strerror or error}") from error
    return out


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """One run at a time in a folder, which begins by removing what a killed one left half-written."""
    with locked(out, out / "work" / "lock"):
        for left_over in [*out.glob(".tmp-*"), *out.glob("*/.tmp-*"), *out.glob("work/read/.tmp-*")]:
            if left_over.is_file():
                left_over.unlink()
        yield


def _settings(config: DedupConfig) -> dict[str, Any]:
    """What the result depends on, beside the input."""
    apart = ("out", "shards", "workers", "engine")
    return {key: value for key, value in dataclasses.asdict(config).items() if key not in apart}


def _note_changes(out: Path, config: DedupConfig, inputs: Mapping[str, str]) -> None:
    """Say what differs from the run that this folder holds, and mark the folder as unfinished."""
    settings = _settings(config)
    job = {"settings": settings, "inputs": dict(inputs)}
    path = out / "work" / "job.json"
    try:
        before = json.loads(path.read_text())
    except (OSError, ValueError):
        before = None
    if before == job:
        return
    if before is not None:
        old, new = before.get("settings", {}), settings
        changed = [f"{key}: {old.get(key)} → {new[key]}" for key in new if old.get(key) != new[key]]
        old_inputs = before.get("inputs", {})
        fresh = sum(old_inputs.get(name) != key for name, key in inputs.items())
        gone = len(set(old_inputs) - set(inputs))
        if fresh or gone:
            changed.append(f"{fresh} shards to read, {gone} gone")
        log.info("%s holds another run; changed: %s", out, "; ".join(changed))
        (out / "summary.json").unlink(missing_ok=True)
    write_json(path, job)


# --------------------------------------------------------------------------------------------- stage 1: read


@lru_cache(maxsize=2)
def _caption_embedder(name: str) -> CaptionEmbedder:
    from curate.embed import load_caption_embedder

    return load_caption_embedder(name)


def _read_key(url: str, name: str, embedder: Embedder, config: DedupConfig) -> str:
    """What the reading of a shard depends on, as a file name: its content, the embedder's weights, the limits."""
    limits = [config.pixel_hash, config.max_pixels, config.batch_size, *preferred_fields(config.prefer)]
    made_by = [CACHE_FORMAT, curate.__version__, embedder.digest, *limits]
    return _digest([made_by, name, _fingerprint(url)])


def _fingerprint(url: str) -> list[str | int]:
    """Changes when a shard does: size, time of change, first and last 64 KiB; or what its store says."""
    if "://" in url:
        import fsspec

        try:
            filesystem, path = fsspec.core.url_to_fs(url)
            return [str(filesystem.ukey(path))]
        except Exception as error:
            raise UserError(f"cannot open shard {url}: {error}") from error
    with open_shard(url) as file:
        stat = os.fstat(file.fileno())
        digest = hashlib.sha256(file.read(1 << 16))
        file.seek(max(0, stat.st_size - (1 << 16)))
        digest.update(file.read(1 << 16))
    return [stat.st_size, stat.st_mtime_ns, digest.hexdigest()]


def _digest(parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


# -------------------------------------------------------------------------------------- the set, in memory


@dataclass(frozen=True)
class _Rows:
    """Every sample of the input, in input order.

    Attributes:
        table: READ_COLUMNS of all N rows; ``reason`` says of each row why it is unreadable, or is null.
        shard_number: int32 [N], which input shard.
        ordinal: int64 [N], which sample of it.
        readable: int64 [n], the rows that can be curated.
        embeddings: float16 [n, dim] of the readable rows.
        captions: of the readable rows.
    """

    table: pa.Table
    shard_number: NDArray[np.int32]
    ordinal: NDArray[np.int64]
    readable: NDArray[np.int64]
    embeddings: NDArray[np.float16]
    captions: list[str]

    @classmethod
    def load(cls, caches: Sequence[Path], dim: int, missing_caption: str) -> _Rows:
        names = [name for name, _ in READ_COLUMNS]
        tables = [pq.read_table(cache, columns=names) for cache in caches]
        sizes = [table.num_rows for table in tables]
        table = pa.concat_tables(tables)
        reason = table["reason"]
        if missing_caption == "unreadable":
            reason = pc.coalesce(reason, table["caption_problem"])
            table = table.set_column(names.index("reason"), "reason", reason)
        usable = reason.is_null().to_numpy(zero_copy_only=False)
        embeddings = np.empty((int(usable.sum()), dim), dtype=np.float16)
        start = row = 0
        for cache, size in zip(caches, sizes, strict=True):
            stored = pq.read_table(cache, columns=["embedding"])["embedding"].combine_chunks()
            data = np.frombuffer(stored.buffers()[1] or b"", dtype=np.float16)[: size * dim].reshape(
                size, dim
            )
            of_shard = data[usable[start : start + size]]
            embeddings[row : row + len(of_shard)] = of_shard
            start, row = start + size, row + len(of_shard)
        readable = np.flatnonzero(usable)
        return cls(
            table=table,
            shard_number=np.repeat(np.arange(len(sizes), dtype=np.int32), sizes),
            ordinal=np.concatenate([np.arange(size, dtype=np.int64) for size in sizes]),
            readable=readable,
            embeddings=embeddings,
            captions=[caption or "" for caption in table["caption"].take(pa.array(readable)).to_pylist()],
        )

    def column(self, name: str) -> NDArray[Any]:
        """A column of the readable rows, [n]."""
        return self.table[name].take(pa.array(self.readable)).to_numpy(zero_copy_only=False)


# --------------------------------------------------------------------------------- stages 2, 3: join, decide


@dataclass(frozen=True)
class _Joined:
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


def _join_stage(
    out: Path, rows: _Rows, keys: Sequence[str], captioner: CaptionEmbedder, config: DedupConfig
) -> _Joined:
    """Exact copies are collapsed by hash first, so that a group of many of them costs nothing."""
    from curate.embed import normalise_caption

    image_of, first = _numbered(rows.column("pixels"))
    normalised = [normalise_caption(caption) for caption in rows.captions]
    caption_of, first_with_caption = _numbered(np.array(normalised, dtype=object))
    captions = [normalised[row] for row in first_with_caption]

    measured = [config.join, config.recall_sample, config.seed]
    lowest = min(sweep_thresholds(config))
    images_key = _digest([list(keys), config.missing_caption, lowest, measured])
    images_cache = out / "work" / f"pairs-{images_key}.parquet"
    image_pairs, recall = _joined(images_cache, lambda: rows.embeddings[first], lowest, config, "joining images")

    # A few letters are near by chance, and embeddings of them say little: equal or not is all that counts.
    long = np.array(
        [row for row, text in enumerate(captions) if len(text) >= config.min_caption_chars], dtype=np.int64
    )
    near_captions = [
        list(keys), config.missing_caption, config.caption_threshold, config.min_caption_chars, measured,
        captioner.digest,
    ]  # fmt: skip
    captions_cache = out / "work" / f"pairs-{_digest(near_captions)}.parquet"
    caption_pairs, caption_recall = _joined(
        captions_cache,
        lambda: embedded_captions(captioner, [captions[row] for row in long]),
        config.caption_threshold,
        config,
        "joining captions",
    )
    return _Joined(
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
    from curate.neighbors import Crowd, Pairs, find_pairs, recall

    if cache.is_file():
        table = pq.read_table(cache)
        measured, crowd = (json.loads(table.schema.metadata[name]) for name in (b"recall", b"crowd"))
        i, j, similarity = (table[name].to_numpy() for name in ("i", "j", "similarity"))
        left_out = Crowd(embed()[crowd], np.array(crowd), threshold) if crowd else None
        return Pairs(i, j, similarity, left_out), measured
    embeddings = embed()
    if len(embeddings) < 2:
        pairs, measured = Pairs.empty(), 1.0
    else:
        n = len(embeddings)
        exact = config.join == "exact" or (config.join == "auto" and n <= EXACT_ROWS)
        find = find_pairs if exact else find_pairs_in_cells
        with progress(total=n * (n + 1) // 2, desc=desc, unit="pairs") as bar:
            pairs = find(embeddings, threshold, crowd=CROWD, threads=config.workers, bar=bar)
        measured = recall(embeddings, pairs, threshold, sample=config.recall_sample, seed=config.seed)
    table = pa.table({"i": pairs.i, "j": pairs.j, "similarity": pairs.similarity})
    crowd = [] if pairs.crowd is None else pairs.crowd.rows.tolist()
    metadata = {"recall": json.dumps(measured), "crowd": json.dumps(crowd)}
    ledgers.write_table(table.replace_schema_metadata(metadata), cache)
    return pairs, measured


@dataclass(frozen=True)
class _Elsewhere:
    """What stands in other sets, among the n readable rows.

    Attributes:
        shard: object [n], ``folder:shard`` of the nearest sample of another set; None where none is near.
        key: object [n], its key.
        similarity: float32 [n], cosine with it; NaN where none is near.
    """

    shard: NDArray[np.object_]
    key: NDArray[np.object_]
    similarity: NDArray[np.float32]


def _open_others(config: DedupConfig, embedder: Embedder) -> dict[str, TrainingIndex]:
    """The indexes of the sets to keep apart from, by the folders that name them."""
    from curate.index import TrainingIndex

    others = {folder: TrainingIndex.load(Path(folder).expanduser()) for folder in config.against}
    for folder, index in others.items():
        if index.embedder != embedder.name:
            raise UsageError(
                f"against: {folder} was curated with the embedder {index.embedder!r}, not {embedder.name!r}; "
                "give image_embedder the same one"
            )
    return others


def _against_stage(
    rows: _Rows, joined: _Joined, others: Mapping[str, TrainingIndex], config: DedupConfig
) -> _Elsewhere | None:
    """The nearest sample of other sets, kept there or dropped there, for each distinct image."""
    from curate.neighbors import find_nearest

    if not others:
        return None
    images = rows.embeddings[joined.first]
    shard, key = (np.full(len(images), None, dtype=object) for _ in range(2))
    similarity = np.full(len(images), np.nan, dtype=np.float32)
    for folder, index in others.items():
        near, cosine = find_nearest(images, index.embeddings, config.threshold, threads=config.workers)
        for image in np.flatnonzero((near >= 0) & ~(cosine <= similarity)).tolist():
            shard[image], key[image] = f"{folder}:{index.shards[near[image]]}", index.keys[near[image]]
            similarity[image] = cosine[image]
    image_of = joined.image_of
    return _Elsewhere(shard[image_of], key[image_of], similarity[image_of])


def sweep_thresholds(config: DedupConfig) -> list[float]:
    """The thresholds that are tried, ascending: the one that decides, five below and five above it, at most 1."""
    steps = {round(config.threshold + config.sweep * step / 5, 6) for step in range(-5, 6)}
    return sorted({config.threshold, *(step for step in steps if 0 < step <= 1)})


def _decide_stage(
    rows: _Rows, joined: _Joined, elsewhere: _Elsewhere | None, config: DedupConfig
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
    }
    at = dataclasses.replace(joined, image_pairs=joined.image_pairs.at_least(config.threshold))
    verdicts = decide(at, rows.captions, prefer, **options)
    others = sweep_thresholds(config) if config.sweep else []
    with progress(others, desc="trying thresholds", unit="thresholds") as bar:
        return verdicts, sweep(joined, rows.captions, prefer, bar, **options)


def _preference(rows: _Rows, prefer: Sequence[str]) -> NDArray[np.int64]:
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


# --------------------------------------------------------------------------------------------- stage 4: write


@dataclass(frozen=True)
class _WriteTask:
    """One output shard: which samples of which input shards, and what their json members gain."""

    path: Path
    marker: Path
    sources: tuple[
        tuple[str, str, tuple[tuple[int, str, str | None], ...]], ...
    ]  # url, name, (ordinal, key, gain)


def _plan(
    folder: Path, rows: _Rows, verdicts: Verdicts, urls: Sequence[str], per_shard: int, *, kept: bool
) -> list[_WriteTask]:
    """Which kept (or dropped) samples go where in ``folder``, in input order.

    A shard is full at ``per_shard`` samples, or when a key would stand in it twice: keys repeat across input
    shards, and a sample keeps its key.
    """
    names = shard_names(urls)
    keys = rows.table["key"].to_pylist()
    tasks: list[_WriteTask] = []
    duplicates = np.bincount(verdicts.kept_by[verdicts.kept_by >= 0], minlength=len(rows.readable))
    sources: dict[int, list[tuple[int, str, str | None]]] = {}
    used: set[str] = set()

    def close() -> None:
        number = len(tasks)
        tasks.append(
            _WriteTask(
                folder / f"{number:06d}.tar",
                folder.parent / "work" / folder.name / f"{number:06d}.json",
                tuple((urls[shard], names[shard], tuple(picked)) for shard, picked in sources.items()),
            )
        )
        sources.clear()
        used.clear()

    for sample, row in enumerate(rows.readable.tolist()):
        if verdicts.kept[sample] != kept:
            continue
        key = keys[row]
        if len(used) == per_shard or key in used:
            close()
        used.add(key)
        gain = None
        if pooled := verdicts.pooled.get(sample):  # of kept samples alone
            gain = json.dumps({"duplicates": int(duplicates[sample]), "captions": list(pooled)})
        sources.setdefault(int(rows.shard_number[row]), []).append((int(rows.ordinal[row]), key, gain))
    if used:
        close()
    return tasks


def _write_stage(engine: Engine, out: Path, plan: Sequence[_WriteTask]) -> None:
    planned = {task.path for task in plan}
    for folder in ("shards", "dropped"):
        (out / "work" / folder).mkdir(exist_ok=True)
        for path in [*(out / folder).glob("[0-9]*.tar")]:
            if path not in planned:
                path.unlink()
    with contextlib.suppress(OSError):  # it is not there, or not empty
        (out / "dropped").rmdir()
    engine.map(_write_shard, [task for task in plan if not _is_written(task)], desc="writing")


def _is_written(task: _WriteTask) -> bool:
    try:
        marker = json.loads(task.marker.read_text())
        return marker == {"plan": _plan_digest(task), "bytes": task.path.stat().st_size}
    except (OSError, ValueError):
        return False


def _plan_digest(task: _WriteTask) -> str:
    return _digest([CACHE_FORMAT, [[_fingerprint(url), picked] for url, _, picked in task.sources]])


def _write_shard(task: _WriteTask) -> None:
    task.marker.unlink(missing_ok=True)
    write_shard(task.path, _picked(task))
    write_json(task.marker, {"plan": _plan_digest(task), "bytes": task.path.stat().st_size})


def _picked(task: _WriteTask) -> Iterator[tuple[str, Mapping[str, bytes]]]:
    for url, name, picked in task.sources:
        wanted = {ordinal: (key, gain) for ordinal, key, gain in picked}
        for ordinal, item in enumerate(read_samples(url, name=name)):
            if ordinal not in wanted:
                continue
            key, gain = wanted.pop(ordinal)
            if not isinstance(item, Sample) or item.key != key:
                raise UserError(f"shard {url} changed while it was curated (sample {key!r}); run again")
            yield key, with_account(item.members, json.loads(gain)) if gain else item.members
            if not wanted:
                break
        if wanted:
            key = next(iter(wanted.values()))[0]
            raise UserError(f"shard {url} changed while it was curated (sample {key!r} is gone); run again")


def with_account(members: Mapping[str, bytes], account: Mapping[str, Any]) -> dict[str, bytes]:
    """Members whose json gains ``afresh: account``; the others keep their bytes.

    A sample without json gets one; where its json is not an object, or too large, too deep or out of range to be
    written again as it was read, the account is a member ``afresh.json``.
    """
    ext = next((name for name in members if name.lower() == "json"), None)
    if ext is None:
        return {**members, "json": _json_bytes({"afresh": account})}
    if len(members[ext]) <= MAX_JSON_BYTES:
        with contextlib.suppress(ValueError, RecursionError):
            fields = json.loads(members[ext])
            if isinstance(fields, dict):
                return {**members, ext: _json_bytes({**fields, "afresh": account})}
    return {**members, "afresh.json": _json_bytes(account)}


def _json_bytes(fields: Any) -> bytes:
    return json.dumps(fields, ensure_ascii=False, allow_nan=False).encode("utf-8", "backslashreplace")


# ------------------------------------------------------------------------------------------- stage 5: publish


def _publish_ledger(
    out: Path, rows: _Rows, verdicts: Verdicts | None, elsewhere: _Elsewhere | None
) -> pa.Table:
    """Write the ledger, and give it."""
    total = rows.table.num_rows
    columns: dict[str, Any] = {
        name: rows.table[name] for name in ("shard", "key", "sha256", "width", "height", "caption")
    }
    columns["row"] = np.arange(total)
    status = np.full(total, ledgers.UNREADABLE, dtype=object)
    reason = rows.table["reason"].to_numpy(zero_copy_only=False).copy()
    stand_in = np.full(total, -1, dtype=np.int64)
    numbers: dict[str, NDArray[Any]] = {}
    for name in ("image_similarity", "caption_similarity", "group", "group_size"):
        numbers[name] = np.full(total, np.nan if "similarity" in name else -1)
    if verdicts is not None:
        status[rows.readable] = np.where(verdicts.kept, ledgers.KEPT, ledgers.DROPPED)
        reason[rows.readable] = verdicts.reason
        stand_in[rows.readable] = np.where(verdicts.kept_by >= 0, rows.readable[verdicts.kept_by], -1)
        for name, values in numbers.items():
            values[rows.readable] = getattr(verdicts, name)
        numbers["group"][rows.readable] = rows.readable[verdicts.group]  # named by its first member's row
    nobody = stand_in < 0
    for name in ("shard", "key"):
        columns[f"kept_{name}"] = rows.table[name].take(pa.array(stand_in, mask=nobody))
        if elsewhere is not None:
            of_others = np.full(total, None, dtype=object)
            of_others[rows.readable] = getattr(elsewhere, name)
            columns[f"kept_{name}"] = pc.coalesce(columns[f"kept_{name}"], pa.array(of_others, pa.string()))
    if elsewhere is not None:
        there = ~np.isnan(elsewhere.similarity)
        numbers["image_similarity"][rows.readable[there]] = elsewhere.similarity[there]
    for name, values in numbers.items():
        missing = np.isnan(values) if "similarity" in name else values < 0
        columns[name] = pa.array(values, mask=missing).cast(ledgers.SCHEMA.field(name).type)
    columns["status"], columns["reason"] = pa.array(status), pa.array(reason, pa.string())
    table = pa.table({field.name: columns[field.name] for field in ledgers.SCHEMA}, schema=ledgers.SCHEMA)
    ledgers.write_table(table, out / "ledger.parquet")
    return table


def _publish_index(out: Path, rows: _Rows, verdicts: Verdicts, embedder: Embedder) -> None:
    from curate.index import TrainingIndex

    TrainingIndex.build(
        embeddings=rows.embeddings,
        captions=rows.table["caption"].take(pa.array(rows.readable)).to_pylist(),
        shards=rows.column("shard").tolist(),
        keys=rows.column("key").tolist(),
        kept=verdicts.kept,
        group=rows.readable[verdicts.group],
        embedder_name=embedder.name,
    ).save(out / "index")


def _summarise(
    table: pa.Table, joined: _Joined, verdicts: Verdicts, config: DedupConfig, shards: int
) -> dict[str, Any]:
    status = collections.Counter(table["status"].to_pylist())
    reasons = collections.Counter(
        table.filter(pc.equal(table["status"], ledgers.DROPPED))["reason"].to_pylist()
    )
    sizes = np.bincount(verdicts.group)
    return {
        "samples": table.num_rows,
        **{name: status[name] for name in (ledgers.KEPT, ledgers.DROPPED, ledgers.UNREADABLE)},
        "groups": int((sizes > 1).sum()),
        "largest_group": int(sizes.max()),
        "reasons": {name: reasons[name] for name in ledgers.DROP_REASONS if reasons[name]},
        "captions_pooled": sum(bool(pooled) for pooled in verdicts.pooled.values()),
        "recall": joined.recall,
        "caption_recall": joined.caption_recall,
        "shards": shards,
        "settings": _settings(config),
    }


def _publish_report(
    engine: Engine,
    out: Path,
    table: pa.Table,
    rows: _Rows,
    joined: _Joined,
    summary: dict[str, Any],
    urls: Sequence[str],
    config: DedupConfig,
) -> None:
    from curate import report

    counts: Mapping[str, Any] = report.histogram(np.empty(0, dtype=np.float32))
    calls: list[tuple[int, int, float]] = []
    if len(joined.first) > 1:
        embeddings = rows.embeddings[joined.first]
        asked, nearest, similarity = report.nearest_similarities(embeddings, HISTOGRAM_SAMPLE, config.seed)
        counts = report.histogram(similarity)
        # The join's pairs where it went below the threshold, and else the sample's nearest neighbours, too.
        pairs, row_of = joined.image_pairs, rows.readable[joined.first]
        below = similarity < min(sweep_thresholds(config))
        one, other = np.concatenate([pairs.i, asked[below]]), np.concatenate([pairs.j, nearest[below]])
        likeness = np.concatenate([pairs.similarity, similarity[below]])
        calls = report.close_calls(row_of[one], row_of[other], likeness, config.threshold, config.seed)
    shown = {row for group in report.gallery(table) for row in group} | {
        row for a, b, _ in calls for row in (a, b)
    }
    of_shard: dict[int, list[tuple[int, int]]] = {}
    for row in sorted(shown):
        of_shard.setdefault(int(rows.shard_number[row]), []).append((row, int(rows.ordinal[row])))
    tasks = [
        _ThumbnailTask(urls[shard], tuple(wanted), config.max_pixels) for shard, wanted in of_shard.items()
    ]
    thumbnails: dict[int, bytes] = {}
    for of_task in engine.map(_thumbnails, tasks, desc="picturing"):
        thumbnails |= of_task
    pictures = report.Pictures(counts, calls, thumbnails)
    pictures.save(out / "work" / "report.json")
    report.write_report(out, report.render(summary, table, pictures))


@dataclass(frozen=True)
class _ThumbnailTask:
    url: str
    wanted: tuple[tuple[int, int], ...]  # (ledger row, ordinal in the shard)
    max_pixels: int


def _thumbnails(task: _ThumbnailTask) -> dict[int, bytes]:
    from curate.report import thumbnail

    row_of = {ordinal: row for row, ordinal in task.wanted}
    found: dict[int, bytes] = {}
    for ordinal, item in enumerate(read_samples(task.url)):
        if ordinal in row_of and isinstance(item, Sample):
            found[row_of[ordinal]] = thumbnail(item.image, max_pixels=task.max_pixels)
            if len(found) == len(row_of):
                break
    return found


def _forget_stale(out: Path, in_use: Sequence[Path]) -> None:
    """Remove caches of other settings and inputs than this run's."""
    for path in [*(out / "work" / "read").glob("*.parquet"), *(out / "work").glob("pairs-*.parquet")]:
        if path not in in_use:
            path.unlink()


class _Clock:
    def __init__(self) -> None:
        self.start = self.last = time.monotonic()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.laps[name], self.last = round(now - self.last, 3), now

    def total(self) -> float:
        return round(time.monotonic() - self.start, 3)
