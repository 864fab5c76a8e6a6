"""What the filter's settings name, in a run: reference samples, the length of a calibration, the filter itself."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from afresh.errors import UsageError
from afresh.progress import get_logger, is_main_process
from train.finetune.config import FilterConfig, FinetuneConfig
from train.finetune.filter.calibration import ENOUGH, unique_samples
from train.finetune.filter.checks import chosen_thresholds
from train.finetune.filter.filter import MemorizationFilter
from train.finetune.filter.policies import least_timestep
from train.memorization.thresholds import BANDS

if TYPE_CHECKING:
    from train.denoising.schedules import NoiseSchedule
    from train.finetune.data.scan import ShardSet

log = get_logger(__name__)
DRAWS = 10_000
"""Of the timesteps, which ``min_timestep`` goes by."""
LEAST_STEPS = 50
"""Of a calibration whose length is not set: with fewer, few captions of the set were met."""


def make_filter(
    config: FinetuneConfig,
    schedule: NoiseSchedule,
    timestep: Callable[[torch.Generator], Tensor] | None,
    predict_unconditional: Callable[..., Tensor],
    shard_set: ShardSet,
    samples: int,
    together: bool,
) -> MemorizationFilter:
    """The filter of a run; says so where the run is too short for it to act.

    Args:
        config: of the run.
        schedule: see :class:`~train.finetune.filter.filter.MemorizationFilter`, also for those not named here.
        timestep: how the run draws one timestep; None for uniformly.
        predict_unconditional: as there.
        shard_set: what is trained on.
        samples: of an optimizer step, on all processes.
        together: as there.
    """
    reference = reference_samples(config.filter, shard_set)
    unique = 1.0 if reference is None else float(reference.float().mean())
    policy = with_min_timestep(config.filter.settled(), timestep)
    policy = with_lengths(policy, samples * (1 - config.caption_dropout) * unique)
    thresholds = chosen_thresholds(policy, config.model)
    if thresholds is not None and (why := thresholds.unlike(thresholds.against, None, schedule.space)):
        raise UsageError(f"filter.threshold {policy.threshold}: {why}: calibrate them on this model")
    before = policy.warmup_steps + (policy.calibrate.steps if thresholds is None else 0)
    if policy.policy != "off" and before >= config.steps and is_main_process():
        log.warning(
            "the filter never acts: it starts after %d steps (filter.warmup_steps and the calibration), and the run "
            "has %d: raise steps, or set a smaller filter.%s",
            before,
            config.steps,
            "warmup_steps" if policy.warmup_steps >= config.steps else "calibrate.steps",
        )
    size, seed = len(shard_set), config.seed
    return MemorizationFilter(policy, schedule, predict_unconditional, size, seed, thresholds, reference, together)


def reference_samples(policy: FilterConfig, shard_set: ShardSet) -> Tensor | None:
    """``[samples]`` bool, those that the thresholds are calibrated by; None for all, or where nothing is calibrated."""
    unique = policy.calibrate.unique
    if policy.policy == "off" or policy.threshold is not None or not unique:
        return None
    return torch.from_numpy(unique_samples(unique, shard_set.urls, shard_set.ids))


def with_min_timestep(policy: FilterConfig, timestep: Callable[[torch.Generator], Tensor] | None) -> FilterConfig:
    """The settings with ``min_timestep`` in numbers, where it is left to the run: a fifth of the visits reach it.

    Args:
        policy: the filter's settings.
        timestep: as of :func:`make_filter`.
    """
    if policy.min_timestep is not None or "noisy" not in (policy.policy or ""):
        return policy
    if timestep is None:
        return dataclasses.replace(policy, min_timestep=least_timestep(policy))
    g = torch.Generator().manual_seed(0)
    drawn = torch.stack([timestep(g).float() for _ in range(DRAWS)])
    return dataclasses.replace(policy, min_timestep=round(float(drawn.quantile(0.8)) / 10) * 10)


def with_lengths(policy: FilterConfig, captioned: float) -> FilterConfig:
    """The settings with the ``steps`` and ``window`` of the calibration in numbers, where these are left to the run.

    Args:
        policy: the filter's settings.
        captioned: samples of an optimizer step that calibration may go by: of all processes, with their captions, and
            known to be unique; on average.
    """
    how = policy.calibrate
    kind = policy.policy or ""
    noisy, one_in_k = "noisy" in kind, "one_in_k" in kind
    # The last band that is judged has a tenth of the timesteps, whatever min_timestep is: it lies at the noisy end.
    share = 1 / BANDS if how.per_band else max(1 - least_timestep(policy) / 1000, 1 / BANDS) if noisy else 1.0
    judged = captioned * share / (policy.k if one_in_k else 1)
    steps = how.steps or max(LEAST_STEPS, math.ceil(2 * ENOUGH / max(judged, 1e-6)))
    window = 2 * steps if how.window is None else how.window
    return dataclasses.replace(policy, calibrate=dataclasses.replace(how, steps=steps, window=window))
