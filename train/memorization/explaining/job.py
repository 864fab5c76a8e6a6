"""``train explain``: explain, try changes, write the page."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from afresh.files import write_atomic, write_json
from afresh.progress import get_logger, progress
from train.denoising.families.registry import denoiser_of
from train.denoising.opening.loading import open_pipeline
from train.memorization.checks import prompts_to_explain
from train.memorization.config import ExplainConfig
from train.memorization.explaining.changes import suggest
from train.memorization.explaining.explanation import Explanation
from train.memorization.explaining.significance import explain
from train.memorization.signals.magnitude import Form
from train.memorization.thresholds import Thresholds, model_thresholds


class ExplainSummary(dict[str, Any]):
    """The job's summary; on a terminal it is shown as bars."""

    def view(self, *, colour: bool = False) -> str:
        """See :func:`train.memorization.explaining.page.terminal_view`."""
        from train.memorization.explaining.page import terminal_view

        parts = [terminal_view(row, colour=colour) for row in self["explanations"]]
        if len(parts) > 1 and "left_without_most" in self:
            most, least = (100 * self[key] for key in ("left_without_most", "left_without_least"))
            parts.append(
                f"{len(parts)} prompts: {most:.0f} % of the magnitude is left without the most significant word, "
                f"{least:.0f} % without the least significant one"
            )
        return "\n\n".join(parts)


def run_explain(config: ExplainConfig) -> ExplainSummary:
    """The job behind ``train explain``: explain, try changes, write the page.

    Returns:
        ``explanations``, one a prompt (:meth:`~train.memorization.explaining.explanation.Explanation.as_json`), each
        with its ``changes`` and whether it is ``memorized`` (:func:`judged`); the mean share of the magnitude that is
        left without the most and without the least significant word, in ``left_without_most`` and
        ``left_without_least`` (over the prompts that have both); the settings.

    Raises:
        UserError: the prompts or the model cannot be used.
    """
    from train.memorization.explaining.page import render

    prompts = prompts_to_explain(config)
    first = [config.first_seed if prompt.seed is None else prompt.seed for prompt in prompts]
    seeds = np.array(first)[:, None] + np.arange(config.seeds)
    pipe = open_pipeline(config)
    trajectory: dict[str, Any] = {
        "num_inference_steps": config.num_inference_steps,
        "guidance_scale": config.scale,
        "form": config.form,
        "batch_size": config.batch_size,
    }
    start = time.perf_counter()
    rows = []
    with progress(total=seeds.size, desc="explain", unit="trajectories") as bar:
        explanations = explain(
            pipe,
            [prompt.caption for prompt in prompts],
            steps=config.steps,
            seeds=seeds,
            gradient_checkpointing=config.gradient_checkpointing,
            bar=bar,
            **trajectory,
        )
    options: dict[str, Any] = {"words": config.words, "replacements": config.replacements, "instead": config.instead}
    denoiser, thresholds = denoiser_of(pipe), model_thresholds(config.model)
    for explanation in progress(explanations, desc="changes", unit="prompts"):
        changes = suggest(pipe, explanation, **options, **trajectory)
        verdict = judged(explanation, thresholds, config.form, math.prod(denoiser.shape), denoiser.schedule.timesteps)
        rows.append(explanation.as_json() | verdict | {"changes": [vars(change) for change in changes]})
    summary = ExplainSummary(
        explanations=rows,
        **_left(rows),
        steps=config.steps,
        num_inference_steps=config.num_inference_steps,
        seeds=config.seeds,
        scale=config.scale,
        form=config.form,
        model=config.model,
        seconds_per_prompt=(time.perf_counter() - start) / len(prompts),
    )
    if config.out:
        out = Path(config.out)
        with write_atomic(out) as temporary:
            temporary.write_text(render(summary), encoding="utf-8")
        write_json(out.with_suffix(".json"), summary)
        get_logger(__name__).info(f"wrote {out}")
    return summary


def judged(
    explanation: Explanation, thresholds: Thresholds | None, form: Form, elements: int, timesteps: int
) -> dict[str, Any]:
    """Whether a prompt is memorized, by the model's calibrated threshold at the first step.

    Returns:
        ``memorized``, None where no threshold holds; ``first_magnitude``, averaged over the seeds, and the
        ``first_threshold`` that it is compared with, in the explanation's form.
    """
    t, m = float(explanation.timesteps[0]), float(explanation.magnitudes[:, 0].mean())
    limit, reached = None, None
    if thresholds is not None and not thresholds.unlike("", elements):
        reached = thresholds.reached(m, form, t, elements, timesteps)
        limit = thresholds.at(t, timesteps)
    if limit is not None and thresholds is not None and thresholds.form != form:
        limit *= elements ** (0.5 if form == "l2" else -0.5)
    return {"memorized": reached, "first_magnitude": m, "first_threshold": limit}


def _left(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Mean shares of the magnitude that are left without the most and without the least significant word."""
    most, least = [], []
    for row in rows:
        removed = [change for change in row["changes"] if change["kind"] == "removed"]
        control = [change for change in row["changes"] if change["kind"] == "control"]
        if removed and control and row["magnitude"] > 0:
            most.append(removed[0]["magnitude"] / row["magnitude"])
            least.append(control[0]["magnitude"] / row["magnitude"])
    return {"left_without_most": float(np.mean(most)), "left_without_least": float(np.mean(least))} if most else {}

