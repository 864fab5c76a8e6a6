"""Settings of a run's objective: which timesteps are trained on, and what their errors count."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Timesteps:
    """How the timesteps that are trained on are drawn, among 1000.

    Args:
        kind: ``uniform``, or ``logit_normal``: the sigmoid of a normal number, most often in the middle (Esser et al.,
            ICML 2024, §3.1).
        mean: of that number; above 0 favours noisy timesteps.
        spread: its standard deviation.
        lowest: the least timestep.
        highest: the one after the greatest.
    """

    kind: Literal["uniform", "logit_normal"] = "uniform"
    mean: float = 0.0
    spread: float = 1.0
    lowest: int = 0
    highest: int = 1000


@dataclass(frozen=True)
class Flow:
    """How flow-matching models are trained; others do not look at it.

    Args:
        density: of the noise levels that are trained at: logit_normal, mode or uniform, before the schedule's shift.
        logit_mean: of logit_normal.
        logit_std: of logit_normal.
        mode_scale: of mode.
        weighting: of the loss by noise level: none, sigma_sqrt or cosmap.
        error_of: the velocity, or the sample that it stands for, whose error is σ² times as large.
        shift: of the noise levels, ``σ → s σ / (1 + (s − 1) σ)``, in training and in what is saved; 0 keeps the
            model's own.
    """

    density: Literal["logit_normal", "mode", "uniform"] = "logit_normal"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29
    weighting: Literal["none", "sigma_sqrt", "cosmap"] = "none"
    error_of: Literal["velocity", "sample"] = "velocity"
    shift: float = 0.0
