"""The filter's settings, checked before torch is loaded, and the thresholds that they name."""

from __future__ import annotations

from pathlib import Path

from afresh.errors import UsageError
from train.finetune.config import FilterConfig
from train.memorization.thresholds import FILE, Thresholds, read_thresholds


def check_filter(policy: FilterConfig, model: str) -> None:
    """Raise :class:`UsageError` for settings out of range, and thresholds that cannot be found."""
    policy = policy.settled()
    how = policy.calibrate
    for name, value, least in (
        ("min_timestep", policy.min_timestep or 0, 0),
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
        raise UsageError(
            "filter.evidence window needs filter.calibrate.window, and no filter.threshold beside it: leave the "
            "threshold out, or name a filter.policy or filter.preset paper"
        )
    if not 0 < policy.most_dropped <= 1:
        raise UsageError(f"filter.most_dropped must lie in (0, 1], not {policy.most_dropped}")
    assert how.quantile is not None  # settled by FilterConfig
    if policy.evidence == "window" and not 0 < how.release <= how.quantile:
        raise UsageError(f"filter.calibrate.release must lie in (0, quantile], not {how.release}")
    if not 0 < how.quantile < 1:
        raise UsageError(f"filter.calibrate.quantile must lie in (0, 1), not {how.quantile}")
    chosen_thresholds(policy, model)

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
