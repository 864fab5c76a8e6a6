"""Thresholds, strengths and the caption to leave, of anti-memorization guidance, against their equations."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from train.sampling.config import AMGConfig
from train.sampling.terms.amg_strengths import (
    antithesis,
    constant,
    deduplication_strength,
    despecification_strength,
    exponential,
    parabolic,
    schedule,
)


def test_the_exponential_schedule_is_the_released_one():
    assert exponential(0) == pytest.approx(0.4)
    assert exponential(200) == pytest.approx(0.3 + 0.1 * math.exp(-1), abs=1e-12)
    assert exponential(1000) == pytest.approx(0.3, abs=1e-3)
    assert exponential(250, a=1.95, b=1.5, c=0.025) == pytest.approx(1.95 - 0.45 * math.exp(-6.25))  # CIFAR's


def test_the_parabola_runs_between_the_same_ends():
    assert [parabolic(t) for t in (0, 500, 1000)] == pytest.approx([0.4, 0.325, 0.3])


def test_presets_and_schedules_of_a_config():
    main, strong = AMGConfig().resolved(), AMGConfig(preset="strong").resolved()
    assert (main.lambda_a, main.lambda_b, main.c_1, main.c_3, main.sim_offset) == (0.3, 0.4, 13.0, 100.0, 0.3)
    for t in (0.0, 300.0, 1000.0):
        assert schedule(main)(t) == exponential(t)
        assert schedule(strong)(t) == pytest.approx(exponential(t) - 0.1)
        assert schedule(replace(main, schedule="parabolic"))(t) == parabolic(t)
        assert schedule(replace(main, schedule="constant"))(t) == constant(t) == 0.4
    assert AMGConfig(preset="strong", c_3=1.5, lambda_a=0.25).resolved().c_3 == 1.5
    early = AMGConfig(preset="early", release=0.1).resolved()
    assert (early.decoder, early.floor, early.release, early.normalise) == ("linear", 0.0, 0.1, True)
    assert (main.decoder, main.release, main.t_range) == ("full", 0.0, (0.0, 1000.0))


def test_strengths_keep_a_scale_of_one_between_them():
    sigma = torch.tensor([-0.2, 0.1, 0.4, 0.9])
    s_1 = despecification_strength(sigma, 7.5)
    torch.testing.assert_close(s_1, torch.tensor([0.0, 1.3, 5.2, 6.5]))
    released = deduplication_strength(sigma, 7.5, s_1)
    torch.testing.assert_close(released, torch.tensor([0.0, 5.2 * 0.1 / 0.3, 1.3, 0.0]))
    paper = deduplication_strength(sigma, 7.5, s_1, c_2=2.0)
    torch.testing.assert_close(paper, torch.tensor([0.0, 0.2, 0.8, 0.0]))
    assert despecification_strength(sigma, 1.0).tolist() == [0, 0, 0, 0]
    assert despecification_strength(torch.tensor([0.9]), 7.5, 13.0, floor=-1.0).item() == 8.5


def test_a_strength_in_proportion_takes_the_same_share_of_every_scale():
    sigma, scales = torch.tensor([0.2, 0.2, 0.2]), torch.tensor([7.5, 3.75, 15.0])
    taken = despecification_strength(sigma, scales, 13.0, 0.0, c_1_at=7.5)
    torch.testing.assert_close(taken, torch.tensor([2.6, 1.3, 5.2]))
    assert despecification_strength(sigma, scales, 13.0, 0.0).tolist() == pytest.approx([2.6] * 3)
    with pytest.raises(ValueError, match="c_1_at"):
        AMGConfig(c_1_at=0.0).resolved()


def test_the_default_begins_later_than_the_published_form_and_lets_go_of_what_is_natural():
    main, views = AMGConfig().resolved(), AMGConfig(preset="views").resolved()
    for t in (0.0, 300.0, 900.0):
        assert schedule(views)(t) == pytest.approx(exponential(t) + 0.1)
    assert (views.release, views.floor, views.escalate, views.c_1_at) == (0.25, 1.0, 25.0, 7.5)
    assert (main.release, main.floor, main.escalate, main.c_1_at) == (0.0, 1.0, 0.0, None)


def test_the_caption_to_leave_is_the_frequent_one_or_else_the_nearest():
    captions = ["a cat", "A  Cat", "the dog", "a CAT", "bird"]
    assert antithesis(captions, [30, 30, 1, 30, 1], rows=[2, 1, 0, 3]) == "A  Cat"
    assert antithesis(captions, [20, 20, 1, 20, 1], rows=[2, 1, 0, 3]) == "the dog"  # not more than 20
    assert antithesis(captions, [30, 30, 1, 30, 1], rows=[4]) == "bird"
