"""Which of several drawings is kept, and how guidance grows stronger from one to the next."""

import pytest

from tests.train.sampling.terms.known_parts import Embedder, index_near, make_state
from train.sampling.config import AMGConfig
from train.sampling.terms.amg import AMG
from train.sampling.terms.random_tokens import RandomTokens
from train.sampling.terms.rejection import Accepted, NeverAbove, draw_again, strengthened, stronger


def test_rejection_and_the_guarantee_keep_the_farthest_and_refuse_what_is_no_number():
    values = {0: [0.9, float("nan"), 0.7], 1: [float("nan"), 0.6, 0.8]}

    def draw(attempt, rows, seeds):
        return [Accepted(attempt, seed, values[row][attempt], 1, []) for row, seed in zip(rows, seeds, strict=True)]

    assert [(one.image, one.tries) for one in draw_again(draw, [5, 6], 3, 0.5)] == [(2, 3), (1, 3)]


def test_what_guidance_acted_on_has_a_lower_limit_than_what_never_came_near(monkeypatch):
    index, embedder = index_near(make_state(["red apple"]), 0, 0.5), Embedder()
    values, fired = {5: 0.45, 6: 0.45, 7: 0.39}, {5: ["dissimilarity"], 6: [], 7: ["despecification"]}

    def found(output, seeds, judges):
        first = [seed in values for seed in seeds]
        return [
            Accepted("first", seed, values[seed], 1, [{"image": 0, "fired": fired[seed]}])
            if before
            else Accepted("again", seed, 0.1, 1, [{"image": 0, "fired": []}])
            for seed, before in zip(seeds, first, strict=True)
        ]

    monkeypatch.setattr("train.sampling.terms.rejection.judged", found)
    never = NeverAbove(index, embedder, withhold=False, guided=0.4)
    kept = never(lambda rows, seeds, guidance: None, [5, 6, 7])
    assert [(one.image, one.tries) for one in kept] == [("again", 2), ("first", 1), ("first", 1)]
    kept = NeverAbove(index, embedder, withhold=False)(lambda rows, seeds, guidance: None, [5, 6, 7])
    assert [one.image for one in kept] == ["first"] * 3
    assert NeverAbove(index, embedder, limit=0.3, guided=0.4).guided == 0.3


def test_guidance_grows_stronger_as_from_main_to_strong():
    index, embedder = index_near(make_state(["red apple"]), 0, 0.5), Embedder()
    once, strong = stronger(AMGConfig(), 1), AMGConfig(preset="strong").resolved()
    for name in ("lambda_a", "lambda_b", "sim_offset", "c_3"):
        assert getattr(once, name) == pytest.approx(getattr(strong, name))
    assert [stronger(AMGConfig(), times).floor for times in (1, 2, 3)] == [0.0, -1.0, -1.0]
    assert stronger(AMGConfig(floor=-3.0), 2).floor == -3.0
    amg, other = AMG(index, embedder), AMG(index, embedder, lambda_b=0.7)
    assert strengthened([], 0, amg) == [] and strengthened([], 1, amg) == [amg]
    tokens, last = strengthened([], 3, amg)
    assert last.config == stronger(AMGConfig(), 2) and tokens.config.number == 4  # other words, as AMG alone did not do
    assert [term.name for term in strengthened([RandomTokens(number=1)], 3, amg)] == ["tokens", "amg"]
    assert strengthened([other], 1, amg)[0].config.lambda_b == pytest.approx(0.6)
