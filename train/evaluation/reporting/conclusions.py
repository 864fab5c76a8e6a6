"""What the numbers of an evaluation say, in sentences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from train.evaluation.reporting.figure import percent

Row = Mapping[str, Any]
JUDGES = {
    "copied_share": "the judge",
    "sscd_share": "SSCD",
    "imagenet_copied_share": "the ImageNet judge",
    "memorized_share": "the copy detector",
    "pixel_copied_share": "pixels",
}
"""Columns of copies, and who speaks in them; the first that is at hand leads."""
ALIGNMENT = {"alignment": ("alignment", 1), "clip_score": ("CLIP score", 1)}
QUALITY = {"quality": ("Fréchet distance", -1), "fid": ("FID", -1), "imagenet_distance": ("Fréchet distance", -1)}


def judges_of(rows: Sequence[Row]) -> dict[str, str]:
    """:data:`JUDGES`, where the index is not the carried copy detector's with its embedder's name."""
    embedder = rows[0].get("embedder", "copy-detector")
    own = {} if embedder == "copy-detector" else {"memorized_share": f"{embedder}, the index’s embedder"}
    return JUDGES | own


def name_of(model: str, guidance: str) -> str:
    """How a setting is called in the report: ``raw model with AMG``."""
    model = MODELS.get(model, f"model {model}" if len(model) < 3 else model)
    guidance = GUIDANCES.get(guidance, guidance)
    return f"{model} with {guidance}" if guidance else model


def headline(rows: Sequence[Row]) -> str:
    """The shares of copies of the first kind of prompts, in one sentence; empty where no judge looked for any."""
    group = [row for row in rows if row["prompts"] == rows[0]["prompts"]]
    judges = [(key, words) for key, words in judges_of(rows).items() if key in rows[0]]
    if not judges:
        return ""
    (key, words), *_ = judges
    shares = [f"{name_of(row['model'], row['guidance'])} {percent(row[key])}" for row in group]
    kind = PROMPTS.get(rows[0]["prompts"], rows[0]["prompts"])
    return f"Copies of training images among what is drawn for {kind}, by {words}: {', '.join(shares)}."


def conclude(rows: Sequence[Row]) -> list[str]:
    """What the numbers say, in sentences; the first setting is what the others are compared with."""
    sentences, judges = [], judges_of(rows) if rows else {}
    for kind in dict.fromkeys(row["prompts"] for row in rows):
        first, *others = [row for row in rows if row["prompts"] == kind]
        words, base = PROMPTS.get(kind, kind), name_of(first["model"], first["guidance"])
        for row in others:
            if (twin := row.get("same_as")) is not None:
                sentences.append(
                    f"For {words}, the {name_of(row['model'], row['guidance'])} draws the very images of the "
                    f"{name_of(row['model'], twin)}: guidance changed none of {row['images']}."
                )
        others = [row for row in others if row.get("same_as") is None]
        if kind == "held_out":
            for row in others:
                if compared := _compared(first, row, ALIGNMENT) + _compared(first, row, QUALITY):
                    sentences.append(
                        f"On {words}, never trained on, the {name_of(row['model'], row['guidance'])} has "
                        f"{' and '.join(compared)}, compared with the {base}."
                    )
            continue
        shares = [f"{percent(first[key])}|{judge}" for key, judge in judges.items() if key in first]
        if not shares:
            continue
        (share, judge), *more = [one.split("|") for one in shares]
        sentences.append(
            f"For {words}, {share} of what the {base} draws are copies of training images by {judge}"
            + "".join(f", and {share} by {judge}" for share, judge in more)
            + "."
        )
        for row in others:
            copies = [f"{percent(row[key])} by {judge}" for key, judge in judges.items() if key in row]
            said = f"The {name_of(row['model'], row['guidance'])} copies {' and '.join(copies)}"
            sentences.append("; ".join([said, *_compared(first, row, ALIGNMENT)]) + ".")
    return sentences


def _compared(first: Row, row: Row, columns: Mapping[str, tuple[str, int]]) -> list[str]:
    """How the first of the columns that both rows have changes, in words; none where they have none."""
    key = next((key for key in columns if first.get(key) is not None and row.get(key) is not None), None)
    if key is None:
        return []
    (name, better), before, after = columns[key], first[key], row[key]
    if not (math.isfinite(before) and math.isfinite(after)) or before == 0:
        return [f"{name} {number(after)}"]
    change = (after - before) / abs(before)
    if abs(change) < 0.005:
        return [f"the same {name} ({number(after)})"]
    verdict = "better" if change * better > 0 else "worse"
    said = f"{100 * abs(change):.0f} % {verdict} {name} ({number(after)} against {number(before)})"
    ends: list[Any] = [row.get(f"{key}{end}") for row in (first, row) for end in ("_low", "_high")]
    if all(end is not None and math.isfinite(end) for end in ends) and ends[0] <= ends[3] and ends[2] <= ends[1]:
        said += ", within the intervals"
    return [said]


def number(value: float) -> str:
    """Three significant digits."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


MODELS = {
    "raw": "raw model",
    "blocked": "raw model, neurons blocked",
    "curated": "curated model",
    "filtered": "curated and filtered model",
}


GUIDANCES = {
    "none": "",
    "amg": "AMG",
    "amg-released": "released AMG",
    "amg-paper": "AMG of the paper",
    "amg-strong": "strong AMG",
    "amg-early": "early AMG",
}


PROMPTS = {"repeated": "repeated captions", "held_out": "held-out captions"}
