"""The report of a curation: one HTML file that needs nothing else, to look at before trusting the numbers.

It is drawn from what ``curate dedup`` leaves: ``summary.json``, ``ledger.parquet`` and ``work/report.json``
(thumbnails, histogram, closest calls). Its size is bounded, whatever the size of the set.
"""

from __future__ import annotations

import base64
import heapq
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from afresh.errors import UserError, printable
from afresh.files import write_atomic
from afresh.storage import Store
from curate.columns import BLOCK, Column, numbered, some_rows
from curate.results.ledger import DROP_REASONS, DROPPED, KEPT, UNREADABLE
from curate.results.report_data import BINS, Pictures, gallery

CAPTIONS_SHOWN = 12
UNREADABLE_SHOWN = 200
LEDGER_COLUMNS = [
    "shard", "key", "row", "status", "reason", "image_similarity", "group", "group_size", "caption"
]  # fmt: skip
REASONS = {
    "exact_image": ("Identical image", "the same bytes or the same pixels as the sample that stays"),
    "near_image": (
        "Near image",
        "a near copy under another caption, which the sample that stays takes over",
    ),
    "near_pair": ("Near image and caption", "both the image and the caption are near the sample that stays"),
    "near_caption": ("Near caption", "another image, but enough with a caption near this one stay"),
    "caption_quota": ("Caption quota", "another image, but enough with this caption stay"),
    "other_set": ("In another set", "the image, or a near one, stands in a set given with --against"),
    "excluded": ("Excluded", "named in the list given with --exclude"),
    "own_rule": ("Own rule", "by the rule given with --rule, though neither image nor caption is near"),
}
FILTERED = ("Filters", "left out by the filters given with --steps; the ledger names which")
SHORT = {  # beside a similarity, in the gallery
    "exact_image": "identical",
    "near_image": "image",
    "near_pair": "image + caption",
    "near_caption": "caption",
    "caption_quota": "quota",
    "other_set": "other set",
    "excluded": "excluded",
    "own_rule": "own rule",
}


def write_report(out: Store, html: str) -> None:
    """Write ``report.html``, atomically."""
    with write_atomic(out.made_in / "report.html") as temporary:
        temporary.write_text(html, encoding="utf-8", newline="\n")
    out.deliver("report.html")


def read_summary(out: str | Path) -> dict[str, Any]:
    """``summary.json`` of a finished curation, in a folder or at a URL. Raises ``UserError`` when there is none."""
    place = Store(str(out))
    path = place.at("summary.json")
    try:
        return json.loads(place.read("summary.json"))
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file; is {out} a folder that `curate dedup` wrote to its end?"
        ) from None
    except ValueError as error:
        raise UserError(f"{path}: not a curation's summary: {error}") from error


def render(summary: Mapping[str, Any], table: pa.Table, pictures: Pictures) -> str:
    """The report as HTML: the same arguments give the same text; every caption and name is escaped."""
    groups = gallery(table)
    wanted = {row for rows in groups for row in rows}
    wanted.update(row for a, b, _ in pictures.close_calls for row in (a, b))
    taken = some_rows(table.select(LEDGER_COLUMNS), sorted(wanted))
    shown = {fields["row"]: _card(fields, pictures) for fields in taken.to_pylist()}
    calls = [
        (shown[a], shown[b], similarity)
        for a, b, similarity in pictures.close_calls
        if a in shown and b in shown
    ]
    threshold = float(summary["settings"]["threshold"])
    return _template().render(
        summary=summary,
        threshold=threshold,
        shares=_shares(summary),
        reasons=_reasons(summary),
        histogram=_histogram_shapes(pictures.histogram, threshold),
        sweep=_sweep_shapes(summary.get("sweep", []), threshold),
        groups=[[shown[row] for row in rows] for rows in groups],
        below=[call for call in calls if call[2] < threshold],
        above=[call for call in calls if call[2] >= threshold],
        captions=_repeated_captions(table),
        unreadable=_unreadable(table),
    )


@lru_cache(maxsize=1)
def _template() -> Any:
    import jinja2

    source = Path(__file__).parents[1] / "assets" / "report.html.jinja"
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, finalize=_shown)
    environment.filters["count"] = lambda number: f"{number:,}"
    environment.filters["clip"] = lambda text, length: (text if len(text) <= length else text[: length - 1] + "…")
    return environment.from_string(source.read_text(encoding="utf-8"))


def _shown(value: Any) -> Any:
    """What a page shows of a value: names and captions with escapes for what steers a reader's view. Markup is ours."""
    return printable(value) if isinstance(value, str) and not hasattr(value, "__html__") else value


def _card(fields: Mapping[str, Any], pictures: Pictures) -> dict[str, Any]:
    picture = pictures.thumbnails.get(fields["row"])
    encoded = base64.b64encode(picture).decode() if picture else None
    label = SHORT.get(fields["reason"], fields["reason"])
    caption = (fields["caption"] or "")[:600]
    return {**fields, "caption": caption, "image": encoded, "label": label}


def _shares(summary: Mapping[str, Any]) -> list[tuple[str, int, float]]:
    total = max(1, summary["samples"])
    return [(name, summary[name], 100.0 * summary[name] / total) for name in (KEPT, DROPPED, UNREADABLE)]


def _reasons(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    counts = Counter[str]()
    for name, count in summary["reasons"].items():
        counts[name.partition(":")[0]] += count
    most = max([1, *counts.values()])
    return [
        {
            "name": name,
            "label": label,
            "means": means,
            "count": count,
            "width": 100.0 * count / most,
        }
        for name, (label, means) in [*((name, REASONS[name]) for name in DROP_REASONS), ("filter", FILTERED)]
        if (count := counts[name])
    ]


def _histogram_shapes(counts: Mapping[str, Any], threshold: float) -> dict[str, Any] | None:
    """Bars in a 600 × 180 drawing, from the first bin that holds anything; heights go by the square root."""
    values = list(counts["counts"])
    if not any(values):
        return None
    filled = next(index for index, value in enumerate(values) if value)
    start = min(filled, int(threshold * BINS) - 1, BINS - 10)
    start = max(0, start - start % 5)
    width, height = 600.0 / (BINS - start), 180.0
    most = max(values) ** 0.5
    bars = [
        {
            "x": round((index - start) * width + 0.5, 2),
            "y": round(height - height * value**0.5 / most, 2),
            "width": round(width - 1.0, 2),
            "height": round(height * value**0.5 / most, 2),
            "near": (index + 0.5) / BINS >= threshold,
            "title": f"{index / BINS:.2f}–{(index + 1) / BINS:.2f}: {value:,}",
        }
        for index, value in enumerate(values)
        if index >= start and value
    ]
    ticks = [
        (round((index - start) * width, 2), f"{index / BINS:.1f}")
        for index in range(start, BINS + 1)
        if index % 5 == 0
    ]
    line = round((threshold * BINS - start) * width, 2)
    return {"bars": bars, "ticks": ticks, "line": line, "images": counts["images"]}


def _sweep_shapes(sweep: Sequence[Mapping[str, Any]], threshold: float) -> dict[str, Any] | None:
    """The curve of kept samples over thresholds in a 600 × 330 drawing, from 0 up, and the table behind it."""
    if len(sweep) < 2:
        return None
    thresholds, kept = [row["threshold"] for row in sweep], [row["kept"] for row in sweep]
    most, width = max(*kept, 1), thresholds[-1] - thresholds[0]
    points = [
        {
            "x": round(600 * (row["threshold"] - thresholds[0]) / width, 2),
            "y": round(330 - 320 * row["kept"] / most, 2),
            "chosen": row["threshold"] == threshold,
            "label": f"{row['threshold']:.3g}",
            "title": f"{row['threshold']:.3g}: {row['kept']:,} kept, {row['dropped']:,} dropped, "
            f"{row['groups']:,} groups",
        }
        for row in sweep
    ]
    return {"points": points, "line": " ".join(f"{p['x']},{p['y']}" for p in points), "most": most}


def _repeated_captions(table: pa.Table) -> list[tuple[str, int, int]]:
    """Captions that most samples share, with how many samples had them and how many still do."""
    readable = pc.not_equal(table["status"], UNREADABLE).to_numpy()
    rows = np.flatnonzero(readable)
    if not (readable & table["caption"].is_valid().to_numpy()).any():  # a set without captions shares none
        return []
    captions = Column.of(table["caption"], rows, "")
    numbers, first = numbered(captions, len(rows))  # not by value_counts, which holds them all
    counts = np.bincount(numbers)
    largest = np.sort(counts[counts > 1])[-CAPTIONS_SHOWN:]
    if not len(largest):
        return []
    among = np.flatnonzero(counts >= largest[0])
    blocks = (among[start : start + BLOCK] for start in range(0, len(among), BLOCK))
    named = (
        (-int(counts[number]), text, number)
        for block in blocks
        for number, text in zip(block.tolist(), captions.take(first[block]), strict=True)
    )
    most = heapq.nsmallest(CAPTIONS_SHOWN, named)
    kept = pc.equal(table["status"], KEPT).to_numpy()[rows]
    still = np.bincount(numbers[kept], minlength=len(counts))
    return [(text, -count, int(still[number])) for count, text, number in most]


def _unreadable(table: pa.Table) -> list[dict[str, Any]]:
    rows = np.flatnonzero(pc.equal(table["status"], UNREADABLE).to_numpy())[:UNREADABLE_SHOWN]
    return some_rows(table.select(["shard", "key", "reason"]), rows.tolist()).to_pylist()
