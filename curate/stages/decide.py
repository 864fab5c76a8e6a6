"""The decide stage of curation: what stands in other sets, what lists exclude and keep, and who is kept.

Verdicts, and what other thresholds would do, are made of the pairs anew every time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc

from afresh import plugins
from afresh.errors import UsageError
from afresh.progress import progress
from curate.columns import BLOCK, Column
from curate.config import RULES, DedupConfig
from curate.decisions.sample_lists import refuse_missing
from curate.stages.filters import REASON
from curate.stages.join import Joined, join_memory, sweep_thresholds
from curate.stages.memory import hand_back
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
    images = joined.images
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
    excluded = np.zeros(rows.table.num_rows, bool)
    there: list[set[str]] = [set() for _ in listed]
    keys = rows.texts("key")
    for shard, wanted in enumerate(listed):
        first, last = rows.starts[shard : shard + 2].tolist()
        for start in range(first, last, BLOCK) if wanted else ():
            for row, key in enumerate(keys.take(np.arange(start, min(start + BLOCK, last))), start):
                if key in wanted:
                    excluded[row] = True
                    there[shard].add(key)
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
    from curate.decisions.rules import decide, sweep
    from curate.decisions.settled import EXCLUDED

    prefer = _preference(rows, config.prefer)
    filtered = rows.table["left_out"].is_valid().to_numpy()[rows.readable]
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
        "others": _others(rows),
    }
    # The other thresholds first: then one decision at a time is in memory.
    others = sweep_thresholds(config) if config.sweep else []
    with progress(desc="trying thresholds", unit="decisions") as bar:
        swept = sweep(joined, rows.captions, prefer, others, bar=bar, **options)
    hand_back()
    with progress(desc="deciding", unit="decisions") as bar:
        verdicts = decide(joined, rows.captions, prefer, threshold=config.threshold, bar=bar, **options)
    return _naming_filters(verdicts, rows, filtered & verdicts.dropped_for(EXCLUDED)), swept


def _naming_filters(verdicts: Verdicts, rows: Rows, filtered: NDArray[np.bool_]) -> Verdicts:
    """The same verdicts, but that those ``filtered`` are dropped for the filter's sake."""
    places = np.flatnonzero(filtered)
    filters = [REASON + name for name in rows.of_readable("left_out").take(places)]
    names, number = np.unique(filters, return_inverse=True)
    reasons = (*verdicts.reasons, *names.tolist())
    code = verdicts.code.astype(np.min_scalar_type(len(reasons)), copy=False)
    code[places] = len(verdicts.reasons) + number
    return replace(verdicts, code=code, reasons=reasons)


def _others(rows: Rows) -> Column | None:
    """Further captions of each row; None where no row has any."""
    lengths = pc.sum(pc.list_value_length(rows.table["others"])).as_py()
    return rows.of_readable("others", ()) if lengths else None


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


def _preference(rows: Rows, prefer: Sequence[str]) -> NDArray[np.integer]:
    """Rank of each row, 0 for the one to be kept before all others; ties go by input order."""
    keys: list[NDArray[Any]] = [np.arange(len(rows.readable))]  # the last one decides first
    fields = list(preferred_fields(prefer))
    for criterion in reversed(prefer):
        if criterion == "lossless":
            keys.append(~rows.column(criterion).astype(bool))
        elif criterion == "resolution":
            keys.append(-(rows.column("width").astype(np.int64) * rows.column("height").astype(np.int64)))
        elif criterion == "caption_length":
            keys.append(-pc.fill_null(pc.utf8_length(rows.table["caption"]), 0).to_numpy()[rows.readable])
        else:
            values = pc.list_element(rows.table["numbers"], fields.index(criterion[1:]))
            of_rows = values.to_numpy(zero_copy_only=False).astype(np.float64)[rows.readable]
            keys.append(np.where(np.isnan(of_rows), np.inf, -of_rows if criterion[0] == "+" else of_rows))
    order = np.lexsort(keys)
    rank: NDArray[Any] = np.empty(len(order), np.int32 if len(order) < 1 << 31 else np.int64)
    rank[order] = np.arange(len(order), dtype=rank.dtype)
    return rank
