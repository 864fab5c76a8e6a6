"""The filter's settings, checked, and the thresholds and reference samples that they name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from afresh.errors import UsageError
from train.finetune.config import FilterConfig
from train.finetune.filter.calibration import unique_samples
from train.memorization.thresholds import FILE, Thresholds, read_thresholds

if TYPE_CHECKING:
    from train.finetune.data.scan import ShardSet


def check_filter(policy: FilterConfig, model: str) -> None:
    """Raise :class:`UsageError` for settings out of range, and thresholds that cannot be found."""
    how = policy.calibrate
    for name, value, least in (
        ("min_timestep", policy.min_timestep, 0),
        ("k", policy.k, 1),
        ("expires", policy.expires, 0),
        ("warmup_steps", policy.warmup_steps, 0),
        ("calibrate.steps", how.steps, 0),
        ("calibrate.window", how.window, 0),
    ):
        if value < least:
            raise UsageError(f"filter.{name} must be {least} or more, not {value}")
    if policy.evidence == "window" and policy.policy != "off" and not (how.steps and how.window):
        raise UsageError("filter.evidence window needs filter.calibrate.steps and filter.calibrate.window")
    if policy.evidence == "window" and not 0 < how.release <= how.quantile:
        raise UsageError(f"filter.calibrate.release must lie in (0, quantile], not {how.release}")
    if not 0 < how.quantile < 1:
        raise UsageError(f"filter.calibrate.quantile must lie in (0, 1), not {how.quantile}")
    chosen_thresholds(policy, model)


def reference_samples(policy: FilterConfig, shard_set: ShardSet) -> Tensor | None:
    """``[samples]`` bool, those that the thresholds are calibrated by; None for all, or where nothing is calibrated."""
    how = policy.calibrate
    if policy.policy == "off" or not how.steps or not how.unique:
        return None
    return torch.from_numpy(unique_samples(how.unique, shard_set.urls, shard_set.ids))


def chosen_thresholds(policy: FilterConfig, model: str) -> Thresholds | None:
    """The thresholds that the settings name; None where they are to be calibrated, or nothing is judged.

    Args:
        policy: the filter's settings.
        model: that training starts from; ``auto`` looks in its folder.

    Raises:
        UsageError: there is no such file, its form is another one, or a number is out of range.
    """
    if policy.policy == "off" or policy.calibrate.steps:
        return None
    if not isinstance(policy.threshold, str):
        try:
            return Thresholds.of(policy.threshold, policy.form)
        except UsageError as error:
            raise UsageError(f"filter.{error}") from None
    path = Path(model) / FILE if policy.threshold == "auto" else Path(policy.threshold)
    thresholds = read_thresholds(path)
    if thresholds.form != policy.form:
        raise UsageError(f"{path} has thresholds of the form {thresholds.form}, but filter.form is {policy.form}")
    return thresholds

