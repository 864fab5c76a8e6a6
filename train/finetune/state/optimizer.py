"""Optimizers by name, and the learning rate as a pure function of the step."""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch

from afresh.errors import UsageError
from train.finetune.config import FinetuneConfig

OPTIMIZERS = {
    "adamw": "torch.optim.AdamW",
    "adafactor": "torch.optim.Adafactor",
    "adamw8bit": "bitsandbytes.optim.AdamW8bit",
    "lion": "bitsandbytes.optim.Lion",
    "lion8bit": "bitsandbytes.optim.Lion8bit",
    "prodigy": "prodigyopt.Prodigy",
}
"""What each name stands for; any other ``package.Class`` is taken as it is."""


def find_optimizer(name: str) -> type[torch.optim.Optimizer]:
    """The optimizer's class, by a name of :data:`OPTIMIZERS` or a dotted path.

    Raises:
        UsageError: there is no such optimizer, or its package is not installed.
    """
    path = OPTIMIZERS.get(name, name)
    module, _, attribute = path.rpartition(".")
    if not module:
        raise UsageError(f"optimizer {name!r}: choose one of {', '.join(OPTIMIZERS)}, or name a class as package.Class")
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except ImportError as error:
        package = module.partition(".")[0]
        hint = f": pip install {package}" if name in OPTIMIZERS else ""
        raise UsageError(f"optimizer {name}: {package} cannot be imported ({error}){hint}") from error
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        raise UsageError(f"optimizer {name}: {path} is no torch optimizer")
    return found


def make_optimizer(trained: Sequence[torch.nn.Parameter], config: FinetuneConfig, fused: bool) -> torch.optim.Optimizer:
    """The optimizer that the settings ask for.

    ``learning_rate`` and ``weight_decay`` reach every optimizer that takes ``lr`` and ``weight_decay``, ``adam_beta2``
    where it is set one that takes ``betas``; ``optimizer_args`` come last and win.

    Args:
        trained: parameters.
        config: the run's settings.
        fused: take one pass over the weights, for ``adamw``. With fp16's loss scaling a fused step hides whether an
            overflow skipped it, which the count of updates and the average must know.

    Raises:
        UsageError: there is no such optimizer, or it does not take these arguments.
    """
    kind = find_optimizer(config.optimizer)
    takes = inspect.signature(kind).parameters
    arguments: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    if "betas" in takes and config.adam_beta2 is not None:
        default = takes["betas"].default
        arguments["betas"] = (default[0] if isinstance(default, tuple) else 0.9, config.adam_beta2)
    arguments = {name: value for name, value in arguments.items() if name in takes}
    if kind is torch.optim.AdamW:
        arguments["fused"] = fused
    arguments |= {name: tuple(v) if isinstance(v, list) else v for name, v in config.optimizer_args.items()}
    try:
        return kind(trained, **arguments)
    except (TypeError, ValueError) as error:
        raise UsageError(f"optimizer {config.optimizer}: {error} (optimizer_args)") from error


def peak_learning_rate(config: FinetuneConfig) -> float:
    """The learning rate that the schedule scales: ``lr`` of ``optimizer_args``, or else ``learning_rate``."""
    return float(config.optimizer_args.get("lr", config.learning_rate))


def learning_rate(step: int, config: FinetuneConfig) -> float:
    """The learning rate at an optimizer step: linear warm-up, then the schedule; a pure function of the step.

    With ``s`` from 0 at the end of the warm-up to 1 at the end of the run, the schedules are ``1`` (constant),
    ``1 − s`` (linear), ``(1 − s)^lr_power`` (polynomial), ``(1 + cos πs)/2`` (cosine), and with n = ``lr_cycles`` equal
    cycles ``(1 + cos(π (ns mod 1)))/2`` (cosine_restarts; Loshchilov and Hutter, ICLR 2017).
    """
    peak = peak_learning_rate(config)
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(config.steps - config.warmup_steps, 1)
    if config.lr_schedule == "constant":
        shape = 1.0
    elif config.lr_schedule == "linear":
        shape = 1 - done
    elif config.lr_schedule == "polynomial":
        shape = (1 - done) ** config.lr_power
    elif config.lr_schedule == "cosine":
        shape = (1 + math.cos(math.pi * done)) / 2
    else:
        shape = (1 + math.cos(math.pi * (config.lr_cycles * done % 1.0))) / 2 if done < 1 else 0.0
    return peak * shape


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Put a learning rate into every group of an optimizer."""
    for group in optimizer.param_groups:
        group["lr"] = value

