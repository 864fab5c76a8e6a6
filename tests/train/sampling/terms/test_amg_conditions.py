"""Where and when anti-memorization guidance acts: above its threshold, within its range, on no other image."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from tests.train.sampling.terms.known_parts import Embedder, act, decode, denoise, index_near, make_state, only
from train.sampling.config import AMGConfig
from train.sampling.terms.amg import AMG


def test_only_images_above_the_threshold_change_and_the_others_keep_every_bit():
    state = make_state(["red apple", "car", "tree"])
    amg = AMG(index_near(state, 1, 0.75), Embedder())
    eps_hat, _, columns = act(state, amg)
    assert torch.equal(eps_hat[[0, 2]], state.eps_hat[[0, 2]])
    assert not torch.equal(eps_hat[1], state.eps_hat[1])
    assert columns["similarity"][0] < columns["threshold"][0] < columns["similarity"][1]
    assert columns["s_1"][0] is None and columns["caption"][2] is None


def test_a_similarity_at_the_threshold_does_not_fire():
    state = make_state(["red apple"])
    index = index_near(state, 0, 0.75)
    sigma = act(state, AMG(index, Embedder()))[2]["similarity"][0]
    at = AMG(index, Embedder(), schedule="constant", lambda_b=sigma)
    assert act(state, at)[1] == {}
    assert act(state, AMG(index, Embedder(), schedule="constant", lambda_b=sigma - 1e-4))[1]


@pytest.mark.parametrize("term", ["despecification", "deduplication", "dissimilarity"])
def test_each_term_can_be_switched_off(term):
    state = make_state(["red apple"])
    options = {"c_1": 2.0, "c_2": 2.0, "schedule": "constant", "lambda_b": -1.0}
    index = index_near(state, 0, 0.75)
    assert set(act(state, AMG(index, Embedder(), **options))[1]) == {
        "despecification",
        "deduplication",
        "dissimilarity",
    }
    assert term not in act(state, AMG(index, Embedder(), **options, **{term: False}))[1]


def test_outside_its_range_of_timesteps_nothing_is_evaluated():
    state = make_state(["red apple"])
    amg = AMG(index_near(state, 0, 0.75), Embedder(), t_range=(500, 1000))
    amg.similarity = SimpleNamespace()
    eps_hat, parts, columns = act(state, amg)
    assert torch.equal(eps_hat, state.eps_hat) and parts == {} and columns == {}


def test_the_dissimilarity_term_has_a_range_of_its_own():
    state = make_state(["red apple"])
    index = index_near(state, 0, 0.75)
    options = {"sim_t_range": (500.0, 1000.0), "schedule": "constant", "lambda_b": -1.0}
    _, parts, columns = act(state, AMG(index, Embedder(), **options))
    assert "despecification" in parts and "dissimilarity" not in parts
    assert "dissimilarity" in act(replace(state, t=600.0), AMG(index, Embedder(), **options))[1]


def test_quiet_images_are_watched_every_kth_step_and_guided_ones_at_each():
    state = make_state(["red apple", "car"])
    amg = AMG(index_near(state, 0, 0.75), Embedder(), every=3)
    step = amg.start(state.run)
    watched = []
    for i in range(5):
        columns = step(replace(state, step=i)).columns
        watched.append([similarity is not None for similarity in columns["similarity"]])
    assert watched == [[True, True], [True, False], [True, False], [True, True], [True, False]]


def test_what_is_guided_is_let_go_lower_than_where_guidance_began():
    state = make_state(["red apple", "car"])
    options = {"schedule": "constant", "lambda_b": 0.5, "release": 0.2, **only(despecification=True)}
    amg = AMG(index_near(state, 0, 0.75), Embedder(), **options)
    step = amg.start(state.run)
    assert 0 in step(state).parts["despecification"].rows  # 0.75
    later = replace(state, step=1)
    for cosine, fires in ((0.4, True), (0.25, False), (0.4, False)):  # let go at 0.25, it has to reach 0.5 again
        amg.similarity.index = index_near(state, 0, cosine)
        correction = step(later)
        assert ("despecification" in correction.parts) == fires
        assert correction.columns["similarity"][0] == pytest.approx(cosine, abs=1e-4)
    assert correction.columns["threshold"] == pytest.approx([0.5, 0.5])
    assert step(replace(state, step=2)) and AMGConfig().resolved().release == 0


def test_the_share_of_the_scale_that_is_taken_does_not_depend_on_the_scale():
    state = make_state(["red apple", "car"])
    options = {"schedule": "constant", "lambda_b": 0.1, "c_1": 2.0, **only(despecification=True)}
    index = index_near(state, 0, 0.75)
    for scale in (7.5, 4.0):
        asked = replace(state, guidance_scale=scale, scale=torch.full((2,), scale))
        _, _, columns = act(asked, AMG(index, Embedder(), c_1_at=7.5, **options))
        assert columns["s_1"][0] == pytest.approx(1.5 * scale / 7.5, abs=1e-4)
        _, _, columns = act(asked, AMG(index, Embedder(), **options))
        assert columns["s_1"][0] == pytest.approx(1.5, abs=1e-4)


def test_the_linear_decoder_is_watched_and_steered_through_instead_of_the_full_one():
    def broken(latents: Tensor) -> Tensor:
        raise AssertionError("decoded in full")

    state = make_state(["red apple", "car"])
    index = index_near(state, 0, 0.75)
    expected = act(state, AMG(index, Embedder()))[0]
    state = replace(state, run=replace(state.run, decode=broken, preview=decode))
    assert torch.equal(act(state, AMG(index, Embedder(), decoder="linear"))[0], expected)
    with pytest.raises(AssertionError, match="in full"):
        act(state, AMG(index, Embedder()))


def test_the_prediction_under_the_nearest_caption_is_known_where_the_prompt_is_that_caption():
    state = make_state(["a known cat", "car"])
    asked = []

    def watched(x_t: Tensor, embeds: Tensor, rows: Tensor) -> Tensor:
        asked.append(rows.tolist())
        return denoise(x_t, embeds)

    options = {"schedule": "constant", "lambda_b": -1.0, **only(deduplication=True)}
    index = index_near(state, 0, 0.75)
    _, parts, columns = act(replace(state, denoise=watched), AMG(index, Embedder(), **options))
    delta = -columns["s_2"][0] * (state.eps_cond[:1] - state.eps_uncond[:1])
    torch.testing.assert_close(parts["deduplication"].delta[:1], delta)
    assert all(rows == [1] for rows in asked) and asked  # only the image whose prompt is another caption


def test_without_classifier_free_guidance_only_the_dissimilarity_term_acts():
    state = replace(make_state(["red apple"], scale=1.0), eps_uncond=None, uncond=None)
    _, parts, _ = act(state, AMG(index_near(state, 0, 0.75), Embedder(), through_unet=True))
    assert set(parts) == {"dissimilarity"}
