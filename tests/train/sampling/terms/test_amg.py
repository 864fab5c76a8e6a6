"""Anti-memorization guidance against its equations, with a denoiser, decoder and embedder of closed form."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from afresh.errors import UserError
from tests.train.sampling.terms.known_parts import (
    Embedder,
    Index,
    act,
    analytic_gradient,
    decode,
    denoise,
    embed,
    index_near,
    make_state,
    only,
)
from train.sampling.terms.amg import AMG
from train.sampling.terms.amg_strengths import exponential
from train.sampling.terms.random_edits import random_edits

# ------------------------------------------------------------------------------------------ the three terms


def test_despecification_is_equation_14():
    state = make_state(["red apple", "car"])
    sigma = 0.45
    amg = AMG(index_near(state, 0, sigma), Embedder(), **only(despecification=True))
    eps_hat, parts, columns = act(state, amg)
    expected = -(13 * sigma) * (state.eps_cond[0] - state.eps_uncond[0])
    torch.testing.assert_close(parts["despecification"].delta[0], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(eps_hat[0], state.eps_hat[0] + expected, rtol=1e-5, atol=1e-5)
    assert columns["s_1"] == [pytest.approx(13 * sigma, abs=1e-5), None]
    assert columns["similarity"][0] == pytest.approx(sigma, abs=1e-5)
    assert columns["nearest"][0] == 0


def test_deduplication_is_equation_16_with_the_nearest_caption():
    state = make_state(["red apple", "car"])
    sigma, c_2 = 0.45, 4.0
    amg = AMG(index_near(state, 0, sigma), Embedder(), c_2=c_2, **only(deduplication=True))
    _, parts, columns = act(state, amg)
    eps_near = denoise(state.x_t[:1], embed("a known cat"))
    expected = -(c_2 * sigma) * (eps_near - state.eps_uncond[:1])
    torch.testing.assert_close(parts["deduplication"].delta, expected, rtol=1e-5, atol=1e-5)
    assert columns["caption"] == ["a known cat", None]


@pytest.mark.parametrize("form", ["paper", "released", "excess"])
@pytest.mark.parametrize("slope", [1.0, 0.8])
def test_dissimilarity_is_equation_17_through_decoder_embedder_and_calibration(form, slope):
    state = make_state(["red apple", "car"])
    index = index_near(state, 0, 0.75, slope)
    amg = AMG(index, Embedder(), sim_form=form, c_3=30.0, **only(dissimilarity=True))
    _, parts, columns = act(state, amg)
    cosine, gradient = analytic_gradient(state, state.eps_hat, torch.tensor(index.embeddings[0]))
    sigma = slope * cosine
    factor = {
        "paper": 30 * math.sqrt(0.6),
        "released": 30 * (sigma - 0.3) * math.exp(600 / 170),
        "excess": 30 * (sigma - exponential(400)) * math.sqrt(0.6),
    }[form]
    torch.testing.assert_close(parts["dissimilarity"].delta[0], factor * slope * gradient, rtol=1e-4, atol=1e-5)
    assert columns["factor"][0] == pytest.approx(factor, rel=1e-4)
    assert columns["gradient_norm"][0] == pytest.approx(float(slope * gradient.norm()), rel=1e-4)


def test_a_small_step_along_the_dissimilarity_term_lowers_the_similarity():
    state = make_state(["red apple", "car"])
    amg = AMG(index_near(state, 0, 0.75), Embedder(), sim_form="paper", c_3=1.0, **only(dissimilarity=True))
    eps_hat, _, columns = act(state, amg)
    _, _, after = act(replace(state, eps_hat=eps_hat), amg)
    assert after["similarity"][0] < columns["similarity"][0] - 1e-3


def test_similarity_is_measured_again_before_the_dissimilarity_term():
    state = make_state(["red apple", "car"])
    index = index_near(state, 0, 0.75)
    amg = AMG(index, Embedder(), sim_form="paper", schedule="constant", lambda_b=-1.0)
    _, parts, columns = act(state, amg)
    eps_hat = state.eps_hat.clone()
    for name in ("despecification", "deduplication"):
        eps_hat = eps_hat.index_add(0, parts[name].rows, parts[name].delta) if name in parts else eps_hat
    features = Embedder().features(decode(state.x0(eps_hat=eps_hat)))
    assert columns["similarity_after"][0] == pytest.approx(float(index.search(features, 1)[0][0, 0]), abs=1e-5)
    assert columns["similarity_after"][0] != pytest.approx(columns["similarity"][0], abs=1e-3)


def test_no_dissimilarity_term_once_the_other_two_have_moved_the_image_away():
    state = make_state(["red apple", "car"])
    amg = AMG(index_near(state, 0, 0.32), Embedder(), c_1=50.0)
    _, parts, columns = act(state, amg)
    assert columns["similarity_after"][0] < columns["threshold"][0] < columns["similarity"][0]
    assert "despecification" in parts and "dissimilarity" not in parts


def test_the_whole_sum_is_recomputable_from_the_trace():
    state = make_state(["red apple", "car", "tree"])
    amg = AMG(index_near(state, 1, 0.46), Embedder(), schedule="constant", lambda_b=-1.0, sim_form="paper")
    eps_hat, parts, columns = act(state, amg)
    for image in range(3):
        s_1, s_2 = columns["s_1"][image], columns["s_2"][image]
        eps = state.eps_hat[image] - s_1 * (state.eps_cond[image] - state.eps_uncond[image])
        if columns["caption"][image] is not None:
            near = denoise(state.x_t[image : image + 1], embed(columns["caption"][image]))[0]
            eps = eps - s_2 * (near - state.eps_uncond[image])
        eps_text = state.eps_hat.clone()
        eps_text[image] = eps
        target = torch.tensor(amg.index.embeddings)
        nearest = int((Embedder().features(decode(state.x0(eps_hat=eps_text)))[image] @ target.T).argmax())
        _, gradient = analytic_gradient(state, eps_text, target[nearest], image)
        expected = eps + columns["factor"][image] * gradient
        torch.testing.assert_close(eps_hat[image], expected, rtol=1e-4, atol=1e-5)


def test_the_gradient_through_the_denoiser_is_that_of_the_whole_composition():
    state = make_state(["red apple", "car"])
    index = index_near(state, 0, 0.75)
    amg = AMG(index, Embedder(), sim_form="paper", c_3=1.0, through_unet=True, c_1=2.0, c_2=3.0)
    _, parts, columns = act(state, amg)
    x = state.x_t[:1].clone().requires_grad_()
    uncond, cond = denoise(x, embed("")), denoise(x, embed("red apple"))
    eps = uncond + (7.5 - columns["s_1"][0]) * (cond - uncond)
    eps = eps - columns["s_2"][0] * (denoise(x, embed("a known cat")) - uncond)
    x0 = (x - math.sqrt(1 - state.alpha_bar) * eps) / math.sqrt(state.alpha_bar)
    sigma = Embedder().features(decode(x0)) @ torch.tensor(index.embeddings[0])
    assert float(sigma) == pytest.approx(columns["similarity_after"][0], abs=1e-5)
    gradient = torch.autograd.grad(sigma.sum(), x)[0]
    torch.testing.assert_close(parts["dissimilarity"].delta, math.sqrt(0.6) * gradient, rtol=1e-4, atol=1e-5)


# ----------------------------------------------------------------------------------- options against gaming


def test_normalised_steps_are_a_share_of_the_noise_prediction():
    state = make_state(["red apple", "car"])
    amg = AMG(
        index_near(state, 0, 0.75),
        Embedder(),
        sim_form="paper",
        normalise=True,
        c_3=0.3,
        **only(dissimilarity=True),
    )
    delta = act(state, amg)[1]["dissimilarity"].delta[0]
    assert float(delta.norm()) == pytest.approx(0.3 * math.sqrt(0.6) * float(state.eps_hat[0].norm()), rel=1e-5)


def test_the_gradient_is_averaged_over_the_image_and_its_edits():
    state = make_state(["red apple", "car"])
    index = index_near(state, 0, 0.75)
    amg = AMG(index, Embedder(), sim_form="paper", c_3=1.0, edits=3, seed=5, **only(dissimilarity=True))
    delta = act(state, amg)[1]["dissimilarity"].delta
    x = state.x_t[:1].clone().requires_grad_()
    x0 = (x - math.sqrt(1 - state.alpha_bar) * state.eps_hat[:1]) / math.sqrt(state.alpha_bar)
    edits = random_edits(decode(x0), 3, torch.Generator().manual_seed(5 * 1_000_003 + state.step))
    views = [decode(x0), *edits]
    target = torch.tensor(index.embeddings[0])
    mean = torch.stack([Embedder().features(view) @ target for view in views]).mean()
    expected = math.sqrt(0.6) * torch.autograd.grad(mean, x)[0]
    torch.testing.assert_close(delta, expected, rtol=1e-4, atol=1e-6)


def test_edits_are_the_same_for_every_image_of_a_batch_and_change_what_is_seen():
    pixels = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    edited = random_edits(pixels.expand(3, -1, -1, -1), 4, torch.Generator().manual_seed(1))
    assert len(edited) == 4
    for image in edited:
        torch.testing.assert_close(image[0], image[2])
        assert (image[0] - pixels[0]).abs().mean() > 0.02
    assert not torch.allclose(edited[0], edited[1])


def test_slices_bound_memory_and_change_nothing():
    state = make_state(["red apple", "car", "tree"])
    index = index_near(state, 0, 0.75)
    options = {"schedule": "constant", "lambda_b": -1.0, "edits": 2}
    whole = act(state, AMG(index, Embedder(), **options))[0]
    sliced = act(state, AMG(index, Embedder(), decode_slice=1, **options))[0]
    torch.testing.assert_close(sliced, whole, rtol=1e-5, atol=1e-5)


def test_a_gradient_that_is_not_finite_leaves_the_image_to_the_other_terms():
    class Broken(Embedder):
        def features(self, pixels: Tensor) -> Tensor:
            return super().features(pixels) + (0 * pixels.flatten(1).sum(1, keepdim=True)) ** 0.5

    state = make_state(["red apple"])
    amg = AMG(index_near(state, 0, 0.75), Broken(), schedule="constant", lambda_b=-1.0)
    eps_hat, parts, _ = act(state, amg)
    assert eps_hat.isfinite().all() and set(parts) == {"despecification"}


# ------------------------------------------------------------------------------------------------- refusals


def test_an_index_of_another_embedder_is_refused():
    index = index_near(make_state(["red apple"]), 0, 0.75)
    index.embedder = "sscd"
    with pytest.raises(UserError, match="'sscd', not with 'linear'"):
        AMG(index, Embedder())


def test_an_empty_index_is_refused():
    with pytest.raises(UserError, match="empty"):
        AMG(Index(torch.zeros(0, 32), [], []), Embedder())


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"sim_form": "linear"}, "sim_form"),
        ({"every": 0}, "every"),
        ({"t_range": (900, 100)}, "t_range"),
        ({"normalise": True}, "normalise"),
        ({"strength": 3}, "strength"),
    ],
)
def test_a_wrong_option_is_named(options, word):
    index = index_near(make_state(["red apple"]), 0, 0.75)
    with pytest.raises(UserError, match=word):
        AMG(index, Embedder(), **options)
