"""How well a score separates two classes: AUC, ROC, strict true-positive rate, bootstrap intervals (numpy
only).

Labels are never flipped: a score below chance is reported as below chance.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.floating]


def roc_auc(scores: ArrayLike, labels: ArrayLike) -> float:
    """Probability that a positive scores above a negative, ties counting half. Labels are never flipped.

    Args:
        scores: ``[n]``, higher = more likely positive.
        labels: ``[n]`` of 1 and 0.

    Raises:
        ValueError: one of the classes is missing.
    """
    positive, negative = _classes(scores, labels)
    ordered = np.sort(negative)
    below, upto = np.searchsorted(ordered, positive, "left"), np.searchsorted(ordered, positive, "right")
    return float(np.mean(below + upto) / (2 * len(negative)))


def roc_curve(scores: ArrayLike, labels: ArrayLike) -> tuple[Floats, Floats]:
    """The ROC's corners ``(fpr, tpr)`` from (0, 0) to (1, 1), one for every distinct score."""
    positive, negative = (np.sort(x) for x in _classes(scores, labels))
    cuts = np.unique(np.concatenate([positive, negative]))[::-1]
    fpr = 1 - np.searchsorted(negative, cuts, "left") / len(negative)
    tpr = 1 - np.searchsorted(positive, cuts, "left") / len(positive)
    return np.concatenate([[0.0], fpr]), np.concatenate([[0.0], tpr])


def tpr_at_fpr(scores: ArrayLike, labels: ArrayLike, fpr: float = 0.01) -> float:
    """Highest true-positive rate of a threshold whose false-positive rate is at most ``fpr``, without
    interpolation.

    Raises:
        ValueError: one of the classes is missing.
    """
    positive, negative = _classes(scores, labels)
    allowed = int(np.floor(fpr * len(negative) + 1e-9))
    if allowed >= len(negative):
        return 1.0
    # One more false positive than allowed would pass at this score: only what lies above it counts.
    barrier = np.sort(negative)[::-1][allowed]
    return float(np.mean(positive > barrier))


def bootstrap_interval(
    statistic: Callable[[Floats, NDArray[np.int64]], float],
    scores: ArrayLike,
    labels: ArrayLike,
    *,
    samples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile interval of ``statistic(scores, labels)`` over resamples drawn within each class.

    Args:
        statistic: as :func:`roc_auc`.
        scores: ``[n]``.
        labels: ``[n]`` of 1 and 0.
        samples: resamples.
        level: share of resamples inside the interval.
        seed: of the resampling.
    """
    positive, negative = _classes(scores, labels)
    rng = np.random.default_rng(seed)
    labels = np.repeat([1, 0], [len(positive), len(negative)])
    values = [
        statistic(np.concatenate([rng.choice(positive, len(positive)), rng.choice(negative, len(negative))]), labels)
        for _ in range(samples)
    ]
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _classes(scores: ArrayLike, labels: ArrayLike) -> tuple[Floats, Floats]:
    scores, labels = np.asarray(scores, np.float64), np.asarray(labels)
    if scores.shape != labels.shape or scores.ndim != 1:
        raise ValueError(f"scores {scores.shape} and labels {labels.shape} are not two rows of one length")
    if np.isnan(scores).any():
        raise ValueError("scores hold NaN")
    positive, negative = scores[labels == 1], scores[labels == 0]
    if not len(positive) or not len(negative):
        raise ValueError("both labels, 1 and 0, are needed")
    return positive, negative

