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
from train.finetune.model.trained import Model

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


def parameter_groups(model: Model, config: FinetuneConfig) -> list[Any]:
    """What is trained, for :func:`make_optimizer`: one list, or groups where text encoders have a rate of their own."""
    if config.text_encoder_learning_rate is None:
        return list(model.trained)
    text = {id(parameter) for encoder in model.denoiser.encoders.values() for parameter in encoder.parameters()}
    parts = [[p for p in model.trained if (id(p) in text) == inside] for inside in (False, True)]
    relative = config.text_encoder_learning_rate / peak_learning_rate(config)
    return [{"params": parts[0]}, {"params": parts[1], "relative": relative}]


def make_optimizer(trained: Sequence[Any], config: FinetuneConfig, fused: bool) -> torch.optim.Optimizer:
    """The optimizer that the settings ask for.

    ``learning_rate`` reaches every optimizer; ``weight_decay`` and ``adam_beta2``, where they are set, one that takes
    ``weight_decay`` and ``betas``. All else is the optimizer's own; ``optimizer_args`` come last and win.

    Args:
        trained: parameters, or groups of them.
        config: the run's settings.
        fused: take one pass over the weights, for ``adamw``. With fp16's loss scaling a fused step hides whether an
            overflow skipped it, which the count of updates and the average must know.

    Raises:
        UsageError: there is no such optimizer, or it does not take these arguments.
    """
    kind = find_optimizer(config.optimizer)
    takes = inspect.signature(kind).parameters
    anything = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in takes.values())
    arguments: dict[str, Any] = {"lr": config.learning_rate} if "lr" in takes or anything else {}
    for name, argument in (("weight_decay", "weight_decay"), ("adam_beta2", "betas")):
        value = getattr(config, name)
        if value is None:
            continue
        if argument not in takes and not anything:
            raise UsageError(f"{name}: {config.optimizer} takes no {argument}; leave {name} out")
        if argument == "betas":  # of two or, as Adan has them, three
            own = takes[argument].default if argument in takes else None
            first, *others = own if isinstance(own, tuple) else (0.9, value)
            value = (first, value, *others[1:])
        arguments[argument] = value
    if kind is torch.optim.AdamW:
        arguments["fused"] = fused
    arguments |= {name: tuple(v) if isinstance(v, list) else v for name, v in config.optimizer_args.items()}
    try:
        optimizer = kind(trained, **arguments)
    except (TypeError, ValueError) as error:
        raise UsageError(f"optimizer {config.optimizer}: {error} (optimizer_args)") from error
    optimizer.register_load_state_dict_post_hook(own_state)
    return optimizer


def own_state(optimizer: torch.optim.Optimizer) -> None:
    """Copy what a loaded state still lends: torch takes tensors as they are where they fit, here a mapped file's."""
    for state in optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.device.type == "cpu":
                state[name] = value.clone()


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
    """Put a learning rate into every group of an optimizer, times what the group has as ``relative``."""
    for group in optimizer.param_groups:
        group["lr"] = value * group.get("relative", 1.0)

