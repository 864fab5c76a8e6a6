"""What the numbers of an evaluation say, in sentences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from train.evaluation.reporting.figure import percent


def name_of(model: str, guidance: str) -> str:
    """How a setting is called in the report: ``raw model with AMG``."""
    model = MODELS.get(model, f"model {model}" if len(model) < 3 else model)
    guidance = GUIDANCES.get(guidance, guidance)
    return f"{model} with {guidance}" if guidance else model


def headline(rows: Sequence[Mapping[str, Any]]) -> str:
    """The shares of copies of the first kind of prompts, in one sentence."""
    kind = rows[0]["prompts"]
    shares = [
        f"{name_of(row['model'], row['guidance'])} {percent(row['copied_share'])}"
        for row in rows
        if row["prompts"] == kind
    ]
    return (
        f"Copies of training images among what is drawn for {PROMPTS.get(kind, kind)}, "
        f"by a judge that nothing optimises: {', '.join(shares)}."
    )


def conclude(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the numbers say, in sentences; the first setting is what the others are compared with."""
    sentences = []
    kinds = list(dict.fromkeys(row["prompts"] for row in rows))
    for kind in kinds:
        first, *others = [row for row in rows if row["prompts"] == kind]
        words, base = PROMPTS.get(kind, kind), name_of(first["model"], first["guidance"])
        if kind == "held_out":
            for row in others:
                alignment = _compared("alignment", first["alignment"], row["alignment"], 1)
                quality = _compared("Fréchet distance", first["quality"], row["quality"], -1)
                sentences.append(
                    f"On {words}, never trained on, the {name_of(row['model'], row['guidance'])} has "
                    f"{alignment} and {quality}, compared with the {base}."
                )
            continue
        sentences.append(
            f"For {words}, {percent(first['copied_share'])} of what the {base} draws are copies of training "
            f"images by the independent judge, and {percent(first['memorized_share'])} by the copy detector."
        )
        for row in others:
            name, alignment = name_of(row["model"], row["guidance"]), row["alignment"]
            sentences.append(
                f"The {name} copies {percent(row['copied_share'])} by the judge and "
                f"{percent(row['memorized_share'])} by the copy detector; "
                f"{_compared('alignment', first['alignment'], alignment, 1)}."
            )
    return sentences


def _compared(name: str, before: float, after: float, better: int) -> str:
    if not (math.isfinite(before) and math.isfinite(after)) or before == 0:
        return f"{name} {number(after)}"
    change = (after - before) / abs(before)
    if abs(change) < 0.005:
        return f"the same {name} ({number(after)})"
    verdict = "better" if change * better > 0 else "worse"
    return f"{100 * abs(change):.0f} % {verdict} {name} ({number(after)} against {number(before)})"


def number(value: float) -> str:
    """Three significant digits."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


MODELS = {"raw": "raw model", "curated": "curated and filtered model"}


GUIDANCES = {"none": "", "amg": "AMG", "amg-strong": "strong AMG"}


PROMPTS = {"repeated": "repeated captions", "held_out": "held-out captions"}
