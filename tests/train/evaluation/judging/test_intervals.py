"""Intervals over prompts: as wide as prompts are few, whatever the number of images."""

from __future__ import annotations

import numpy as np
import pytest

from train.evaluation.judging.intervals import interval, mean, median, ratio, resampled, share


def test_more_images_of_the_same_prompts_do_not_narrow_the_interval():
    of_prompts = np.random.default_rng(0).normal(size=30)
    once, often = np.arange(30), np.repeat(np.arange(30), 8)
    few = interval(mean(of_prompts), once, resampled(once, 1000))
    many = interval(mean(of_prompts[often]), often, resampled(often, 1000))
    assert many == pytest.approx(few)
    independent = np.arange(240)  # as it would be if images counted
    alone = interval(mean(of_prompts[often]), independent, resampled(independent, 1000))
    assert alone[1] - alone[0] < 0.5 * (few[1] - few[0])


def test_the_interval_holds_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    prompts, hits = np.repeat(np.arange(40), 2), 0
    for trial in range(200):
        images = np.repeat(rng.normal(3, 1, 40), 2) + rng.normal(0, 0.5, 80)
        low, high = interval(mean(images), prompts, resampled(prompts, 200, seed=trial))
        hits += low <= 3 <= high
    assert 0.88 <= hits / 200 <= 0.99


def test_a_share_that_rests_on_few_prompts_has_the_exact_binomial_interval_over_prompts():
    prompts = np.repeat(np.arange(24), 2)
    choices = resampled(prompts, 50)
    low, high = interval(share(np.zeros(48)), prompts, choices)
    assert low == 0
    assert (1 - high) ** 24 == pytest.approx(0.025)  # so likely no copy among 24 prompts, were the share so high
    assert interval(share(np.ones(48)), prompts, choices) == (pytest.approx(1 - high), 1.0)
    some = np.zeros(48)
    some[:2] = 1
    one = interval(share(some), prompts, choices)
    assert one == pytest.approx((0.00105, 0.2112), abs=1e-3)  # of 1 in 24, by the tables of Clopper and Pearson
    some[1] = 0
    half = interval(share(some), prompts, choices)
    assert high < half[1] < one[1]  # more copies, no narrower a bound
    some[:24] = 1
    many = interval(share(some), prompts, resampled(prompts, 500))
    assert many[0] < 0.5 < many[1] and many[1] - many[0] < 0.5


def test_one_prompt_has_no_interval():
    assert resampled(["a"] * 5, 100) == []
    assert np.isnan(interval(mean(np.arange(5)), ["a"] * 5, [])).all()


def test_a_ratio_takes_the_images_that_have_both_and_keeps_pairs_together():
    over, under = np.array([1.0, 2.0, np.nan, 9.0]), np.array([2.0, 4.0, 5.0, np.nan])
    values, prompts = ratio(over, under), ["a", "b", "c", "d"]
    assert values.statistic(np.arange(4)) == pytest.approx(0.5)
    assert interval(values, prompts, resampled(prompts, 200)) == (pytest.approx(0.5), pytest.approx(0.5))
    assert np.isnan(values.statistic(np.array([2, 3])))


def test_means_leave_out_what_is_no_number_and_medians_are_medians():
    assert mean([1.0, np.nan, 3.0]).statistic(np.array([0, 1, 1, 2])) == 2
    assert median([1.0, 5.0, 9.0]).statistic(np.array([0, 2, 2])) == 9


def test_the_same_seed_chooses_the_same_prompts_with_all_their_images():
    prompts = ["b", "a", "b", "c"]
    first, again = resampled(prompts, 20), resampled(prompts, 20)
    assert all(np.array_equal(one, other) for one, other in zip(first, again, strict=True))
    for rows in first:
        assert (rows == 0).sum() == (rows == 2).sum()  # both images of b, or neither
