"""One number for how strongly any guidance acts: 1 is its own settings, 2 twice as much of what it goes by."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from train.memorization.config import MEMORIZED
from train.sampling.config import SampleConfig
from train.sampling.terms import registry
from train.sampling.terms.rejection import stronger

LEAST, MOST, STEP = 0.25, 4.0, 0.25
Change = Callable[[SampleConfig, float], SampleConfig]


def _amg(name: str) -> Change:
    """AMG goes from preset to preset by steps in which c_3 doubles and the thresholds fall: here by parts of one."""

    def change(config: SampleConfig, strength: float) -> SampleConfig:
        return replace(config, amg=stronger(registry.SETTINGS[name](config), math.log2(strength)))

    return change


def _part(term: str, setting: str, of: Callable[[Any, float], Any]) -> Change:
    def change(config: SampleConfig, strength: float) -> SampleConfig:
        part = getattr(config, term)
        return replace(config, **{term: replace(part, **{setting: of(getattr(part, setting), strength)})})

    return change


def _basin(config: SampleConfig, strength: float) -> SampleConfig:
    """From the prompt's own prediction at 0 without it at 1 (as it is) to opposed by the guidance scale at 2."""
    return replace(config, basin=replace(config.basin, before=config.scale * (1 - strength)))


def _limit(config: SampleConfig, strength: float) -> SampleConfig:
    return replace(config, rejection=replace(config.rejection, limit=MEMORIZED - 0.1 * math.log2(strength)))


STRENGTHS: dict[str, Change] = {
    "amg": _amg("amg"),
    "amg-strong": _amg("amg-strong"),
    "amg-early": _amg("amg-early"),
    "prompt": _part("prompt", "target", lambda target, s: target / s),
    "anisotropy": _part("anisotropy", "target", lambda target, s: target / s),
    "attention": _part("attention", "beginning", lambda factor, s: 1 + (factor - 1) * s),
    "basin": _basin,
    "noise": _part("noise", "target", lambda target, s: target / s),
    "noise-batch": _part("noise", "gamma", lambda gamma, s: gamma * s),
    "tokens": _part("tokens", "number", lambda number, s: max(1, round(number * s))),
    "numbers": _part("tokens", "number", lambda number, s: max(1, round(number * s))),
    "rejection": _limit,
}


def with_strength(config: SampleConfig, names: Sequence[str], strength: float) -> SampleConfig:
    """The settings under which each named guidance acts by a strength; 1 leaves them, and so does a name that has none.

    Args:
        config: of the job.
        names: of guidances, as they act.
        strength: clamped to what the page offers, LEAST to MOST.
    """
    strength = min(max(float(strength), LEAST), MOST)
    if strength != 1:
        for name in names:
            config = STRENGTHS[name](config, strength) if name in STRENGTHS else config
    return config
