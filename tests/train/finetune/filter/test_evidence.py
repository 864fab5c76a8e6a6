"""What several visits to a sample say together."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from train.finetune.filter.evidence import FORGOTTEN, Evidence

QUANTILE = 0.9


def against(evidence: Evidence, scores: np.ndarray, step: int, unique: bool = True) -> np.ndarray:
    """One visit of each key 0 … n − 1 at a step: which verdicts are against their key."""
    keys, z = list(range(len(scores))), torch.from_numpy(scores).clamp(-Evidence.LIMIT, Evidence.LIMIT)
    verdicts = z >= evidence.needed(keys, (), step)
    evidence.add(keys, z, [unique] * len(keys), step)
    return verdicts.numpy()


def test_a_single_visit_is_judged_by_its_own_score():
    evidence = Evidence(50, QUANTILE, QUANTILE)
    at = float(torch.special.ndtri(torch.tensor(QUANTILE, dtype=torch.float64)))
    assert against(evidence, np.array([at - 1e-6, at + 1e-6]), 0).tolist() == [False, True]


@pytest.mark.parametrize("correlation", [0.0, 0.4])
def test_a_unique_sample_is_left_out_as_often_however_often_it_was_visited(correlation):
    # 4000 samples whose scores are their own level plus noise, visited at each of 40 steps.
    rng, n = np.random.default_rng(0), 4000
    level = rng.standard_normal(n) * correlation**0.5
    evidence, shares = Evidence(30, QUANTILE, QUANTILE), []
    for step in range(40):
        scores = level + rng.standard_normal(n) * (1 - correlation) ** 0.5
        shares.append(against(evidence, scores, step).mean())
    assert evidence.correlation == pytest.approx(correlation, abs=0.03)
    assert shares[0] == pytest.approx(1 - QUANTILE, abs=0.02)
    assert np.mean(shares[-10:]) == pytest.approx(1 - QUANTILE, abs=0.02)


def test_a_memorized_sample_shows_after_visits_of_which_none_alone_would_tell():
    rng, n = np.random.default_rng(1), 2000
    evidence, shares = Evidence(30, QUANTILE, QUANTILE), []
    for step in range(25):
        shares.append(against(evidence, rng.standard_normal(n) + 0.8, step, unique=False).mean())
    assert shares[0] < 0.4
    assert shares[-1] > 0.95


def test_a_verdict_holds_until_the_evidence_falls_below_the_release():
    evidence = Evidence(10, QUANTILE, 0.5)
    new, again = evidence.needed([1, 2], {2}, 0).tolist()
    assert new == pytest.approx(1.2816, abs=1e-3) and again == pytest.approx(0, abs=1e-9)


def test_older_visits_count_less_and_are_forgotten():
    evidence = Evidence(10, QUANTILE, 0.5)
    evidence.add([1], torch.tensor([2.0], dtype=torch.float64), [False], 0)
    fade = np.exp(-0.5)
    assert evidence.before(1, 5) == pytest.approx((2 * fade, fade, fade**2))
    evidence.add([2], torch.tensor([0.0], dtype=torch.float64), [False], 10 * FORGOTTEN)
    assert set(evidence.of) == {2}


def test_visits_of_one_step_do_not_count_for_each_other_and_all_of_them_do_afterwards():
    evidence = Evidence(10, QUANTILE, 0.5)
    assert len(set(evidence.needed([7, 7], (), 0).tolist())) == 1
    evidence.add([7, 7], torch.tensor([1.0, 2.0], dtype=torch.float64), [False, False], 0)
    assert evidence.before(7, 0) == (3.0, 2.0, 2.0)
    restored = Evidence(10, QUANTILE, 0.5)
    restored.load_state_dict(evidence.state_dict())
    assert restored.needed([7, 8], (), 3).tolist() == evidence.needed([7, 8], (), 3).tolist()
