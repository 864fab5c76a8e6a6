"""What was drawn in each setting, measured by every metric, one table row a setting.

    reference = Reference(training_images, held_out_images, captions, index=index, embedder=embedder)
    metrics = [Detector(reference), DualEncoderJudge(reference), Pixels(reference)]
    results = evaluate_images([Drawn("raw", "none", "repeated", images, captions)], metrics)
    rows = [result.row for result in results]

Every number has its interval beside it, ``KEY_low`` and ``KEY_high``: see :mod:`train.evaluation.judging.intervals`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from afresh.errors import UserError
from train.evaluation.judging.drawn import Drawn, Measured
from train.evaluation.judging.intervals import Values, interval, mean, resampled, share
from train.evaluation.metrics.detector import Detector
from train.evaluation.metrics.protocol import Metric
from train.evaluation.metrics.registry import FIRED, JUDGES, SECONDS, TOLD_APART, columns_of

RESAMPLES = 500


def evaluate_images(
    drawn: Sequence[Drawn], metrics: Sequence[Metric], *, resamples: int = RESAMPLES
) -> list[Measured]:
    """Measure every setting; all arguments are in memory, nothing is written.

    Args:
        drawn: what was drawn, one table row each.
        metrics: see :mod:`train.evaluation.metrics.protocol`.
        resamples: choices of prompts behind the intervals; 0 gives none.

    Returns:
        One :class:`~train.evaluation.judging.drawn.Measured` a setting, whose ``row`` holds ``model, guidance, prompts,
        images``, the index's ``embedder``, the metrics' columns, ``verbatim_share`` and ``template_share`` where both a
        judge of copies and pixels are among them, how many were ``fired`` at, ``seconds_per_image``, the intervals, and
        in ``same_as`` the first guidance that drew the very same images, if one did.

    Raises:
        UserError: a setting holds no image.
    """
    results = [_measured(one, metrics, resamples) for one in drawn]
    for i, (one, result) in enumerate(zip(drawn, results, strict=True)):
        if (twin := next((other for other in drawn[:i] if one.same_images(other)), None)) is not None:
            result.row["same_as"] = twin.guidance
    return results


def _measured(one: Drawn, metrics: Sequence[Metric], resamples: int) -> Measured:
    if not len(one.images) or len(one.images) != len(one.captions):
        raise UserError(
            f"{one.model}, guidance {one.guidance}, {one.prompts}: {len(one.images)} images for "
            f"{len(one.captions)} captions; nothing to evaluate"
        )
    found: dict[str, Values] = {}
    for metric in metrics:
        found |= metric.measure(one)
    found |= told_apart(found)
    found[SECONDS.key] = mean(np.broadcast_to(one.seconds_per_image, len(one.images)))
    everything = np.arange(len(one.images))
    choices = resampled(one.captions, resamples)
    row: dict[str, Any] = {"model": one.model, "guidance": one.guidance, "prompts": one.prompts}
    row["images"] = len(one.images)
    for metric in metrics:
        if isinstance(metric, Detector):
            row["embedder"] = Path(metric.index.embedder).name
    if one.fired is not None:
        row[FIRED.key] = one.fired
    keys = [column.key for column in columns_of(metrics) if column.key in found]
    row |= {key: found[key].statistic(everything) for key in keys}
    if resamples:
        for key in keys:
            row[f"{key}_low"], row[f"{key}_high"] = interval(found[key], one.captions, choices)
    return Measured(row, {key: value.images for key, value in found.items() if value.images is not None})


def told_apart(found: dict[str, Values]) -> dict[str, Values]:
    """Copies by the first judge, told apart by their pixels: verbatim, where these are the same too, and template."""
    judge = next((key for key in JUDGES if key in found), None)
    if judge is None or "pixel_copied_share" not in found:
        return {}
    copied, same = found[judge].images, found["pixel_copied_share"].images
    assert copied is not None and same is not None  # shares are made of images
    verbatim, template = (column.key for column in TOLD_APART)
    return {verbatim: share(copied & same), template: share(copied & ~same)}
