"""AMG's schedules, strengths and antithesis (CVPR 2024, equations 13 to 17). Pure functions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from curate.reading.captions import normalise_caption
from train.sampling.config import AMGConfig

TIMESTEPS = 1000  # the constants are stated for t of 1000; other models' t is scaled to it


def exponential(t: float, a: float = 0.3, b: float = 0.4, c: float = 0.005) -> float:
    """``λ_t = a − (a − b)·exp(−c·t)``: from ``b`` at t = 0 towards ``a``. The released sampler's schedule."""
    return a - (a - b) * math.exp(-c * t)


def parabolic(t: float, a: float = 0.3, b: float = 0.4) -> float:
    """``λ_t = a + (b − a)·(1 − t/1000)²``: a parabola from ``b`` at t = 0 to its vertex ``a`` at t = 1000."""
    return a + (b - a) * (1 - t / TIMESTEPS) ** 2


def constant(t: float, b: float = 0.4) -> float:
    """``λ_t = b``."""
    return b


def schedule(config: AMGConfig) -> Callable[[float], float]:
    """``t ↦ λ_t`` of a resolved config."""
    a, b, c = config.lambda_a, config.lambda_b, config.lambda_c
    assert a is not None and b is not None and c is not None
    if config.schedule == "exponential":
        return lambda t: exponential(t, a, b, c)
    if config.schedule == "parabolic":
        return lambda t: parabolic(t, a, b)
    return lambda t: constant(t, b)


def despecification_strength(
    sigma: Tensor,
    scale: float | Tensor,
    c_1: float = 13.0,
    floor: float | Tensor = 1.0,
    c_1_at: float | None = None,
) -> Tensor:
    """``s_1 = max(min(c_1 σ, s_0 − 1), 0)`` (eq. 13); ``floor`` stands for 1, ``scale`` (or ``[k]``) for ``s_0``.

    ``c_1`` is in proportion to ``s_0`` where ``c_1_at`` names the ``s_0`` that it is stated for.
    """
    return (c_1 * sigma * (1.0 if c_1_at is None else scale / c_1_at)).clamp(max=scale - floor).clamp(min=0)


def deduplication_strength(
    sigma: Tensor, scale: float | Tensor, s_1: Tensor, c_2: float | None = None, floor: float | Tensor = 1.0
) -> Tensor:
    """``s_2 = max(min(c_2 σ, s_0 − s_1 − 1), 0)`` (eq. 15); released: ``c_2 = (s_0 − s_1 − 1)/0.3``."""
    left = scale - s_1 - floor
    wanted = left * sigma / 0.3 if c_2 is None else c_2 * sigma
    return torch.minimum(wanted, left).clamp(min=0)


def floor_left(above: Tensor, config: AMGConfig) -> Tensor:
    """The guidance scale that G_spe and G_dup leave at least: less, the longer an image has stayed above λ_t.

    Args:
        above: ``[k]``, timesteps of 1000 for which it was guided and did.
        config: resolved.
    """
    assert config.floor is not None and config.escalate is not None
    fallen = config.floor - config.escalate * above / TIMESTEPS
    return fallen.clamp(min=min(config.floor, config.least_floor))


def dissimilarity_factor(sigma: Tensor, t: float, alpha_bar: float, threshold: Tensor, config: AMGConfig) -> Tensor:
    """What ``∇σ`` is multiplied by, ``[k]``; see :class:`AMGConfig` for the forms (``paper`` is eq. 17)."""
    assert config.c_3 is not None and config.sim_offset is not None
    if config.sim_form == "released":
        return config.c_3 * (sigma - config.sim_offset) * math.exp((TIMESTEPS - t) / 170)
    noise = config.c_3 * (1 - alpha_bar) ** 0.5
    return noise * (sigma - threshold) if config.sim_form == "excess" else torch.full_like(sigma, noise)


def antithesis(captions: Sequence[str | None], counts: Any, rows: Sequence[int], min_count: int = 20) -> str:
    """``e_N``: the caption to steer away from.

    The most frequent caption among the near training samples, if the training set holds it more than
    ``min_count`` times (it is then a key that retrieves the image), else the nearest sample's own.

    Args:
        captions: of the whole index; None where a sample has none.
        counts: how often each sample's caption occurs in the training set, int ``[n]``.
        rows: near samples, nearest first.
        min_count: see above.
    """
    tally: dict[str, list[int]] = {}
    for row in rows:
        tally.setdefault(normalise_caption(captions[row] or ""), []).append(row)
    commonest = max(tally.values(), key=len)  # of equals, the nearest
    row = commonest[0] if counts[commonest[0]] > min_count else rows[0]
    return captions[row] or ""

