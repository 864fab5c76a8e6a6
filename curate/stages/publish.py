"""The last stage of curation: the ledger, the training-set index, the summary and the report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from afresh.storage import Store
from curate.columns import table_on_disk
from curate.config import DedupConfig
from curate.engines.protocol import Engine
from curate.reading.samples import Sample, read_samples
from curate.results import ledger
from curate.stages.decide import Elsewhere
from curate.stages.filters import REASON
from curate.stages.join import Joined, sweep_thresholds
from curate.stages.rows import Rows

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from curate.decisions.rules import Verdicts
    from curate.embed.protocol import Embedder


HISTOGRAM_SAMPLE = 2000
LEDGER_ROWS = 1 << 16  # made at a time: a row group of the file


def publish_ledger(out: Store, rows: Rows, verdicts: Verdicts | None, elsewhere: Elsewhere | None) -> pa.Table:
    """Write the ledger, and give it, memory-mapped."""
    with ledger.table_writer(ledger.SCHEMA, out.made_in / "ledger.parquet") as writer:

        def written() -> Iterator[pa.RecordBatch]:
            for part in ledger_parts(rows, verdicts, elsewhere):
                writer.write_table(part)
                yield from part.to_batches()

        table = table_on_disk(out.made_in / "work", written(), ledger.SCHEMA)
    out.deliver("ledger.parquet")
    return table


def ledger_table(rows: Rows, verdicts: Verdicts | None, elsewhere: Elsewhere | None) -> pa.Table:
    """The ledger in memory; see :func:`ledger_parts`."""
    return pa.concat_tables(ledger_parts(rows, verdicts, elsewhere))


def ledger_parts(rows: Rows, verdicts: Verdicts | None, elsewhere: Elsewhere | None) -> Iterator[pa.Table]:
    """One row a sample, in the columns of :data:`curate.results.ledger.SCHEMA`, some thousands at a time.

    Args:
        rows: of all samples.
        verdicts: of the readable ones; None where there are none.
        elsewhere: what stands in other sets, where there are any.
    """
    without = rows.table["caption"].is_null().to_numpy()
    for start in range(0, max(1, rows.table.num_rows), LEDGER_ROWS):
        yield _ledger_part(rows, verdicts, elsewhere, without, start, min(start + LEDGER_ROWS, rows.table.num_rows))


def _ledger_part(
    rows: Rows,
    verdicts: Verdicts | None,
    elsewhere: Elsewhere | None,
    without: NDArray[np.bool_],
    start: int,
    stop: int,
) -> pa.Table:
    """The rows ``start … stop``; ``without`` tells of all rows which have no caption."""
    total = stop - start
    columns: dict[str, Any] = {
        name: rows.table[name].slice(start, total) for name in ("shard", "key", "sha256", "width", "height", "caption")
    }
    columns["row"] = np.arange(start, stop)
    some = slice(*np.searchsorted(rows.readable, [start, stop]).tolist())
    readable = rows.readable[some] - start
    status = np.full(total, ledger.UNREADABLE, dtype=object)
    reason = rows.table["reason"].slice(start, total).to_numpy(zero_copy_only=False).copy()
    stand_in = np.full(total, -1, dtype=np.int64)
    numbers: dict[str, NDArray[Any]] = {}
    for name in ("image_similarity", "caption_similarity", "group", "group_size"):
        numbers[name] = np.full(total, np.nan if "similarity" in name else -1)
    if verdicts is not None:
        status[readable] = np.where(verdicts.code[some] == 0, ledger.KEPT, ledger.DROPPED)
        reason[readable] = verdicts.reason_of(some)
        kept_by = verdicts.kept_by[some]
        stand_in[readable] = np.where(kept_by >= 0, rows.readable[kept_by], -1)
        for name, values in numbers.items():
            values[readable] = getattr(verdicts, name)[some]
        numbers["group"][readable] = rows.readable[verdicts.group[some]]  # named by its first member's row
    nobody = stand_in < 0
    for name in ("shard", "key"):
        names = np.full(total, None, dtype=object)
        if elsewhere is not None:
            names[readable] = getattr(elsewhere, name)[some]
        names[~nobody] = rows.texts(name).take(stand_in[~nobody])
        columns[f"kept_{name}"] = pa.array(names, pa.string())
    if elsewhere is not None:
        similarity = elsewhere.similarity[some]
        there = ~np.isnan(similarity)
        numbers["image_similarity"][readable[there]] = similarity[there]
    alike = numbers["caption_similarity"]
    alike[without[start:stop] | (~nobody & without[stand_in])] = np.nan  # what is not there is like nothing
    for name, values in numbers.items():
        missing = np.isnan(values) if "similarity" in name else values < 0
        columns[name] = pa.array(values, mask=missing).cast(ledger.SCHEMA.field(name).type)
    columns["status"], columns["reason"] = pa.array(status, pa.string()), pa.array(reason, pa.string())
    return pa.table({field.name: columns[field.name] for field in ledger.SCHEMA}, schema=ledger.SCHEMA)


def publish_index(out: Store, rows: Rows, verdicts: Verdicts, embedder: Embedder, threshold: float) -> None:
    """Write ``out/index``, of all readable rows; images at least as near as ``threshold`` were counted as one."""
    from curate.index.training_index import FILES, TrainingIndex

    TrainingIndex.build(
        embeddings=rows.embeddings,
        captions=rows.of_readable("caption"),
        shards=rows.of_readable("shard"),
        keys=rows.of_readable("key"),
        kept=verdicts.kept,
        group=rows.readable[verdicts.group],
        embedder_name=embedder.name,
        embedder_digest=embedder.digest,
        threshold=threshold,
    ).save(out.made_in / "index")
    for name in FILES:
        out.deliver(f"index/{name}")


def summarise(
    table: pa.Table, joined: Joined, verdicts: Verdicts, settings: Mapping[str, Any], shards: int
) -> dict[str, Any]:
    """The summary without its sweep; ``settings`` are those that the result depends on."""
    status, reasons = Counter[str](), Counter[str]()
    for batch in table.select(["status", "reason"]).to_batches():
        status += _counted(batch["status"])
        reasons += _counted(batch["reason"].filter(pc.equal(batch["status"], ledger.DROPPED)))
    by_filters = sorted(name for name in reasons if name.startswith(REASON))
    sizes = np.bincount(verdicts.group)
    return {
        "samples": table.num_rows,
        **{name: status[name] for name in (ledger.KEPT, ledger.DROPPED, ledger.UNREADABLE)},
        "groups": int((sizes > 1).sum()),
        "largest_group": int(sizes.max()),
        "reasons": {name: reasons[name] for name in (*ledger.DROP_REASONS, *by_filters) if reasons[name]},
        "captions_pooled": len(verdicts.pooled),
        "recall": joined.recall,
        "caption_recall": joined.caption_recall,
        "shards": shards,
        "settings": dict(settings),
    }


def _counted(column: pa.Array) -> Counter[str]:
    """How often each value stands in a column; nulls are passed over."""
    return Counter({row["values"]: row["counts"] for row in column.drop_null().value_counts().to_pylist()})


def publish_report(
    engine: Engine,
    out: Store,
    table: pa.Table,
    rows: Rows,
    joined: Joined,
    summary: dict[str, Any],
    urls: Sequence[str],
    config: DedupConfig,
) -> None:
    """Write ``out/report.html``, and beside the caches what ``curate report`` draws it from again."""
    from curate.results import report_data
    from curate.results.report_page import render, write_report

    counts: Mapping[str, Any] = report_data.histogram(np.empty(0, dtype=np.float32))
    calls: list[tuple[int, int, float]] = []
    if len(joined.first) > 1:
        asked, nearest, similarity = report_data.nearest_similarities(joined.images, HISTOGRAM_SAMPLE, config.seed)
        counts = report_data.histogram(similarity)
        # The join's pairs where it went below the threshold, and else the sample's nearest neighbours, too.
        pairs, row_of = joined.image_pairs, rows.readable[joined.first]
        below = similarity < min(sweep_thresholds(config))
        near = report_data.around(pairs.similarity, config.threshold)
        one, other = np.concatenate([pairs.i[near], asked[below]]), np.concatenate([pairs.j[near], nearest[below]])
        likeness = np.concatenate([pairs.similarity[near], similarity[below]])
        calls = report_data.close_calls(row_of[one], row_of[other], likeness, config.threshold, config.seed)
    shown = {row for group in report_data.gallery(table) for row in group} | {
        row for a, b, _ in calls for row in (a, b)
    }
    of_shard: dict[int, list[tuple[int, int]]] = {}
    wanted_rows = np.array(sorted(shown), np.int64)
    for row, shard, ordinal in zip(wanted_rows, *rows.places(wanted_rows), strict=True):
        of_shard.setdefault(int(shard), []).append((int(row), int(ordinal)))
    tasks = [
        _ThumbnailTask(urls[shard], tuple(wanted), config.max_pixels) for shard, wanted in of_shard.items()
    ]
    thumbnails: dict[int, bytes] = {}
    for of_task in engine.map(_thumbnails, tasks, desc="picturing"):
        thumbnails |= of_task
    pictures = report_data.Pictures(counts, calls, thumbnails)
    pictures.save(out)
    write_report(out, render(summary, table, pictures))


@dataclass(frozen=True)
class _ThumbnailTask:
    url: str
    wanted: tuple[tuple[int, int], ...]  # (ledger row, ordinal in the shard)
    max_pixels: int

    @property
    def label(self) -> str:
        return self.url


def _thumbnails(task: _ThumbnailTask) -> dict[int, bytes]:
    from curate.results.report_data import thumbnail

    row_of = {ordinal: row for row, ordinal in task.wanted}
    found: dict[int, bytes] = {}
    for ordinal, item in enumerate(read_samples(task.url)):
        if ordinal in row_of and isinstance(item, Sample):
            found[row_of[ordinal]] = thumbnail(item.image, max_pixels=task.max_pixels)
            if len(found) == len(row_of):
                break
    return found

