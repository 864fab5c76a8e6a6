"""``out/report.html``: how a run went, on one page, at each checkpoint and at its end."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from afresh.errors import UserError, reason
from afresh.pages import facts, line_chart, picture, read_lines, write_page
from afresh.progress import get_logger
from curate.reading.images import ImageError, decode_image
from train.finetune.config import FinetuneConfig
from train.finetune.data.images import ImageReader, SampleError
from train.finetune.data.scan import ShardSet
from train.finetune.filter.table import VerdictTable

TEMPLATE = Path(__file__).with_name("run.html.jinja")
MOST, ROUNDS, POINTS = 12, 6, 600
"""Samples listed, rounds of validation images and points of a curve on a page: it stays small in a long run."""
log = get_logger(__name__)


def write_report(
    config: FinetuneConfig, shard_set: ShardSet, table: VerdictTable, step: int, summary: Mapping[str, Any] | None
) -> None:
    """Write the page from what lies in the run's folder; a run goes on where it cannot be written.

    Args:
        config: of the run.
        shard_set: its samples.
        table: what the filter did to them.
        step: optimizer steps made.
        summary: of a finished run.
    """
    out = Path(config.out)
    try:
        lines = read_lines(out / "log.jsonl")
        totals = table.totals()
        known = {
            "samples_seen": int(table.seen.sum()),
            **(totals if config.filter.policy != "off" else {}),
            "skipped_steps": lines[-1]["skipped_steps"] if lines else 0,
            "loss": lines[-1]["loss"] if lines else None,
            "learning_rate": lines[-1]["learning_rate"] if lines else None,
        }
        visits = [(line["step"], line["dropped"], line["kept"]) for line in lines]
        write_page(
            out / "report.html",
            TEMPLATE,
            name=out.name,
            steps=step,
            planned=config.steps,
            finished=summary is not None,
            facts=facts(known | dict(summary or {})),
            loss=line_chart(thinned([(line["step"], line["loss"]) for line in lines]), "loss by step"),
            filtered=config.filter.policy != "off",
            dropped=line_chart(
                thinned([(at, dropped / max(dropped + kept, 1)) for at, dropped, kept in visits]),
                "share of a step's samples that was left out",
            ),
            bad=[(line["step"], ", ".join(line["not_finite"][:8])) for line in lines if "not_finite" in line][-20:],
            validation=validation_rounds(out / "validation"),
            most=most_dropped(shard_set, table),
        )
    except (OSError, UserError) as error:
        log.warning("%s: the page could not be written: %s", out / "report.html", reason(error))


def thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most ``POINTS`` of them: the means of neighbours."""
    size = -(-len(points) // POINTS) or 1
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]


def validation_rounds(folder: Path) -> list[dict[str, Any]]:
    """``step``, ``prompts`` and ``images`` of the latest rounds, the newest first."""
    rounds = []
    for one in sorted(folder.glob("step-*"), reverse=True)[:ROUNDS]:
        prompts, images = [], []
        for path in sorted(one.glob("*.png")):
            with Image.open(path) as image:
                images.append(picture(image))
                prompts.append(str(image.info.get("prompt", "")))
        if images:
            rounds.append({"step": int(one.name.removeprefix("step-")), "prompts": prompts, "images": images})
    return rounds


def most_dropped(shard_set: ShardSet, table: VerdictTable) -> list[dict[str, Any]]:
    """The samples that were left out most often: ``sample``, ``caption``, ``image``, ``dropped``, ``seen`` and the mean
    ``magnitude``; without an image where it cannot be read.
    """
    found = []
    reader = ImageReader(shard_set)
    for row, dropped, magnitude in table.most_dropped(MOST):
        image = None
        try:
            if shard_set.value(row, "offset") >= 0:  # a compressed shard would have to be read whole
                image = picture(decode_image(reader.read(row)), largest=96)
        except (SampleError, ImageError, UserError) as error:
            log.info("%s: no picture for the page: %s", "/".join(shard_set.identity(row)), reason(error))
        found.append(
            {
                "sample": "/".join(shard_set.identity(row)),
                "caption": shard_set.captions(row)[0],
                "image": image,
                "dropped": dropped,
                "seen": int(table.seen[row]),
                "magnitude": magnitude,
            }
        )
    return found
