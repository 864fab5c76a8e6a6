"""The curation job: drop copies from tar shards, and keep an account of every sample.

Stages (:mod:`curate.stages`), each of which leaves files so that a stopped run is continued where it was:

1. read: each shard once; hashes, sizes, captions and image embeddings → ``work/read/*.parquet``,
2. join: pairs of near images and of near captions → ``work/pairs-*.parquet``,
3. decide: who is kept, and who stands for whom (:mod:`curate.decisions.rules`); cheap, done anew every time,
4. write: the kept samples' bytes → ``shards/*.tar``,
5. publish: ledger, index, report and, last, ``summary.json``. A folder without it is unfinished.

The result may lie at a URL (:mod:`afresh.storage`): then the caches of the first two stages stay in a local folder, and
everything else is sent there as it is finished, with the marks by which a stopped run is continued.

Of the images, memory holds the few that are being read; what grows with the set are numbers, some hundred bytes a
sample: embeddings and text are memory-mapped. Everything but ``work/`` depends on the input, the settings and the seed
alone: not on the number of workers, the clock, or the place where the set lies.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.compute as pc

import curate
from afresh import plugins
from afresh.errors import UsageError, UserError, printable
from afresh.files import digest
from afresh.progress import get_logger
from afresh.runs import locked
from afresh.storage import Store, open_output
from curate.config import PREFERENCES, RULES, DedupConfig
from curate.decisions.sample_lists import ids_digest, listed_keys, refuse_both
from curate.engines.registry import open_engine
from curate.reading.urls import expand_shards, fingerprint, refuse_changed, shard_names
from curate.stages.decide import against_stage, decide_stage, find_rule, listed_stage, open_others
from curate.stages.filters import identities, load_filter
from curate.stages.join import join_stage
from curate.stages.memory import hand_back
from curate.stages.publish import publish_index, publish_ledger, publish_report, summarise
from curate.stages.read import cached_embedder, preferred_fields, read_stage
from curate.stages.rows import Rows
from curate.stages.write import Plan, write_stage

if TYPE_CHECKING:
    from curate.embed.protocol import CaptionEmbedder, Embedder


log = get_logger(__name__)
CACHE_FORMAT = 8
CACHES_STAY = 30 * 24 * 3600  # seconds since a run used them


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
        UserError: a shard cannot be opened, changed while it was read, or no sample can be read; the disk is full, or
            the store of ``out`` fails. The same command goes on there.
    """
    clock = _Clock()
    check_settings(config)
    out = open_output(config.out, config.work_dir)
    urls = expand_shards(config.shards)
    names = shard_names(urls)
    to_drop, to_keep = (listed_keys(path, urls) if path else None for path in (config.exclude, config.keep))
    refuse_both(config.exclude, to_drop, config.keep, to_keep, names)
    cached_embedder.cache_clear()  # a file of the same name may be another one by now
    _caption_embedder.cache_clear()
    embedder, captioner = cached_embedder(config.image_embedder), _caption_embedder(config.caption_embedder)
    others = open_others(config, embedder)
    _prepare(out, config, urls)
    work = out.made_in / "work"
    if out.remote:
        log.info("%s: caches, and files until they are sent, lie in %s", out, out.made_in)
    with _locked(out), open_engine(config.engine, config.workers) as engine:
        fingerprints = [fingerprint(url) for url in urls]
        keys = [_read_key(name, mark, embedder, config) for name, mark in zip(names, fingerprints, strict=True)]
        known = {"caption_embedder": captioner.digest} | {folder: index.digest for folder, index in others.items()}
        _note_changes(out, config, dict(zip(names, keys, strict=True)), known)

        caches = read_stage(engine, work, urls, names, keys, config, fingerprints)
        rows = Rows.load(caches, embedder.dim, config.missing_caption, names)
        clock.lap("read")
        if len(rows.readable) == 0:
            publish_ledger(out, rows, None, None)
            raise _nothing_to_read(out, rows)
        if rows.of_images_alone and config.missing_caption == "auto":
            log.info("no sample has a caption: the set is curated by its images alone")
        if unreadable := rows.table.num_rows - len(rows.readable):
            where = out.at("ledger.parquet")
            log.warning("%d samples cannot be read%s; see %s", unreadable, _captionless(rows), where)

        excluded = None if to_drop is None else listed_stage(rows, names, to_drop, config.exclude)
        must_stay = None if to_keep is None else listed_stage(rows, names, to_keep, config.keep)
        if must_stay is not None and (torn := sum(map(len, to_keep or ())) - int(must_stay.sum())):
            log.warning("%s: %d of the samples to keep cannot be read; the ledger says why", config.keep, torn)
        joined = join_stage(engine, work, rows, keys, captioner, config)
        elsewhere = against_stage(rows, joined, others, config, must_stay)
        clock.lap("join")
        verdicts, sweep = decide_stage(rows, joined, elsewhere, excluded, config, must_stay)
        clock.lap("decide")

        planned = partial(Plan, out, rows=rows, verdicts=verdicts, urls=urls, fingerprints=fingerprints)
        plan = planned(folder="shards", per_shard=config.samples_per_shard, kept=True)
        plans = [plan]
        if config.write_dropped:
            plans.append(planned(folder="dropped", per_shard=config.samples_per_shard, kept=False))
        write_stage(engine, out, plans)
        clock.lap("write")

        table = publish_ledger(out, rows, verdicts, elsewhere)
        publish_index(out, rows, verdicts, embedder, config.threshold)
        summary = summarise(table, joined, verdicts, settings_of(config), shards=len(plan)) | {"sweep": sweep}
        publish_report(engine, out, table, rows, joined, summary, urls, config)
        for url, mark in zip(urls, fingerprints, strict=True):
            refuse_changed(url, mark)
        out.write_json("summary.json", summary)
        _forget_unused(work, [*caches, *joined.caches])
        clock.lap("publish")
    shown = {key: value for key, value in summary.items() if key != "settings"}
    return {**shown, "seconds": clock.total(), "stages": clock.laps}


def _nothing_to_read(out: Store, rows: Rows) -> UserError:
    """What to say of a set without a sample that can be curated."""
    table = rows.table
    first = table["reason"][0].as_py()
    why, where = printable(first), out.at("ledger.parquet")
    return UserError(f"none of the {table.num_rows} samples can be read ({why}){_captionless(rows)}; see {where}")


def _captionless(rows: Rows) -> str:
    """How many unreadable samples lack a caption alone, and what takes them; nothing where none does."""
    number = pc.sum(pc.equal(rows.table["reason"], rows.table["caption_problem"])).as_py() or 0
    return f"; {number} lack nothing but a caption: --missing_caption empty takes them" if number else ""


def check_settings(config: DedupConfig) -> None:
    """Raise UsageError if a setting is out of range; names it."""
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
    find_rule(config.rule)
    if config.rule not in RULES:
        for name in ("keep_copies", "max_per_caption", "on_caption_differs"):
            if getattr(config, name) != getattr(DedupConfig, name):
                raise UsageError(f"{name} is for the rules {' and '.join(RULES)}: {config.rule} decides that itself")
    for name in config.steps:
        load_filter(name)
    if config.join_memory <= 0:
        raise UsageError(f"join_memory must be above 0 GB, got {config.join_memory}")
    if not 0 < config.gpu_share <= 1:
        raise UsageError(f"gpu_share must be above 0 and at most 1, got {config.gpu_share}")
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


def _prepare(out: Store, config: DedupConfig, urls: Sequence[str]) -> None:
    """Make the output folder, and see that it can be written, and holds neither the input nor anything foreign."""
    for url in urls:
        if out.holds(url):
            raise UsageError(f"out: {out} holds the input {url}; inputs are never changed, name another folder")
    out.refuse_foreign("curation", ("work", "ledger.parquet"))
    if out.in_memory and (config.workers != 1 or config.engine != "local"):
        raise UsageError(f"out: {out} lies in the memory of one process; give --workers 1 and --engine local")
    out.prepare()
    out.make_folders("work/read", *([] if out.remote else ["shards"]))


@contextlib.contextmanager
def _locked(out: Store) -> Iterator[None]:
    """One run at a time in a folder, which begins and ends by removing what a killed one left half-written."""
    with locked(out.where, out.made_in / "work" / "lock"):
        out.sweep()
        try:
            yield
        finally:
            out.sweep_here()  # after workers that were ended in the middle of a file


def settings_of(config: DedupConfig) -> dict[str, Any]:
    """What the result depends on, beside the input."""
    apart = ("out", "work_dir", "shards", "workers", "gpu_share", "engine", "join_memory")
    settings = {key: value for key, value in dataclasses.asdict(config).items() if key not in apart}
    if config.rule not in RULES:
        settings["rule"] = f"{config.rule} ({plugins.identity(find_rule(config.rule))[:12]})"
    settings["steps"] = [f"{name} ({code[:12]})" for name, code in identities(config.steps)]
    if not settings["steps"]:
        del settings["steps"]
    for name in ("exclude", "keep"):  # what the list holds, wherever it lies
        if path := settings[name]:
            settings[name] = ids_digest(path)
    return settings


def _note_changes(out: Store, config: DedupConfig, inputs: Mapping[str, str], known: Mapping[str, str]) -> None:
    """Say what differs from the run that this folder holds, and mark the folder as unfinished.

    Args:
        out: the folder.
        config: the settings.
        inputs: what is read of each shard depends on, by its name.
        known: digests of what else the result depends on, which may be others under the same names.
    """
    settings = settings_of(config)
    job = {"settings": settings, "inputs": dict(inputs), "known": dict(known)}
    try:
        before = json.loads(out.read("work/job.json"))
    except (FileNotFoundError, ValueError):
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
        before_known = before.get("known", {})
        changed += [f"what {name} holds" for name in known if before_known.get(name) not in (None, known[name])]
        log.info("%s holds another run; changed: %s", out, "; ".join(changed))
    out.remove("summary.json")
    out.write_json("work/job.json", job)


@lru_cache(maxsize=2)
def _caption_embedder(name: str) -> CaptionEmbedder:
    from curate.embed.registry import load_caption_embedder

    return load_caption_embedder(name)


def _read_key(name: str, mark: Sequence[str | int], embedder: Embedder, config: DedupConfig) -> str:
    """What the reading of a shard depends on, as a file name: its content, the embedder's weights, limits, filters."""
    limits: list[Any] = [config.pixel_hash, config.max_pixels, config.batch_size, *preferred_fields(config.prefer)]
    limits += [config.caption_field, *identities(config.steps)]
    made_by = [CACHE_FORMAT, curate.__version__, embedder.digest, *limits]
    return digest([made_by, name, list(mark)])


def _forget_unused(work: Path, in_use: Sequence[Path]) -> None:
    """Remove caches that no run has used for ``CACHES_STAY`` seconds: a set may be narrowed, and widened again.

    When a cache was used last is its time of access, which is set here whatever the file system does by itself.
    """
    now = time.time_ns()
    for folder in work.glob("pairs-*/"):  # of joins that were stopped
        if folder.is_dir() and now - folder.stat().st_mtime_ns > CACHES_STAY * 10**9:
            shutil.rmtree(folder)
    for path in [*(work / "read").glob("*.parquet"), *work.glob("pairs-*.parquet")]:
        stat = path.stat()
        if path in in_use:
            os.utime(path, ns=(now, stat.st_mtime_ns))
        elif now - max(stat.st_atime_ns, stat.st_mtime_ns) > CACHES_STAY * 10**9:
            path.unlink()


class _Clock:
    def __init__(self) -> None:
        self.start = self.last = time.monotonic()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        hand_back()
        now = time.monotonic()
        self.laps[name], self.last = round(now - self.last, 3), now
        log.info("%s took %.1f s", name, self.laps[name])

    def total(self) -> float:
        return round(time.monotonic() - self.start, 3)

