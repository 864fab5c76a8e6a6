"""When memory runs out: what lowers it, and the same optimizer step in smaller passes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch

from afresh.files import write_json
from train.finetune.config import FinetuneConfig

BATCH_FILE = "batch.json"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that an accelerator or the machine has no memory left."""
    from accelerate.utils.memory import should_reduce_batch_size

    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and should_reduce_batch_size(error)
    )


def memory_advice(config: FinetuneConfig) -> str:
    """Settings that would lower the memory of a step and are not used yet, cheapest first."""
    advice = []
    if not config.gradient_checkpointing:
        advice.append("gradient_checkpointing: true")
    if config.mixed_precision == "no":
        advice.append("mixed_precision: bf16")
    if config.attention == "math":
        advice.append("attention: sdpa")
    if config.batch_size > 1:
        smaller = smaller_batch(config)
        how = f"batch_size: {smaller.batch_size} with gradient_accumulation: {smaller.gradient_accumulation}"
        advice.append(how + ("" if config.auto_batch_size else " (auto_batch_size: true finds it)"))
    if config.ema_decay and config.ema_device == "auto":
        advice.append("ema_device: cpu")
    if config.optimizer == "adamw":
        advice.append("optimizer: adamw8bit")
    if not config.lora.rank:
        advice.append("lora.rank: 16 (adapters in place of all weights)")
    return ", ".join(advice) or "a smaller model or resolution"


def smaller_batch(config: FinetuneConfig) -> FinetuneConfig:
    """The same optimizer step in more, smaller passes: half the batch and twice the accumulation.

    A batch that has no half is divided by its smallest factor, so that a step's positions stay the same.
    """
    factor = next(n for n in range(2, config.batch_size + 1) if config.batch_size % n == 0)
    return dataclasses.replace(
        config,
        batch_size=config.batch_size // factor,
        gradient_accumulation=config.gradient_accumulation * factor,
    )


def read_batch(out: Path, config: FinetuneConfig) -> FinetuneConfig:
    """The settings with the batch size that an earlier attempt at this run found to fit."""
    path = out / BATCH_FILE
    if not config.auto_batch_size or not path.is_file():
        return config
    size = json.loads(path.read_text())["batch_size"]
    # The accumulation is found anew: with other processes it is another.
    passes = config.batch_size * config.gradient_accumulation // size
    return dataclasses.replace(config, batch_size=size, gradient_accumulation=passes)


def write_batch(out: Path, config: FinetuneConfig) -> None:
    """Note the batch size in the run's folder, for its resumption."""
    batch = {"batch_size": config.batch_size, "gradient_accumulation": config.gradient_accumulation}
    write_json(out / BATCH_FILE, batch)

