"""The numbers of the tables, as pure functions of arrays (numpy only).

Copies: ``memorized_share``, ``copy_threshold``, ``pixel_correlation``, ``similarity_among_seeds``.
Faithfulness and
quality: ``retrieval_rank``, ``frechet_distance``. Detection: ``roc_auc``, ``roc_curve``, ``tpr_at_fpr``,
``bootstrap_interval``, which live beside the detector in ``train.memorization.detection.roc``.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from train.memorization.detection.roc import bootstrap_interval, roc_auc, roc_curve, tpr_at_fpr

PIXEL_COPY = 0.9
"""Correlation of 16 × 16 pixels above which an image counts as a pixel copy."""
__all__ = [
    "PIXEL_COPY",
    "bootstrap_interval",
    "copy_threshold",
    "frechet_distance",
    "memorized_share",
    "pixel_correlation",
    "retrieval_rank",
    "roc_auc",
    "roc_curve",
    "similarity_among_seeds",
    "thumbnails",
    "tpr_at_fpr",
]
Floats = NDArray[np.floating]


def memorized_share(similarity: ArrayLike, threshold: float = 0.5) -> float:
    """Share of images whose similarity to their nearest training image is above the threshold (strictly).

    Args:
        similarity: ``[n]``, each image's similarity to its nearest training image.
        threshold: 0.5 is the replication threshold of the literature on SSCD's scale.
    """
    similarity = np.asarray(similarity, np.float64)
    _some(similarity)
    return float(np.mean(similarity > threshold))


def copy_threshold(nn_similarities: ArrayLike, quantile: float = 0.99) -> float:
    """Similarity above which an image counts as a copy.

    In a small set the *nearest* of n training images is similar to anything, so the threshold rests on the
    nearest-neighbour similarities of images that are known not to be copies; of those, ``1 − quantile`` are
    above it.

    Args:
        nn_similarities: ``[n]``, nearest-neighbour similarities of images known not to be copies.
        quantile: in (0, 1).
    """
    similarities = np.asarray(nn_similarities, np.float64)
    _some(similarities)
    return float(np.quantile(similarities, quantile))


def similarity_among_seeds(embeddings: ArrayLike, prompts: ArrayLike) -> float:
    """Mean cosine of all pairs of images that were drawn for one prompt from different seeds, averaged over
    prompts.

    Args:
        embeddings: ``[n, d]`` unit rows.
        prompts: ``[n]`` which prompt each row was drawn for.

    Returns:
        In [-1, 1]; NaN when no prompt has two images.
    """
    embeddings, prompts = np.asarray(embeddings, np.float64), np.asarray(prompts)
    means = []
    for prompt in np.unique(prompts):
        rows = embeddings[prompts == prompt]
        n = len(rows)
        if n > 1:  # Σ_{i≠j} aᵢ·aⱼ = ‖Σ aᵢ‖² − Σ ‖aᵢ‖²
            means.append((np.sum(rows.sum(axis=0) ** 2) - np.sum(rows**2)) / (n * (n - 1)))
    return float(np.mean(means)) if means else float("nan")


def thumbnails(pixels: ArrayLike, size: int = 16) -> Floats:
    """Images as centred unit rows, whose products are plain correlations.

    Args:
        pixels: ``[n, 3, H, W]``; H and W are multiples of ``size``.
        size: side that images are averaged down to.

    Returns:
        ``[n, 3·size²]`` float32 unit rows; a plain image of one colour in all channels gives a zero row.
    """
    pixels = np.asarray(pixels, np.float32)
    n, channels, height, width = pixels.shape
    if height % size or width % size:
        raise ValueError(f"images of {height} × {width} pixels cannot be averaged down to {size} × {size}")
    blocks = pixels.reshape(n, channels, size, height // size, size, width // size)
    rows = blocks.mean(axis=(3, 5), dtype=np.float64).reshape(n, -1)
    rows -= rows.mean(axis=1, keepdims=True)
    norm = np.linalg.norm(rows, axis=1, keepdims=True)
    return (rows / np.where(norm > 1e-6, norm, np.inf)).astype(np.float32)


def pixel_correlation(images: ArrayLike, others: ArrayLike, size: int = 16) -> Floats:
    """Plain correlation of every image with every other at 16 × 16 pixels: a judge without any learned part.

    Args:
        images: ``[n, 3, H, W]``.
        others: ``[m, 3, H, W]``.
        size: side that images are averaged down to.

    Returns:
        ``[n, m]`` float32 in [-1, 1].
    """
    return thumbnails(images, size) @ thumbnails(others, size).T


def retrieval_rank(images: ArrayLike, texts: ArrayLike, own: ArrayLike) -> NDArray[np.int64]:
    """Rank, from 1, of each image's own caption among all candidates; ties count against it.

    Args:
        images: ``[n, d]`` unit rows of the joint space.
        texts: ``[m, d]`` unit rows, the candidate captions, without repeats.
        own: ``[n]`` which candidate is the image's own caption.

    Returns:
        ``[n]`` int64 in 1 … m.
    """
    similarity = np.asarray(images, np.float32) @ np.asarray(texts, np.float32).T
    own = np.asarray(own, np.int64)
    return np.sum(similarity >= similarity[np.arange(len(own)), own][:, None], axis=1).astype(np.int64)


def frechet_distance(a: ArrayLike, b: ArrayLike) -> float:
    """``‖μ_a − μ_b‖² + tr(Σ_a + Σ_b − 2 (Σ_a Σ_b)^½)`` of two sets of features (Heusel et al., 2017, eq. 6).

    The standard definition: sample covariances with n − 1, no shrinkage. It grows as sets get smaller, so
    only sets of like size can be compared with one another; which features it stands on has to be named
    beside every value.

    Args:
        a: ``[n, d]`` features, n ≥ 2.
        b: ``[m, d]`` features, m ≥ 2.

    Returns:
        ``≥ 0``, in squared units of the features.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if len(a) < 2 or len(b) < 2:
        raise ValueError(f"a Fréchet distance needs at least two rows on each side, got {len(a)} and {len(b)}")
    shift = a.mean(axis=0) - b.mean(axis=0)
    cov_a, cov_b = np.atleast_2d(np.cov(a, rowvar=False)), np.atleast_2d(np.cov(b, rowvar=False))
    # tr (Σ_a Σ_b)^½ = Σ √eig(R Σ_b R) with R = Σ_a^½: symmetric, so eigh serves even where Σ_a is singular.
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    cross = np.sqrt(np.clip(np.linalg.eigvalsh(root @ cov_b @ root), 0, None)).sum()
    return max(float(shift @ shift + np.trace(cov_a) + np.trace(cov_b) - 2 * cross), 0.0)


def _some(values: Floats) -> None:
    if values.size == 0:
        raise ValueError("no images to measure")

