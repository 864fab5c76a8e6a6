"""Areas, true-positive rates and their intervals, against brute force."""

from __future__ import annotations

import numpy as np
import pytest

from train.memorization.detection.roc import bootstrap_interval, roc_auc, roc_curve, tpr_at_fpr


def scored(seed: int, n: int = 60, values: int = 25) -> tuple[np.ndarray, np.ndarray]:
    """Scores with many ties, and labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, n)
    return rng.integers(0, values, n) + 4.0 * labels, labels


@pytest.mark.parametrize("seed", range(5))
def test_auc_is_the_share_of_pairs_in_the_right_order(seed):
    scores, labels = scored(seed)
    pairs = [
        1.0 if p > q else 0.5 if p == q else 0.0 for p in scores[labels == 1] for q in scores[labels == 0]
    ]
    assert roc_auc(scores, labels) == pytest.approx(np.mean(pairs))
    fpr, tpr = roc_curve(scores, labels)
    assert np.trapezoid(tpr, fpr) == pytest.approx(np.mean(pairs))
    assert (fpr[0], tpr[0], fpr[-1], tpr[-1]) == (0, 0, 1, 1)


def test_auc_is_never_flipped():
    assert roc_auc([0, 1, 2, 3], [1, 1, 0, 0]) == 0


@pytest.mark.parametrize("fpr", [0.0, 0.01, 0.1, 0.25, 1.0])
@pytest.mark.parametrize("seed", range(5))
def test_tpr_is_the_best_of_all_thresholds_within_the_false_positive_rate(seed, fpr):
    scores, labels = scored(seed)
    best = max(
        np.mean(scores[labels == 1] >= cut)
        for cut in [*scores, np.inf]
        if np.mean(scores[labels == 0] >= cut) <= fpr + 1e-12
    )
    assert tpr_at_fpr(scores, labels, fpr) == pytest.approx(best)


def test_tpr_does_not_interpolate():
    # One of fifty negatives is on top: a threshold below it has FPR 2 %.
    scores, labels = np.array([9.0] + [0.0] * 49 + [5.0] * 10), np.array([0] * 50 + [1] * 10)
    assert tpr_at_fpr(scores, labels, 0.01) == 0
    assert tpr_at_fpr(scores, labels, 0.02) == 1


def test_scores_that_cannot_be_judged_are_refused():
    for scores, labels in (([1.0, 2.0], [1, 1]), ([np.nan, 1.0], [0, 1]), ([1.0], [0, 1])):
        with pytest.raises(ValueError):
            roc_auc(scores, labels)


def test_bootstrap_interval_covers_the_truth_about_as_often_as_it_says():
    # Normal scores a shift of 1 apart have an AUC of Φ(1/√2) = 0.7602.
    covered = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        scores = np.concatenate([rng.normal(0, 1, 60), rng.normal(1, 1, 60)])
        low, high = bootstrap_interval(roc_auc, scores, np.repeat([0, 1], 60), samples=200)
        covered += low <= 0.7602 <= high
    assert 33 <= covered <= 40


def test_bootstrap_is_a_function_of_its_seed():
    scores, labels = scored(0)
    one = bootstrap_interval(roc_auc, scores, labels, samples=50, seed=1)
    assert one == bootstrap_interval(roc_auc, scores, labels, samples=50, seed=1)
    assert one != bootstrap_interval(roc_auc, scores, labels, samples=50, seed=2)
