"""The filter's settings, checked, and what they name: thresholds, reference samples, the steps of a calibration."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from afresh.errors import UsageError
from train.finetune.config import FilterConfig
from train.finetune.filter.calibration import ENOUGH, unique_samples
from train.memorization.thresholds import BANDS, FILE, Thresholds, read_thresholds

if TYPE_CHECKING:
    from train.finetune.data.scan import ShardSet

LEAST_STEPS = 50
"""Of a calibration whose length is not set: with fewer, few captions of the set were met."""


def check_filter(policy: FilterConfig, model: str) -> None:
    """Raise :class:`UsageError` for settings out of range, and thresholds that cannot be found."""
    how = policy.calibrate
    for name, value, least in (
        ("min_timestep", policy.min_timestep, 0),
        ("k", policy.k, 1),
        ("expires", policy.expires, 0),
        ("warmup_steps", policy.warmup_steps, 0),
        ("calibrate.steps", how.steps, 0),
        ("calibrate.window", how.window or 0, 0),
    ):
        if value < least:
            raise UsageError(f"filter.{name} must be {least} or more, not {value}")
    if policy.threshold is not None and how.steps:
        raise UsageError("filter.threshold and filter.calibrate.steps exclude each other: leave one of them out")
    if policy.evidence == "window" and policy.policy != "off" and (policy.threshold is not None or how.window == 0):
        raise UsageError("filter.evidence window needs filter.calibrate.window, and no filter.threshold beside it")
    if not 0 < policy.most_dropped <= 1:
        raise UsageError(f"filter.most_dropped must lie in (0, 1], not {policy.most_dropped}")
    if policy.evidence == "window" and not 0 < how.release <= how.quantile:
        raise UsageError(f"filter.calibrate.release must lie in (0, quantile], not {how.release}")
    if not 0 < how.quantile < 1:
        raise UsageError(f"filter.calibrate.quantile must lie in (0, 1), not {how.quantile}")
    chosen_thresholds(policy, model)


def reference_samples(policy: FilterConfig, shard_set: ShardSet) -> Tensor | None:
    """``[samples]`` bool, those that the thresholds are calibrated by; None for all, or where nothing is calibrated."""
    unique = policy.calibrate.unique
    if policy.policy == "off" or policy.threshold is not None or not unique:
        return None
    return torch.from_numpy(unique_samples(unique, shard_set.urls, shard_set.ids))


def with_lengths(policy: FilterConfig, captioned: float) -> FilterConfig:
    """The settings with the ``steps`` and ``window`` of the calibration in numbers, where these are left to the run.

    Args:
        policy: the filter's settings.
        captioned: samples of an optimizer step that calibration may go by: of all processes, with their captions, and
            known to be unique; on average.
    """
    how = policy.calibrate
    noisy, one_in_k = "noisy" in policy.policy, "one_in_k" in policy.policy
    # The last band that is judged has a tenth of the timesteps, whatever min_timestep is: it lies at the noisy end.
    share = 1 / BANDS if how.per_band else max(1 - policy.min_timestep / 1000, 1 / BANDS) if noisy else 1.0
    judged = captioned * share / (policy.k if one_in_k else 1)
    steps = how.steps or max(LEAST_STEPS, math.ceil(2 * ENOUGH / max(judged, 1e-6)))
    window = 2 * steps if how.window is None else how.window
    return dataclasses.replace(policy, calibrate=dataclasses.replace(how, steps=steps, window=window))


def chosen_thresholds(policy: FilterConfig, model: str) -> Thresholds | None:
    """The thresholds that the settings name; None where they are to be calibrated, or nothing is judged.

    Args:
        policy: the filter's settings.
        model: that training starts from; ``auto`` looks in its folder.

    Raises:
        UsageError: there is no such file, its form is another one, or a number is out of range.
    """
    if policy.policy == "off" or policy.threshold is None:
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

