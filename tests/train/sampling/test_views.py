"""The highest of several similarities: firing, steering and judging by it, and a floor that falls."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.train.sampling.terms.known_parts import Embedder, Index, act, index_near, make_state, only
from train.sampling.config import AMGConfig
from train.sampling.guidance import guide
from train.sampling.similarity import ObjectLevel, Views
from train.sampling.terms.amg import AMG
from train.sampling.terms.amg_strengths import exponential, floor_left


class Other(Embedder):
    """Sees only the first channel."""

    name = "other"

    def features(self, pixels):
        first = torch.cat([pixels[:, :1], torch.full_like(pixels[:, 1:], 0.5)], 1)
        return super().features(first)


def other_index(state, image: int, cosine: float) -> Index:
    """Sample 0 lies at ``cosine`` from one image as the other embedder sees it."""
    from tests.train.sampling.terms.known_parts import decode

    near = Other().features(decode(state.x0()))[image]
    aside = torch.randn(32, generator=torch.Generator().manual_seed(3))
    aside = torch.nn.functional.normalize(aside - (aside @ near) * near, dim=0)
    index = Index((cosine * near + (1 - cosine**2) ** 0.5 * aside)[None], ["seen by the other"], [1])
    index.embedder = "other"
    return index


def test_the_highest_view_decides_with_its_own_row():
    state = make_state(["red apple", "car"])
    own, other = index_near(state, 0, 0.45), other_index(state, 1, 0.6)
    views = Views({"linear": ObjectLevel(own, Embedder()), "other": ObjectLevel(other, Other())})
    pixels = state.decode(state.x0())
    near = views.nearest(pixels, 3)
    assert near.sigma[1, 0] == pytest.approx(0.6, abs=1e-4) and near.sigma.shape == (2, 3)
    assert (near.sigma[:, :-1] >= near.sigma[:, 1:]).all()
    names, rows = views.of(near.rows[:, 0])
    assert names == ["linear" if near.rows[0, 0] < 2 else "other", "other"] and rows[1] == 0
    assert views.captions[int(near.rows[1, 0])] == "seen by the other"
    sigma, found = views.against(pixels)
    torch.testing.assert_close(sigma, near.sigma[:, 0])
    assert found[1] == near.rows[1, 0]


def test_the_gradient_is_that_of_the_highest_where_the_others_are_far_below():
    state = make_state(["red apple"])
    own, other = ObjectLevel(index_near(state, 0, 0.1), Embedder()), ObjectLevel(other_index(state, 0, 0.9), Other())
    pixels = state.decode(state.x0()).requires_grad_()
    (both,) = torch.autograd.grad(Views({"a": own, "b": other}).against(pixels)[0].sum(), pixels)
    (alone,) = torch.autograd.grad(other.against(pixels)[0].sum(), pixels)
    torch.testing.assert_close(both, alone, rtol=1e-3, atol=1e-6)


def test_a_copy_that_the_index_embedder_does_not_see_fires_by_another_view():
    state = make_state(["red apple", "car"])
    own, views = index_near(state, 0, 0.05), [(other_index(state, 1, 0.8), Other())]
    settings = {"preset": "main", **only(despecification=True)}
    blind = AMG(own, Embedder(), views=views, **settings)  # main is published: it follows the index alone
    eps_hat, parts, _ = act(state, blind)
    assert not parts and torch.equal(eps_hat, state.eps_hat)
    eps_hat, parts, columns = act(state, AMG(own, Embedder(), AMGConfig(views=True), views=views, **settings))
    assert parts["despecification"].rows.tolist()[-1] == 1
    assert columns["view"][1] == "other" and columns["nearest"][1] == 0
    for image in range(2):  # what does not fire keeps every bit
        fired = image in parts["despecification"].rows.tolist()
        assert torch.equal(eps_hat[image], state.eps_hat[image]) != fired


def test_the_floor_falls_with_the_time_above_the_threshold_and_no_further_than_its_least():
    config = AMGConfig(floor=0.0, escalate=4.0, least_floor=-2.0).resolved()
    above = torch.tensor([0.0, 100.0, 250.0, 900.0])
    torch.testing.assert_close(floor_left(above, config), torch.tensor([0.0, -0.4, -1.0, -2.0]))
    kept = replace(config, floor=-3.0)  # lower than the least already
    assert floor_left(above, kept).tolist() == [-3.0] * 4
    assert floor_left(above, replace(config, escalate=0.0)).tolist() == [0.0] * 4


def test_an_image_that_stays_above_loses_more_at_each_step_and_one_that_fell_below_does_not():
    state = make_state(["red apple", "car"])
    index = index_near(state, 0, 0.6)
    settings = {"preset": "main", "floor": 0.0, "release": 0.9, **only(despecification=True), "c_1": 1e3}
    amg = AMG(index, Embedder(), escalate=5.0, **settings)
    step = amg.start(state.run)
    left = []
    for number, t in enumerate((400.0, 360.0, 320.0)):
        _, _, columns = guide([("amg", step)], replace(state, t=t, step=number))
        left.append(7.5 - columns["s_1"][0])
    assert left == pytest.approx([0.0, -0.2, -0.4], abs=1e-5)
    # Below λ_t, and held by the release: it is guided as far as before.
    below = Index(torch.tensor(index.embeddings) * 1.0, index.captions, [3, 1], slope=0.5)
    assert 0.3 * 1.0 < 0.6 * 0.5 + 1e-6 < exponential(280.0)
    amg.similarity = ObjectLevel(below, Embedder())
    _, _, columns = guide([("amg", step)], replace(state, t=280.0, step=3))
    assert 7.5 - columns["s_1"][0] == pytest.approx(-0.4, abs=1e-5)
    np.testing.assert_allclose(columns["similarity"][0], 0.3, atol=1e-4)
