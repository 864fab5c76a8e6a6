"""The detection job: score a file of prompts, and say how well the scores tell labels and outcomes apart."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from afresh.errors import UsageError, UserError
from afresh.files import digest, files_in, read_json, write_json
from afresh.progress import get_logger, progress
from train.denoising.opening.loading import chosen_device, open_pipeline
from train.denoising.schedules import NoiseSchedule
from train.memorization.checks import check_detect, is_curation
from train.memorization.config import DetectConfig
from train.memorization.detection.charts import draw_chart, draw_trajectories
from train.memorization.detection.journal import open_journal, write_table
from train.memorization.detection.page import write_scores_page
from train.memorization.detection.separation import labels_of, read_outcomes, summarise
from train.memorization.scoring import Scores, Scoring
from train.memorization.signals.registry import find_signals, identities
from train.memorization.thresholds import FILE, calibrate, compared_space
from train.prompts import Prompt, read_prompts

SCORING = (
    "model", "revision", "variant", "model_config", "lora", "steps", "num_inference_steps", "seeds", "first_seed",
    "scale", "negative_prompt", "signals", "form", "batch_size", "dtype",
)  # fmt: skip
"""The settings that scores depend on."""


def run_detect(config: DetectConfig) -> dict[str, Any]:
    """The job behind ``train detect``: read prompts, score, write the table, summary and charts.

    Scores stand in ``.rows.jsonl`` beside it as they come. A run that is killed goes on there with the same command,
    and ends with the same table.

    Returns: The summary; with labels of both kinds it holds ``auc`` and ``tpr_at_1pct_fpr`` (strict) of each
        signal, with bootstrap intervals.

    Raises:
        UserError: the prompts or the model cannot be used, or what a killed run left belongs to other settings.
    """
    out = Path(config.out)
    check_detect(config)
    find_signals(config.signals, config.form, config.seeds)
    prompts = gather_prompts(config)
    if config.calibrate:
        clean_prompts(prompts)  # so that a file without any is refused at once
    outcomes = read_outcomes(config.outcomes, prompts) if config.outcomes else None
    first = [config.first_seed if prompt.seed is None else prompt.seed for prompt in prompts]
    settings = {name: getattr(config, name) for name in SCORING} | {
        "device": chosen_device(config.device),
        "model files": digest(list_files(config.model)),
        **({"signals of one's own": own} if (own := identities(config.signals)) else {}),
        "prompts": digest([(prompt.caption, seed) for prompt, seed in zip(prompts, first, strict=True)]),
    }

    with open_journal(out.with_suffix(".rows.jsonl"), settings, len(prompts)) as journal:
        pipe = open_pipeline(config)
        scoring = Scoring(
            pipe,
            [prompt.caption for prompt in prompts],
            steps=config.steps,
            num_inference_steps=config.num_inference_steps,
            seeds=np.array(first)[:, None] + np.arange(config.seeds),
            guidance_scale=config.scale,
            negative_prompt=config.negative_prompt,
            signals=config.signals,
            form=config.form,
            batch_size=config.batch_size,
        )
        journal.cut(scoring.group)
        before = len(journal.done)
        if before:
            get_logger(__name__).info(f"{journal.path}: {before} of {len(prompts)} prompts are scored already")
        start = time.perf_counter()
        with progress(total=len(prompts) - before, desc="detect", unit="prompts") as bar:
            for group in scoring.groups(start=before):
                journal.add(group)
                bar.update(len(group))
        seconds = time.perf_counter() - start
        scores = Scores.of(journal.done, scoring.timesteps, scoring.shared_evaluations)
        write_table(out, prompts, scores, outcomes)

    calibrated: dict[str, Any] = {}
    if config.calibrate:
        denoiser = scoring.denoiser
        calibrated = write_thresholds(config, prompts, scores, denoiser.schedule, math.prod(denoiser.shape))
    known = {"magnitude": calibrated["threshold"]} if calibrated else score_threshold(config)
    summary = summarise(prompts, scores, outcomes, bootstrap=config.bootstrap, known=known)
    summary |= {
        "out": config.out,
        "form": config.form,
        "scale": config.scale,
        "num_inference_steps": config.num_inference_steps,
        "seconds_per_prompt": seconds / max(1, len(prompts) - before),
    }
    if calibrated:
        summary["calibrated"] = calibrated
    summary |= draw_charts(out, prompts, scores, config.seeds, judged="auc" in summary)
    summary["page"] = str(out.with_suffix(".html"))
    write_scores_page(out.with_suffix(".html"), config.model, prompts, scores, summary)
    write_json(out.with_suffix(".json"), summary)
    get_logger(__name__).info(f"wrote {out}")
    return summary


def draw_charts(
    out: Path, prompts: Sequence[Prompt], scores: Scores, seeds: int, *, judged: bool
) -> dict[str, str]:
    """Charts beside the table: scores of both labels where there are both, and signals along the trajectory.

    Args:
        out: of the table; the charts have its name.
        prompts: with their labels.
        scores: of the prompts.
        seeds: of each prompt.
        judged: whether there are labels of both kinds.

    Returns: The files, by their name in the summary.
    """
    labels = labels_of(prompts)
    steps = len(scores.timesteps)
    drawn = {}
    if judged:
        chart = out.with_suffix(".png")
        looked_at = f"{steps} step{'s' * (steps > 1)}" if steps else "pure noise"
        note = f", {looked_at}, {seeds} seed{'s' * (seeds > 1)}"
        draw_chart(chart, labels, scores.of_prompt, note)
        drawn["chart"] = str(chart)
    curves = {name: seen.mean(axis=1) for name, seen in scores.observed.items() if seen.shape[2] == steps > 1}
    curves.pop("anisotropy", None)  # its two observations are no trajectory
    if curves:
        chart = out.with_suffix(".trajectories.png")
        draw_trajectories(chart, labels, scores.timesteps.tolist(), curves)
        drawn["trajectories"] = str(chart)
    return drawn


def gather_prompts(config: DetectConfig) -> list[Prompt]:
    """The prompts of a file or of a curation's output, and those of ``negatives``.

    Raises:
        UserError: a file or an index cannot be used.
    """
    if is_curation(config.prompts):
        prompts = repeated_captions(config.prompts, config.limit)
    else:
        prompts = read_prompts(config.prompts)
    if config.negatives:
        prompts = [dataclasses.replace(one, label=1 if one.label is None else one.label) for one in prompts]
        prompts += [dataclasses.replace(one, label=0) for one in read_prompts(config.negatives)]
    return prompts


def list_files(model: str) -> list[tuple[str, int, int]]:
    """Name, size and time of a local model's files: so that rows of another model under its name are not taken over."""
    path = Path(model)
    files = [path] if path.is_file() else files_in(path, "**/*.safetensors") if path.is_dir() else []
    return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def clean_prompts(prompts: Sequence[Prompt]) -> list[int]:
    """The prompts that are known not to be memorized: those of label 0, or all where none has a label.

    Raises:
        UserError: there are none.
    """
    labels = [prompt.label for prompt in prompts]
    clean = [row for row, label in enumerate(labels) if label == 0 or set(labels) == {None}]
    if not clean:
        raise UserError("calibrate needs prompts known not to be memorized: none has label 0")
    return clean


def write_thresholds(
    config: DetectConfig, prompts: Sequence[Prompt], scores: Scores, schedule: NoiseSchedule, elements: int
) -> dict[str, Any]:
    """Find the thresholds of ``config.calibrate``, write them with the model, and return them and their file."""
    clean = clean_prompts(prompts)
    found: dict[str, Any] = {"form": config.form, "false_positive_rate": config.calibrate, "prompts": len(clean)}
    found |= calibrate(scores.magnitudes[clean], scores.timesteps, config.calibrate, schedule.timesteps)
    found |= {name: getattr(config, name) for name in ("steps", "num_inference_steps", "seeds", "scale")}
    found |= {"against": config.negative_prompt, "elements": elements, "space": compared_space(schedule.space)}
    folder = Path(config.model)
    path = folder / FILE if folder.is_dir() else Path(config.out).with_suffix(f".{FILE}")
    write_json(path, found)
    return {"threshold": found["threshold"], "file": str(path)}


def score_threshold(config: DetectConfig) -> dict[str, float]:
    """The model's calibrated threshold of the detection score, by ``magnitude``; none where it was found otherwise."""
    path = Path(config.model) / FILE
    found = read_json(path) if path.is_file() else {}
    same = ("form", "steps", "num_inference_steps", "seeds", "scale")
    if found.get("against", "") != config.negative_prompt or any(found.get(n) != getattr(config, n) for n in same):
        return {}
    return {"magnitude": float(found["threshold"])} if "threshold" in found else {}


def repeated_captions(path: str, limit: int) -> list[Prompt]:
    """The captions that occur most often in a training set, the most frequent first, ties in the set's order.

    Captions are counted as normalised texts, kept and dropped samples alike; each is given as it first stands there.

    Args:
        path: output folder of ``curate dedup``, its index, or the URL of one.
        limit: most captions.

    Raises:
        UsageError: ``limit`` is not positive, or the URL cannot be opened.
        UserError: there is no index, or no caption in it.
    """
    from curate.index.training_index import TrainingIndex
    from curate.reading.captions import normalise_caption

    if limit < 1:
        raise UsageError(f"limit is {limit}: expected at least 1")
    index = TrainingIndex.load(path)
    first: dict[str, tuple[int, str]] = {}
    for caption, count in zip(index.captions, index.counts.tolist(), strict=True):
        if caption is not None and caption.strip():
            first.setdefault(normalise_caption(caption), (count, caption.strip()))
    if not first:
        raise UserError(f"{path}: no sample of this index has a caption")
    ranked = sorted(first.values(), key=lambda entry: -entry[0])
    return [Prompt(caption) for _, caption in ranked[:limit]]
