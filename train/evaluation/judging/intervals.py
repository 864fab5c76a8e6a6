"""Numbers of the table with their intervals: a bootstrap over prompts, whose images are no independent cases.

A :class:`Values` is a number as a function of images, so that it can be taken of any choice of prompts again. All
numbers of one setting are taken of the same choices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Rows = NDArray[np.int64]
LEVEL = 0.95
FEW = 5


@dataclass(frozen=True)
class Values:
    """One number of a table row."""

    statistic: Callable[[Rows], float]
    """The number of some images, by their rows; a row may stand there several times."""
    images: NDArray[Any] | None = None
    """``[n]`` image by image, where the number is made of such."""
    share: bool = False
    """The images are yes or no, and the number the share of yes."""
    centred: bool = False
    """The number depends on how many distinct images there are, and a choice with repeats has fewer: the interval is
    that of the choices, moved so that their mean is the number."""


def mean(images: ArrayLike) -> Values:
    """The mean of ``[n]`` numbers; NaN ones are left out."""
    values = np.asarray(images, np.float64)
    if np.isnan(values).any():
        return Values(lambda rows: _mean(values[rows][~np.isnan(values[rows])]), values)
    return Values(lambda rows: float(values[rows].mean()), values)


def share(images: ArrayLike) -> Values:
    """The share of ``[n]`` images of which something is true."""
    flags = np.asarray(images, bool)
    return Values(lambda rows: float(flags[rows].mean()), flags, share=True)


def median(images: ArrayLike) -> Values:
    """The median of ``[n]`` numbers."""
    values = np.asarray(images, np.float64)
    return Values(lambda rows: float(np.median(values[rows])), values)


def ratio(images: ArrayLike, others: ArrayLike) -> Values:
    """The mean of ``[n]`` numbers over the mean of ``[n]`` others, both of the images of which neither is NaN."""
    over, under = np.asarray(images, np.float64), np.asarray(others, np.float64)
    known = ~(np.isnan(over) | np.isnan(under))

    def statistic(rows: Rows) -> float:
        rows = rows[known[rows]]
        whole = _mean(under[rows])
        return _mean(over[rows]) / whole if whole else float("nan")

    return Values(statistic)


def resampled(prompts: Sequence[Any], samples: int, seed: int = 0) -> list[Rows]:
    """Choices of prompts, as many as there are, with repeats: each as the rows of all their images.

    Args:
        prompts: ``[n]`` which prompt each image was drawn for.
        samples: how many choices.
        seed: of the choices.

    Returns:
        ``samples`` arrays of rows; none where there are fewer than two prompts.
    """
    number = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    groups: list[list[int]] = [[] for _ in number]
    for row, prompt in enumerate(prompts):
        groups[number[prompt]].append(row)
    if len(groups) < 2:
        return []
    rows = [np.array(group, np.int64) for group in groups]
    rng = np.random.default_rng(seed)
    return [np.concatenate([rows[i] for i in rng.integers(len(rows), size=len(rows))]) for _ in range(samples)]


def interval(values: Values, prompts: Sequence[Any], choices: Sequence[Rows]) -> tuple[float, float]:
    """The 95 % interval of a number: percentiles over the choices.

    Of a share that rests on fewer than :data:`FEW` prompts, choices say little, and of none nothing at all: the exact
    binomial interval over prompts stands there (Clopper and Pearson, 1934). 0 of 24 prompts leave up to 14 %.

    Args:
        values: the number.
        prompts: ``[n]`` as in :func:`resampled`.
        choices: of :func:`resampled`.

    Returns:
        ``(low, high)``; NaN where there is no choice, or the number has none.
    """
    if not choices:
        return float("nan"), float("nan")
    outside = (1 - LEVEL) / 2
    if values.share and values.images is not None:
        _, number = np.unique(np.asarray(prompts), return_inverse=True)
        shares = np.bincount(number, values.images) / np.bincount(number)
        yes, no = float(shares.sum()), float((1 - shares).sum())
        if min(yes, no) < FEW:
            return _binomial(yes, no, outside)
    found = np.array([values.statistic(rows) for rows in choices])
    found = found[np.isfinite(found)]
    if not len(found):
        return float("nan"), float("nan")
    if values.centred:
        found = found - found.mean() + values.statistic(np.arange(len(prompts)))
    low, high = np.quantile(found, [outside, 1 - outside])
    return float(low), float(high)


def _binomial(yes: float, no: float, outside: float) -> tuple[float, float]:
    """Of so many prompts each; they need not be whole, since a prompt's images may differ."""
    from scipy.stats import beta

    low = float(beta.ppf(outside, yes, no + 1)) if yes > 1e-9 else 0.0
    high = float(beta.ppf(1 - outside, yes + 1, no)) if no > 1e-9 else 1.0
    return low, high


def _mean(values: NDArray[np.float64]) -> float:
    return float(values.mean()) if len(values) else float("nan")
