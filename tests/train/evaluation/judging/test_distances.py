"""Distances of resampled images, against the distances of the repeated rows themselves."""

from __future__ import annotations

import numpy as np
import pytest

from train.evaluation.judging.distances import frechet, kernel_distance
from train.evaluation.judging.intervals import interval, resampled
from train.evaluation.judging.metrics import frechet_distance


@pytest.mark.parametrize(("n", "m", "d"), [(12, 20, 40), (12, 60, 8), (50, 15, 8), (40, 30, 100)])
def test_frechet_distance_of_a_choice_is_that_of_its_rows(n, m, d):
    rng = np.random.default_rng(0)
    features, reference = rng.normal(size=(n, d)) + 1, rng.normal(size=(m, d)) * 2
    values = frechet(features, reference)
    for rows in (np.arange(n), rng.integers(n, size=n), rng.integers(n, size=2 * n)):
        assert values.statistic(rows) == pytest.approx(frechet_distance(features[rows], reference), rel=1e-6)


def test_the_interval_of_a_frechet_distance_holds_the_distance_itself():
    """Choices with repeats have fewer distinct images, which alone makes the distance larger."""
    rng = np.random.default_rng(0)
    features, reference = rng.normal(size=(30, 64)), rng.normal(size=(60, 64))
    values, prompts = frechet(features, reference), np.arange(30)
    choices = resampled(prompts, 200)
    value = values.statistic(prompts)
    assert np.quantile([values.statistic(rows) for rows in choices], 0.025) > value
    low, high = interval(values, prompts, choices)
    assert low < value < high


def test_kernel_distance_is_the_unbiased_estimate_over_pairs_of_different_images():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(6, 4)), rng.normal(size=(9, 4)) + 0.5
    values = kernel_distance(x, y)
    for rows in (np.arange(6), np.array([0, 0, 1, 3, 3, 5])):
        k = lambda a, b: (a @ b / 4 + 1) ** 3  # noqa: E731
        own = [k(x[i], x[j]) for i in rows for j in rows if i != j]
        other = [k(y[i], y[j]) for i in range(9) for j in range(9) if i != j]
        across = [k(x[i], y[j]) for i in rows for j in range(9)]
        assert values.statistic(rows) == pytest.approx(np.mean(own) + np.mean(other) - 2 * np.mean(across))


@pytest.mark.parametrize("distance", [frechet, kernel_distance])
def test_one_image_has_no_distance_and_is_none_to_measure_from(distance):
    rng = np.random.default_rng(0)
    assert np.isnan(distance(rng.normal(size=(5, 3)), rng.normal(size=(1, 3))).statistic(np.arange(5)))
    assert np.isnan(distance(rng.normal(size=(5, 3)), rng.normal(size=(9, 3))).statistic(np.arange(1)))


def test_kernel_distance_is_about_nothing_between_sets_of_one_kind():
    rng = np.random.default_rng(0)
    distances = [kernel_distance(*rng.normal(size=(2, 40, 8))).statistic(np.arange(40)) for _ in range(50)]
    far = kernel_distance(rng.normal(size=(40, 8)) + 1, rng.normal(size=(40, 8))).statistic(np.arange(40))
    assert abs(np.mean(distances)) < 0.1 * far
