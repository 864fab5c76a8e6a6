"""Distances between two sets of features as :class:`~train.evaluation.judging.intervals.Values`: Fréchet, and KID's.

Both keep what depends on single images, so that a choice of prompts costs a small eigenvalue problem, or a sum.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from train.evaluation.judging.intervals import Rows, Values


def frechet(features: ArrayLike, reference: ArrayLike) -> Values:
    """:func:`~train.evaluation.judging.metrics.frechet_distance` of images to a reference set.

    With centred rows X and Y, ``tr (Σ_a Σ_b)^½ = ‖X Yᵀ‖_* / √((n − 1)(m − 1))``: the singular values of a matrix with
    as many rows as distinct images. Of Y no more is needed than YᵀY, so its side is min(m, d) wide.

    Args:
        features: ``[n, d]`` of the images.
        reference: ``[m, d]``; with m < 2 the distance is NaN.
    """
    if len(reference := np.asarray(reference, np.float64)) < 2:
        return Values(lambda rows: float("nan"))
    centre = reference.mean(axis=0)
    x, y = np.asarray(features, np.float64) - centre, reference - centre
    m, d = y.shape
    if m > d:
        eigenvalues, vectors = np.linalg.eigh(y.T @ y)
        side = (vectors * np.sqrt(np.clip(eigenvalues, 0, None))) @ vectors.T
    else:
        side = y.T
    products, squares = x @ side, np.sum(x**2, axis=1)
    trace_b = np.sum(y**2) / (m - 1)

    def statistic(rows: Rows) -> float:
        n = len(rows)
        if n < 2:
            return float("nan")
        weight = np.bincount(rows, minlength=len(x)).astype(np.float64)
        kept = weight > 0
        mean = weight @ x / n
        shift = mean @ mean
        trace_a = (weight @ squares - n * shift) / (n - 1)
        across = np.sqrt(weight[kept])[:, None] * (products[kept] - weight @ products / n)
        gram = across @ across.T if len(across) <= across.shape[1] else across.T @ across
        cross = np.sqrt(np.clip(np.linalg.eigvalsh(gram), 0, None)).sum() / np.sqrt((n - 1) * (m - 1))
        return max(float(shift + trace_a + trace_b - 2 * cross), 0.0)

    return Values(statistic, centred=True)


def kernel_distance(features: ArrayLike, reference: ArrayLike) -> Values:
    """Squared maximum mean discrepancy with the kernel ``(x·y/d + 1)³``, unbiased (KID: Bińkowski et al., 2018).

    Of all pairs at once, without KID's usual subsets; pairs of an image with itself are left out, also where a choice
    holds it several times. May be below 0.

    Args:
        features: ``[n, d]`` of the images.
        reference: ``[m, d]``; with m < 2 the distance is NaN.
    """
    if len(reference := np.asarray(reference, np.float64)) < 2:
        return Values(lambda rows: float("nan"))
    x, y = np.asarray(features, np.float64), reference
    m, d = y.shape
    own, across, other = (((a @ b.T) / d + 1) ** 3 for a, b in ((x, x), (x, y), (y, y)))
    among_other = (other.sum() - np.trace(other)) / (m * (m - 1))
    to_other, alone = across.mean(axis=1), np.diag(own)

    def statistic(rows: Rows) -> float:
        weight = np.bincount(rows, minlength=len(x)).astype(np.float64)
        pairs = weight.sum() ** 2 - (weight**2).sum()
        if not pairs:
            return float("nan")
        among = (weight @ own @ weight - (weight**2) @ alone) / pairs
        return float(among + among_other - 2 * (weight @ to_other) / weight.sum())

    return Values(statistic)
