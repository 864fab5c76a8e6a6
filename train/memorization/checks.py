"""What can be seen to be wrong with a job's settings and files before torch or a model is loaded."""

from __future__ import annotations

from pathlib import Path

from afresh.errors import UsageError
from curate.index.training_index import check_index
from train.denoising.opening.files import check_openable
from train.memorization.config import DetectConfig, ExplainConfig
from train.prompts import Prompt, read_prompts


def check_detect(config: DetectConfig) -> None:
    """Check ``train detect``: its options, the prompts, the model's files.

    Raises:
        UserError: a setting is out of its range, or a file is missing or malformed.
    """
    if Path(config.out).suffix != ".parquet":
        raise UsageError(f"out is {config.out!r}: expected a file that ends in .parquet")
    if config.seeds < 1:
        raise UsageError(f"seeds is {config.seeds}: expected at least 1")
    if not 0 <= config.calibrate < 1:
        raise UsageError(f"calibrate is {config.calibrate}: expected a share in [0, 1)")
    if config.calibrate and "magnitude" not in config.signals:
        raise UsageError("calibrate finds a threshold of the magnitude: add it to signals")
    check_scored_steps(config.steps, config.num_inference_steps, config.batch_size)
    if is_curation(config.prompts):
        check_index(config.prompts)
    else:
        read_prompts(config.prompts)
    if config.negatives:
        read_prompts(config.negatives)
    check_openable(config)


def is_curation(prompts: str) -> bool:
    """Whether ``prompts`` names what ``curate dedup`` wrote, and not a file of prompts."""
    return Path(prompts).is_dir() or "://" in prompts


def check_scored_steps(steps: int, num_inference_steps: int, batch_size: int) -> None:
    """Raise ``UsageError`` where a number is out of range."""
    if not 1 <= steps <= num_inference_steps:
        raise UsageError(f"steps is {steps}: expected 1 to num_inference_steps, which is {num_inference_steps}")
    if batch_size < 1:
        raise UsageError(f"batch_size is {batch_size}: expected at least 1")


def check_explain(config: ExplainConfig) -> None:
    """Check ``train explain``: its options, the prompts, the model's files.

    Raises:
        UserError: a setting is out of its range, or a file is missing or malformed.
    """
    prompts_to_explain(config)
    check_openable(config)


def prompts_to_explain(config: ExplainConfig) -> list[Prompt]:
    """The prompts of ``train explain``, its options having been checked.

    Raises:
        UserError: options are out of range or exclude each other, or the file of prompts cannot be read.
    """
    if bool(config.prompt) == bool(config.prompts):
        raise UsageError("train explain needs either --prompt or --prompts")
    if config.instead and not config.prompt:
        raise UsageError("--instead goes with --prompt, not with a file of prompts")
    if config.out and Path(config.out).suffix != ".html":
        raise UsageError(f"out is {config.out!r}: expected a file that ends in .html")
    for option, least in (("seeds", 1), ("steps", 1), ("words", 0), ("replacements", 0), ("batch_size", 1)):
        if getattr(config, option) < least:
            raise UsageError(f"{option} is {getattr(config, option)}: expected at least {least}")
    if config.steps > config.num_inference_steps:
        raise UsageError(f"steps is {config.steps}: there are {config.num_inference_steps} (num_inference_steps)")
    return [Prompt(config.prompt)] if config.prompt else read_prompts(config.prompts)
