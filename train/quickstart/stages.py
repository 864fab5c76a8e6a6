"""The stages of the quickstart, in their order: each a function of the settings that leaves its files in ``out``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from afresh.files import write_atomic
from curate.dedup import run_dedup
from train.evaluation.config import EvaluateConfig
from train.evaluation.evaluate import run_evaluate
from train.evaluation.localize import run_localize
from train.finetune.config import FinetuneConfig
from train.finetune.loop import run_finetune
from train.memorization.config import DetectConfig
from train.memorization.detection.job import run_detect
from train.quickstart.config import QuickstartConfig
from train.quickstart.mess import make_mess
from train.sampling.config import SampleConfig
from train.sampling.job.job import run_sample


def plant(config: QuickstartConfig) -> dict[str, Any]:
    """``raw``: the fine-tuning part with planted copies; ``prompts``: repeated and held-out captions."""
    return make_mess(Path(config.out), config)


def curate(config: QuickstartConfig) -> dict[str, Any]:
    """``curated``: what ``curate dedup`` leaves of ``raw``."""
    out = Path(config.out)
    return run_dedup(dataclasses.replace(config.dedup, shards=[str(out / "raw")], out=str(out / "curated")))


def finetune_raw(config: QuickstartConfig) -> dict[str, Any]:
    """``finetune_raw``: the model trained on the raw set, without the filter."""
    out = Path(config.out)
    return _finetune(_unfiltered(config.finetune), config.model, shards=out / "raw", out=out / "finetune_raw")


def finetune_curated(config: QuickstartConfig) -> dict[str, Any]:
    """``finetune_curated``: the model trained on the curated set, without the filter."""
    out = Path(config.out)
    settings = _unfiltered(config.finetune)
    return _finetune(settings, config.model, shards=out / "curated" / "shards", out=out / "finetune_curated")


def finetune_filtered(config: QuickstartConfig) -> dict[str, Any]:
    """``finetune_filtered``: the model trained on the curated set, with the filter."""
    out = Path(config.out)
    return _finetune(config.finetune, config.model, shards=out / "curated" / "shards", out=out / "finetune_filtered")


def _unfiltered(settings: FinetuneConfig) -> FinetuneConfig:
    return dataclasses.replace(settings, filter=dataclasses.replace(settings.filter, policy="off"))


def _finetune(settings: FinetuneConfig, model: str, shards: Path, out: Path) -> dict[str, Any]:
    return run_finetune(dataclasses.replace(settings, model=model, shards=[str(shards)], out=str(out)))


def detect(config: QuickstartConfig) -> dict[str, Any]:
    """``detect``: the raw model's scores of the captions, judged by label and by what each caption draws."""
    out = Path(config.out)
    raw, prompts = str(out / "finetune_raw" / "model"), str(out / "prompts" / "detect_few.jsonl")
    drawn = str(out / "detect" / "drawn")
    # What each caption draws, to judge the scores by outcome too: as many images as the evaluation draws, since one
    # noise is too few to say that a caption draws no copy.
    run_sample(
        SampleConfig(
            model=raw,
            prompts=prompts,
            out=drawn,
            index=str(out / "curated"),
            seeds=config.seeds,
            steps=config.outcome_steps,
            scale=config.scale,
            batch_size=config.batch_size,
        )
    )
    return run_detect(
        DetectConfig(
            model=raw,
            prompts=prompts,
            out=str(out / "detect" / "scores.parquet"),
            outcomes=drawn,
            steps=config.detect_steps,
            seeds=config.detect_seeds,
            num_inference_steps=config.steps,
            scale=config.scale,
        )
    )


def localize(config: QuickstartConfig) -> dict[str, Any]:
    """``neurons.json``: the neurons of the raw model that each repeated caption's copy hangs on."""
    out = Path(config.out)
    settings = dataclasses.replace(
        config.localize,
        model=str(out / "finetune_raw" / "model"),
        prompts=str(out / "prompts" / "repeated.jsonl"),
        clean=str(out / "prompts" / "held_out.jsonl"),
        out=str(out / "neurons.json"),
        report=False,
    )
    return run_localize(settings)


def evaluate(config: QuickstartConfig) -> dict[str, Any]:
    """The table and the figure of all models, and of the raw one under guidance, over both kinds of captions."""
    protocol = {
        "models": {
            "raw": "finetune_raw/model",
            "blocked": "finetune_raw/model",
            "curated": "finetune_curated/model",
            "filtered": "finetune_filtered/model",
        },
        "settings": [
            {"model": "raw", "guidance": "none"},
            {"model": "raw", "guidance": "amg"},
            {"model": "blocked", "guidance": "none"},
            {"model": "curated", "guidance": "none"},
            {"model": "filtered", "guidance": "none"},
        ],
        "neurons": {"blocked": "neurons.json"},
        "prompts": {"repeated": "prompts/repeated.jsonl", "held_out": "prompts/held_out.jsonl"},
        "index": "curated",
        "training": ["raw"],
        "held_out": ["held_out"],
        "seeds": config.seeds,
        "steps": config.steps,
        "scale": config.scale,
        "columns": config.columns,
        "amg": dataclasses.asdict(config.amg),
    }
    out = Path(config.out)
    with write_atomic(out / "protocol.yaml") as temporary:
        temporary.write_text(yaml.safe_dump(protocol, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return run_evaluate(
        EvaluateConfig(protocol=str(out / "protocol.yaml"), out=str(out), batch_size=config.batch_size)
    )


STAGES: tuple[Callable[[QuickstartConfig], dict[str, Any]], ...] = (
    plant,
    curate,
    finetune_raw,
    finetune_curated,
    finetune_filtered,
    detect,
    localize,
    evaluate,
)
