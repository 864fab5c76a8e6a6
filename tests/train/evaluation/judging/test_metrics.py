"""The tables' numbers, against closed forms and brute force."""

from __future__ import annotations

import numpy as np
import pytest

from train.evaluation.judging.metrics import (
    copy_threshold,
    frechet_distance,
    memorized_share,
    pixel_correlation,
    retrieval_rank,
    similarity_among_seeds,
)


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def with_moments(n: int, mean: np.ndarray, cov: np.ndarray, seed: int) -> np.ndarray:
    """``n`` rows whose sample mean and covariance are exactly these."""
    x = np.random.default_rng(seed).normal(size=(n, len(mean)))
    x -= x.mean(axis=0)
    x = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T
    return x @ np.linalg.cholesky(cov).T + mean


def test_frechet_distance_of_gaussians_is_the_closed_form():
    # Commuting covariances: ‖μ‖² + Σ (√λ_a − √λ_b)².
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    a = with_moments(50, np.array([1.0, 2.0, 3.0]), rotation @ np.diag([1.0, 4.0, 9.0]) @ rotation.T, 1)
    b = with_moments(70, np.array([1.0, 0.0, 3.0]), rotation @ np.diag([4.0, 4.0, 1.0]) @ rotation.T, 2)
    assert frechet_distance(a, b) == pytest.approx(4 + 1 + 0 + 4)
    # Others: (Σ_a Σ_b)^½ from its eigenvalues.
    cov_a, cov_b = np.array([[2.0, 0.5], [0.5, 1.0]]), np.array([[1.0, -0.3], [-0.3, 3.0]])
    a, b = with_moments(50, np.zeros(2), cov_a, 3), with_moments(60, np.zeros(2), cov_b, 4)
    cross = np.sqrt(np.linalg.eigvals(cov_a @ cov_b)).sum().real
    assert frechet_distance(a, b) == pytest.approx(np.trace(cov_a) + np.trace(cov_b) - 2 * cross)


def test_frechet_distance_holds_with_fewer_rows_than_features():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(10, 40)), rng.normal(size=(12, 40))
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a))
    assert frechet_distance(a, a + 2.0) == pytest.approx(160)
    with pytest.raises(ValueError, match="two rows"):
        frechet_distance(a[:1], b)


def test_similarity_among_seeds_averages_pairs_within_prompts():
    rng = np.random.default_rng(0)
    rows = unit(rng.normal(size=(9, 6)))
    prompts = np.array(["a", "b", "a", "b", "a", "c", "b", "b", "a"])
    means = []
    for prompt in "ab":
        mine = rows[prompts == prompt]
        means.append(np.mean([mine[i] @ mine[j] for i in range(len(mine)) for j in range(i)]))
    assert similarity_among_seeds(rows, prompts) == pytest.approx(np.mean(means))
    assert np.isnan(similarity_among_seeds(rows[:2], ["a", "b"]))


def test_retrieval_rank_counts_from_one_and_ties_against():
    texts = np.eye(4)
    images = unit(np.array([[3.0, 1, 2, 0], [3.0, 1, 2, 0], [3.0, 1, 2, 0], [1.0, 1, 1, 1]]))
    assert retrieval_rank(images, texts, [0, 2, 3, 1]).tolist() == [1, 2, 4, 4]


def test_memorized_share_is_strict_and_refuses_nothing():
    assert memorized_share([0.5, 0.51, 0.2, 0.9]) == 0.5
    assert memorized_share([0.5, 0.51], threshold=0.4) == 1
    with pytest.raises(ValueError, match="no images"):
        memorized_share([])


def test_copy_threshold_lets_its_share_of_the_innocent_pass():
    similarities = np.random.default_rng(0).normal(size=10_000)
    assert np.mean(similarities > copy_threshold(similarities)) == pytest.approx(0.01, abs=1e-3)
    assert np.mean(similarities > copy_threshold(similarities, 0.9)) == pytest.approx(0.1, abs=1e-3)


def test_pixel_correlation_is_numpys_at_16_by_16():
    rng = np.random.default_rng(0)
    a, b = rng.random((2, 3, 64, 64)), rng.random((3, 3, 32, 32))
    small_a = a.reshape(2, 3, 16, 4, 16, 4).mean(axis=(3, 5)).reshape(2, -1)
    small_b = b.reshape(3, 3, 16, 2, 16, 2).mean(axis=(3, 5)).reshape(3, -1)
    expected = np.corrcoef(small_a, small_b)[:2, 2:]
    assert pixel_correlation(a, b) == pytest.approx(expected, abs=1e-5)
    # Brightness and contrast do not matter, a plain image correlates with nothing.
    assert pixel_correlation(a, 0.3 * a + 0.5)[0, 0] == pytest.approx(1, abs=1e-5)
    assert pixel_correlation(np.ones((1, 3, 16, 16)), a).tolist() == [[0, 0]]
    with pytest.raises(ValueError, match="averaged down"):
        pixel_correlation(np.ones((1, 3, 20, 20)), a)


def test_pixel_correlation_tells_copies_from_other_emoji(emoji):
    from curate.reading.images import stack_images

    pixels = stack_images([image for image, _ in emoji], 64)
    jpeg = stack_images([image.resize((50, 50)).resize((64, 64)) for image, _ in emoji], 64)
    correlation = pixel_correlation(jpeg, pixels)
    assert np.diag(correlation).min() > 0.9
