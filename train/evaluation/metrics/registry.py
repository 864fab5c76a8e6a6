"""Metrics by name: ours, and those of one's own as ``module:Class`` or by entry point."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from afresh import plugins
from afresh.errors import UsageError
from train.evaluation.config import Protocol
from train.evaluation.metrics.clip import Clip
from train.evaluation.metrics.detector import Detector
from train.evaluation.metrics.dual_encoder import DualEncoderJudge
from train.evaluation.metrics.imagenet import ImageNetJudge
from train.evaluation.metrics.inception import Inception
from train.evaluation.metrics.pixels import Pixels
from train.evaluation.metrics.protocol import Column, Metric, Reference
from train.evaluation.metrics.sscd import SSCD

METRICS: dict[str, Any] = {
    kind.name: kind for kind in (Detector, DualEncoderJudge, ImageNetJudge, SSCD, Pixels, Clip, Inception)
}
"""In the order of the table."""
TOLD_APART = (
    Column(
        "verbatim_share",
        "verbatim",
        "Share of images that the first judge of copies holds for copies, and that are copies by their pixels too.",
        "share",
        -1,
    ),
    Column(
        "template_share",
        "template",
        "Share of images that the first judge of copies holds for copies, though their pixels are others: the same "
        "thing in another place, pose or colour.",
        "share",
        -1,
    ),
)
FIRED = Column(
    "fired",
    "guided",
    "Images that guidance corrected at some step. What acts before the first step alone, on prompt or noise, is not "
    "counted.",
)
SECONDS = Column("seconds_per_image", "s / image", "Seconds per image on the machine that drew them.", "seconds", -1)
JUDGES = ("copied_share", "sscd_share", "imagenet_copied_share", "memorized_share")
"""Columns by which an image may be a copy; of those at hand the first is that of figures and sentences."""


def chosen(protocol: Protocol) -> tuple[dict[str, Any], dict[str, str]]:
    """The metrics that a protocol asks for, or else all.

    Returns:
        Those at hand, by name; and what the others lack.

    Raises:
        UsageError: a name is unknown; or nothing is left.
    """
    kinds, lacking = {}, {}
    for name in protocol.metrics or METRICS:
        kind = METRICS[name] if name in METRICS else plugins.find(plugins.METRICS, name, "metrics")
        if kind is None:
            raise UsageError(f"metrics: {name!r} is not known; choose of {plugins.choices(plugins.METRICS, METRICS)}")
        missing = [need for need in ("columns", "lacking", "measure") if not hasattr(kind, need)]
        if missing:
            needs = "train.evaluation.metrics.protocol.Metric"
            raise UsageError(f"metrics: {name!r} lacks {', '.join(missing)}: see {needs} for what it needs")
        if what := kind.lacking(protocol):
            lacking[name] = what
        else:
            kinds[name] = kind
    if not kinds:
        raise UsageError(f"nothing to measure with: {named(lacking)}")
    return kinds, lacking


def named(lacking: dict[str, str]) -> str:
    """What is not at hand, in one line."""
    return "; ".join(f"{name} ({what})" for name, what in lacking.items())


def make(kinds: dict[str, Any], reference: Reference) -> list[Metric]:
    """The metrics themselves: their weights are loaded, the reference images looked at."""
    return [kind(reference) for kind in kinds.values()]


def columns_of(kinds: Sequence[Any]) -> list[Column]:
    """Columns in the order of the table: copies, then the rest, how many were guided, and the time."""
    of_metrics = [column for kind in kinds for column in kind.columns]
    copies = [column for column in of_metrics if column.form == "share" and column.better < 0]
    rest = [column for column in of_metrics if column not in copies]
    return [*copies, *TOLD_APART, *rest, FIRED, SECONDS]
