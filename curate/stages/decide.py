"""The decide stage of curation: what stands in other sets, what lists exclude and keep, and who is kept.

Verdicts, and what other thresholds would do, are made of the pairs anew every time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from afresh import plugins
from afresh.errors import UsageError
from afresh.progress import progress
from curate.config import RULES, DedupConfig
from curate.decisions.sample_lists import refuse_missing
from curate.stages.filters import REASON
from curate.stages.join import Joined, join_memory, sweep_thresholds
from curate.stages.read import preferred_fields
from curate.stages.rows import Rows

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from curate.decisions.rules import OwnRule, Rule, Verdicts
    from curate.embed.protocol import Embedder
    from curate.index.training_index import TrainingIndex


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
    from curate.index.training_index import TrainingIndex, refuse_other

    others = {folder: TrainingIndex.load(folder) for folder in config.against}
    for folder, index in others.items():
        refuse_other(index, embedder, f"against: {folder}", "image_embedder")
    return others


def against_stage(
    rows: Rows,
    joined: Joined,
    others: Mapping[str, TrainingIndex],
    config: DedupConfig,
    must_stay: NDArray[np.bool_] | None = None,
) -> Elsewhere | None:
    """The nearest sample of other sets, kept there or dropped there, for each distinct image but what a list keeps."""
    from curate.neighbors.nearest import find_nearest

    if not others:
        return None
    images = rows.embeddings[joined.first]
    shard, key = (np.full(len(images), None, dtype=object) for _ in range(2))
    similarity = np.full(len(images), np.nan, dtype=np.float32)
    for folder, index in others.items():
        near, cosine = find_nearest(
            images, index.embeddings, config.threshold, memory=join_memory(config), threads=config.workers
        )
        for image in np.flatnonzero((near >= 0) & ~(cosine <= similarity)).tolist():
            shard[image], key[image] = f"{folder}:{index.shards[near[image]]}", index.keys[near[image]]
            similarity[image] = cosine[image]
    image_of = joined.image_of
    found = Elsewhere(shard[image_of], key[image_of], similarity[image_of])
    if must_stay is not None:
        found.shard[must_stay] = found.key[must_stay] = None
        found.similarity[must_stay] = np.nan
    return found


def listed_stage(rows: Rows, names: Sequence[str], listed: Sequence[Set[str]], path: str) -> NDArray[np.bool_]:
    """``[n]``, which readable rows the list at ``path`` names; ``listed`` are its keys in each shard.

    Raises:
        UserError: a listed sample is not in its shard.
    """
    shards, keys = rows.shard_number.tolist(), rows.table["key"].to_pylist()
    excluded = np.array([key in listed[shard] for shard, key in zip(shards, keys, strict=True)], dtype=bool)
    there: list[set[str]] = [set() for _ in listed]
    for row in np.flatnonzero(excluded).tolist():
        there[shards[row]].add(keys[row])
    refuse_missing(path, names, listed, there)
    return excluded[rows.readable]


def decide_stage(
    rows: Rows,
    joined: Joined,
    elsewhere: Elsewhere | None,
    excluded: NDArray[np.bool_] | None,
    config: DedupConfig,
    must_stay: NDArray[np.bool_] | None = None,
) -> tuple[Verdicts, list[dict[str, Any]]]:
    """The verdicts, and the table of other thresholds. What a filter leaves out is judged like what a list excludes,
    but where another list keeps it.
    """
    from curate.decisions.rules import EXCLUDED, decide, sweep

    prefer = _preference(rows, config.prefer)
    left_out = rows.column("left_out")
    filtered = np.array([name is not None for name in left_out], dtype=bool)
    if must_stay is not None:
        filtered &= ~must_stay
    if filtered.any():
        excluded = filtered if excluded is None else filtered | excluded
    options: dict[str, Any] = {
        "rule": find_rule(config.rule),
        "keep_copies": config.keep_copies,
        "max_per_caption": config.max_per_caption,
        "on_caption_differs": config.on_caption_differs,
        "elsewhere": None if elsewhere is None else ~np.isnan(elsewhere.similarity),
        "excluded": excluded,
        "must_stay": must_stay,
        "others": [() if texts is None else texts for texts in rows.column("others")],
    }
    verdicts = decide(joined, rows.captions, prefer, threshold=config.threshold, **options)
    for row in np.flatnonzero(filtered & (verdicts.reason == EXCLUDED)).tolist():
        verdicts.reason[row] = REASON + left_out[row]
    others = sweep_thresholds(config) if config.sweep else []
    with progress(others, desc="trying thresholds", unit="thresholds") as bar:
        return verdicts, sweep(joined, rows.captions, prefer, bar, **options)


def find_rule(name: str) -> Rule | OwnRule:
    """The rule of decision of that name: one of ``RULES``, an entry point of ``afresh.decision_rules``, or
    ``module:function``.

    Raises:
        UsageError: there is none, or it cannot be imported.
    """
    if name in RULES:
        return name  # type: ignore[return-value]
    own = plugins.function(plugins.DECISION_RULES, name, "rule", "curate.decisions.rules.OwnRule")
    if own is None:
        raise UsageError(f"rule: unknown {name!r}: choose {plugins.choices(plugins.DECISION_RULES, RULES)}")
    return own


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

