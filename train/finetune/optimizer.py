"""The optimizer, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from train.finetune.config import FinetuneConfig


def make_optimizer(trained: Sequence[torch.nn.Parameter], config: FinetuneConfig, fused: bool) -> torch.optim.Optimizer:
    """The optimizer that the settings ask for.

    Args:
        trained: parameters.
        config: the run's settings.
        fused: take one pass over the weights where the optimizer can. With fp16's loss scaling a fused step hides
            whether an overflow skipped it, which the count of updates and the average must know.
    """
    return torch.optim.AdamW(
        trained,
        lr=config.learning_rate,
        betas=(0.9, config.adam_beta2),
        weight_decay=config.weight_decay,
        fused=fused,
    )


def learning_rate(step: int, config: FinetuneConfig) -> float:
    """The learning rate at an optimizer step: linear warm-up, then the schedule; a pure function of the step."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(config.steps - config.warmup_steps, 1)
    shape = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
    return config.learning_rate * shape[config.lr_schedule]


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Put a learning rate into every group of an optimizer."""
    for group in optimizer.param_groups:
        group["lr"] = value
