"""The report of a curation: one HTML file that needs nothing else, to look at before trusting the numbers.

It is drawn from what ``curate dedup`` leaves: ``summary.json``, ``ledger.parquet`` and ``work/report.json``
(thumbnails, histogram, closest calls). Its size is bounded, whatever the size of the set.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curate.config import ReportConfig
from curate.console import UserError, write_atomic
from curate.ledger import DROP_REASONS, DROPPED, KEPT, UNREADABLE, read_ledger
from curate.place import Place

if TYPE_CHECKING:
    from numpy.typing import NDArray

PICTURES = "work/report.json"
GROUPS_SHOWN = 24
DROPPED_SHOWN = 7  # of one group: with the kept one, a line
CLOSE_CALLS_SHOWN = 12  # on each side of the threshold
CLOSE_CALLS_AMONG = 200  # on each side, at least, what those that are shown are drawn from
CLOSE = 0.01  # in large sets everything that is no farther from the threshold
CAPTIONS_SHOWN = 12
UNREADABLE_SHOWN = 200
THUMBNAIL_PIXELS = 112
BINS = 50
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
}
SHORT = {  # beside a similarity, in the gallery
    "exact_image": "identical",
    "near_image": "image",
    "near_pair": "image + caption",
    "near_caption": "caption",
    "caption_quota": "quota",
    "other_set": "other set",
    "excluded": "excluded",
}


@dataclass(frozen=True)
class Pictures:
    """What the report shows and neither summary nor ledger holds.

    Attributes:
        histogram: ``counts`` of similarities in BINS equal bins over [0, 1]; of how many ``images``.
        close_calls: (row, row, similarity) of random image pairs near the threshold, on both sides of it.
        thumbnails: encoded images by ledger row.
    """

    histogram: Mapping[str, Any]
    close_calls: Sequence[tuple[int, int, float]]
    thumbnails: Mapping[int, bytes]

    def save(self, out: Place) -> None:
        """Write ``work/report.json``."""
        thumbnails = {
            str(row): base64.b64encode(data).decode() for row, data in sorted(self.thumbnails.items())
        }
        calls = [[a, b, similarity] for a, b, similarity in self.close_calls]
        out.write_json(PICTURES, {"histogram": self.histogram, "close_calls": calls, "thumbnails": thumbnails})

    @classmethod
    def load(cls, out: Place) -> Pictures:
        """Read what ``save`` wrote. Raises ``UserError`` when it is missing or damaged."""
        try:
            stored = json.loads(out.read(PICTURES))
            return cls(
                histogram=stored["histogram"],
                close_calls=[(int(a), int(b), float(s)) for a, b, s in stored["close_calls"]],
                thumbnails={int(row): base64.b64decode(data) for row, data in stored["thumbnails"].items()},
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{out.at(PICTURES)}: missing or damaged; run `curate dedup` again, it continues there"
            ) from error


def run_report(config: ReportConfig) -> dict[str, Any]:
    """Write ``out/report.html`` again from what ``out`` holds.

    Raises:
        UsageError: ``out`` is a URL that cannot be opened.
        UserError: ``out`` is not a finished curation.
    """
    out = Place(config.out)
    summary = read_summary(config.out)
    html = render(summary, read_ledger(config.out, LEDGER_COLUMNS), Pictures.load(out))
    write_report(out, html)
    return {"report": out.at("report.html"), "bytes": len(html.encode())}


def write_report(out: Place, html: str) -> None:
    """Write ``report.html``, atomically."""
    with write_atomic(out.made_in / "report.html") as temporary:
        temporary.write_text(html, encoding="utf-8", newline="\n")
    out.deliver("report.html")


def read_summary(out: str | Path) -> dict[str, Any]:
    """``summary.json`` of a finished curation, in a folder or at a URL. Raises ``UserError`` when there is none."""
    place = Place(str(out))
    path = place.at("summary.json")
    try:
        return json.loads(place.read("summary.json"))
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file; is {out} a folder that `curate dedup` wrote to its end?"
        ) from None
    except ValueError as error:
        raise UserError(f"{path}: not a curation's summary: {error}") from error


# -------------------------------------------------------------------------------------------- what is shown


def gallery(table: pa.Table) -> list[list[int]]:
    """Ledger rows of the largest groups, largest first; in each the kept rows, then the dropped ones.

    Of the dropped rows those come first whose likeness is least sure: by similarity, exact copies last.
    """
    group = table["group"].fill_null(-1).to_numpy()
    size = table["group_size"].fill_null(0).to_numpy()
    numbers, first = np.unique(group, return_index=True)
    several = (numbers >= 0) & (size[first] > 1)
    numbers, sizes = numbers[several], size[first][several]
    shown = numbers[np.lexsort((numbers, -sizes))][:GROUPS_SHOWN]
    members = np.flatnonzero(np.isin(group, shown))

    kept, dropped, exact = (
        pc.equal(table[column], value).fill_null(False).to_numpy()[members]
        for column, value in (("status", KEPT), ("status", DROPPED), ("reason", "exact_image"))
    )
    similarity = table["image_similarity"].fill_null(1.0).to_numpy()[members]
    order = np.lexsort((members, similarity, exact, dropped))
    members, kept, dropped = members[order], kept[order], dropped[order]
    result = []
    for number in shown:
        inside = group[members] == number
        chosen = [members[inside & of_status][:DROPPED_SHOWN].tolist() for of_status in (kept, dropped)]
        result.append(chosen[0] + chosen[1])
    return result


def nearest_similarities(
    embeddings: NDArray[np.float16], sample: int, seed: int, block: int = 1 << 11
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """Nearest other row of a random sample of rows, by exact search.

    Args:
        embeddings: [n, dim] unit rows, n ≥ 2.
        sample: how many rows to ask for (all, when there are fewer).
        seed: of the choice.
        block: rows compared at a time.

    Returns:
        Rows asked for (sorted), nearest row of each, cosine similarity (float32); each [min(sample, n)].
    """
    count = len(embeddings)
    asked = np.sort(np.random.default_rng(seed).choice(count, min(sample, count), replace=False))
    queries = embeddings[asked].astype(np.float32)
    best = np.full(len(asked), -np.inf, dtype=np.float32)
    nearest = np.zeros(len(asked), dtype=np.int64)
    for start in range(0, count, block):
        similarity = queries @ embeddings[start : start + block].astype(np.float32).T
        inside = (asked >= start) & (asked < start + similarity.shape[1])
        similarity[inside, asked[inside] - start] = -np.inf
        column = similarity.argmax(axis=1)
        value = similarity[np.arange(len(asked)), column]
        better = value > best
        best[better], nearest[better] = value[better], column[better] + start
    return asked, nearest, best


def histogram(similarities: NDArray[np.float32]) -> dict[str, Any]:
    """Counts of similarities in BINS equal bins over [0, 1]; what lies outside counts in the end bins."""
    counts, _ = np.histogram(np.clip(similarities, 0.0, 1.0), bins=BINS, range=(0.0, 1.0))
    return {"counts": counts.tolist(), "images": len(similarities)}


def close_calls(
    rows: NDArray[np.int64],
    others: NDArray[np.int64],
    similarities: NDArray[np.float32],
    threshold: float,
    seed: int = 0,
) -> list[tuple[int, int, float]]:
    """Random pairs just below and just above the threshold, up to CLOSE_CALLS_SHOWN each, by similarity.

    Of each side those within CLOSE of the threshold are drawn from, and at least the CLOSE_CALLS_AMONG nearest to it:
    what is seen is what a small change of the threshold would move.

    Args:
        rows, others, similarities: pairs around the threshold, each ``[m]``.
        threshold: at or above it pairs are near.
        seed: of the choice.
    """
    low, high = np.minimum(rows, others), np.maximum(rows, others)
    order = np.lexsort((high, low, similarities))
    low, high, similarities = low[order], high[order], similarities[order]
    fresh = np.ones(len(low), bool)  # a pair may be given from both its sides
    fresh[1:] = (low[1:] != low[:-1]) | (high[1:] != high[:-1])
    low, high, similarities = low[fresh], high[fresh], similarities[fresh]
    around = np.array([threshold - CLOSE, threshold, threshold + CLOSE], np.float32)
    start, cut, stop = (int(place) for place in np.searchsorted(similarities, around))
    rng, shown = np.random.default_rng(seed), list[tuple[int, int, float]]()
    for first, last in (
        (max(0, min(start, cut - CLOSE_CALLS_AMONG)), cut),
        (cut, min(len(low), max(stop, cut + CLOSE_CALLS_AMONG))),
    ):
        places = first + np.sort(rng.choice(last - first, min(CLOSE_CALLS_SHOWN, last - first), replace=False))
        shown += zip(low[places].tolist(), high[places].tolist(), similarities[places].tolist(), strict=True)
    return shown


def thumbnail(data: bytes, *, max_pixels: int = 64_000_000) -> bytes:
    """A small WebP of an encoded image. Raises :class:`curate.images.ImageError`."""
    import io

    from PIL import Image

    from curate.images import decode_image

    image = decode_image(data, max_pixels=max_pixels)
    image.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=80, method=4)
    return buffer.getvalue()


# --------------------------------------------------------------------------------------------------- drawing


def render(summary: Mapping[str, Any], table: pa.Table, pictures: Pictures) -> str:
    """The report as HTML: the same arguments give the same text; every caption and name is escaped."""
    groups = gallery(table)
    wanted = {row for rows in groups for row in rows}
    wanted.update(row for a, b, _ in pictures.close_calls for row in (a, b))
    # Not by `take`, which puts the pieces of a column together and fails where they are text of more than 2 GiB.
    taken = table.select(LEDGER_COLUMNS).filter(np.isin(np.arange(table.num_rows), list(wanted)))
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

    source = Path(__file__).parent / "assets" / "report.html.jinja"
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["count"] = lambda number: f"{number:,}"
    environment.filters["clip"] = lambda text, length: (
        text if len(text) <= length else text[: length - 1] + "…"
    )
    return environment.from_string(source.read_text(encoding="utf-8"))


def _clip(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


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
    most = max([1, *summary["reasons"].values()])
    return [
        {
            "name": name,
            "label": REASONS[name][0],
            "means": REASONS[name][1],
            "count": count,
            "width": 100.0 * count / most,
        }
        for name in DROP_REASONS
        if (count := summary["reasons"].get(name, 0))
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
    """The curve of kept samples over thresholds in a 600 × 330 drawing, and the table behind it."""
    if len(sweep) < 2:
        return None
    thresholds, kept = [row["threshold"] for row in sweep], [row["kept"] for row in sweep]
    low, high = min(kept), max(kept)
    scale = (thresholds[-1] - thresholds[0]), max(high - low, 1)
    points = [
        {
            "x": round(600 * (row["threshold"] - thresholds[0]) / scale[0], 2),
            "y": round(320 - 310 * (row["kept"] - low) / scale[1], 2),
            "chosen": row["threshold"] == threshold,
            "label": f"{row['threshold']:.3g}",
            "title": f"{row['threshold']:.3g}: {row['kept']:,} kept, {row['dropped']:,} dropped, "
            f"{row['groups']:,} groups",
        }
        for row in sweep
    ]
    return {"points": points, "line": " ".join(f"{p['x']},{p['y']}" for p in points), "low": low, "high": high}


def _repeated_captions(table: pa.Table) -> list[tuple[str, int, int]]:
    """Captions that most samples share, with how many samples had them and how many still do."""
    readable = table.filter(pc.not_equal(table["status"], UNREADABLE)).select(["caption", "status"])
    captions = readable["caption"].fill_null("").cast(pa.large_string())  # all of them may be more than 2 GiB
    counts = captions.value_counts()
    values, numbers = counts.field("values"), counts.field("counts").to_numpy()
    largest = np.sort(numbers[numbers > 1])[-CAPTIONS_SHOWN:]
    if not len(largest):
        return []
    most = counts.filter(pa.array(numbers >= largest[0])).to_pylist()
    most = sorted(most, key=lambda row: (-row["counts"], row["values"]))[:CAPTIONS_SHOWN]
    kept = captions.filter(pc.equal(readable["status"], KEPT))
    shown = pa.array([row["values"] for row in most], values.type)
    still = {row["values"]: row["counts"] for row in kept.filter(pc.is_in(kept, shown)).value_counts().to_pylist()}
    return [(row["values"], row["counts"], still.get(row["values"], 0)) for row in most]


def _unreadable(table: pa.Table) -> list[dict[str, Any]]:
    broken = table.select(["shard", "key", "reason"]).filter(pc.equal(table["status"], UNREADABLE))
    return broken.slice(0, UNREADABLE_SHOWN).to_pylist()
