"""Anti-memorization guidance against its equations, with a denoiser, decoder and embedder of closed form."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from afresh.errors import UserError
from train.denoising.coefficients import Coefficients
from train.denoising.conditioning import Conditioning
from train.sampling.config import AMGConfig
from train.sampling.guidance import Run, State, guide
from train.sampling.pipelines.stable_diffusion import GuidedStableDiffusion
from train.sampling.terms.amg import AMG
from train.sampling.terms.amg_strengths import (
    antithesis,
    constant,
    deduplication_strength,
    despecification_strength,
    exponential,
    parabolic,
    schedule,
)
from train.sampling.terms.random_edits import random_edits

PIXELS = 3 * 8 * 8
TO_FEATURES = torch.randn(32, PIXELS, generator=torch.Generator().manual_seed(1))


class Embedder:
    """``f = W·pixels``, normalised."""

    name, dim, size = "linear", 32, 8

    def features(self, pixels: Tensor) -> Tensor:
        return torch.nn.functional.normalize((pixels.flatten(1) - 0.5) @ TO_FEATURES.T, dim=1)


class Index:
    """What guidance uses of a training-set index, with the calibration ``σ = slope·cosine``."""

    def __init__(self, embeddings: Tensor, captions: list[str], counts: list[int], slope: float = 1.0) -> None:
        self.embeddings = torch.nn.functional.normalize(embeddings, dim=1).numpy()
        self.captions, self.counts, self.slope = captions, np.array(counts), slope
        self.embedder = "linear"

    def hold(self, device: object = None) -> None:
        """It is in memory as it is."""

    def search(self, vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        cosine = np.asarray(vectors, np.float32) @ self.embeddings.T
        rows = np.argsort(-cosine, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(cosine, rows, 1), rows

    def vectors(self, rows: np.ndarray) -> np.ndarray:
        return self.embeddings[rows]

    def calibrate(self, cosine):
        return self.slope * cosine


def decode(latents: Tensor) -> Tensor:
    return 0.5 + 0.1 * latents[:, :3]


def embed(text: str) -> Conditioning:
    seed = sum(text.encode())
    return Conditioning({"embeds": torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed))})


def denoise(x_t: Tensor, cond: Conditioning, rows: Tensor | None = None) -> Tensor:
    """``ε(x, e) = 0.9·x + 0.1·e + 0.05·sin(x)``."""
    return 0.9 * x_t + 0.1 * cond.embeds + 0.05 * torch.sin(x_t)


def make_state(prompts: list[str], t: float = 400.0, alpha_bar: float = 0.4, scale: float = 7.5) -> State:
    n = len(prompts)
    x_t = torch.randn(n, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    uncond, cond = embed("").expand(n), Conditioning.join([embed(p) for p in prompts])
    eps_uncond, eps_cond = denoise(x_t, uncond), denoise(x_t, cond)
    run = Run(n, 1000, decode, lambda texts: Conditioning.join([embed(text) for text in texts]))
    eps_hat = eps_uncond + scale * (eps_cond - eps_uncond)
    at = Coefficients.of_alpha_bar(alpha_bar)
    return State(run, 0, t, at, scale, x_t, eps_uncond, eps_cond, eps_hat, uncond, cond, denoise)


def index_near(state: State, image: int, cosine: float, slope: float = 1.0) -> Index:
    """Sample 0 lies at ``cosine`` from one image's ``x̂_0`` and at 0.05 from the others', sample 1 at 0."""
    features = Embedder().features(decode(state.x0()))
    wanted = torch.full((len(features),), 0.05)
    wanted[image] = cosine
    near = torch.linalg.pinv(features) @ wanted
    aside = torch.linalg.svd(features)[2][len(features) :]
    near = near + (1 - near.norm() ** 2).sqrt() * aside[0]
    return Index(torch.stack([near, aside[1]]), ["a known cat", "another"], [3, 1], slope)


def act(state: State, amg: AMG):
    eps_hat, parts, columns = guide([(amg.name, amg.start(state.run))], state)
    return eps_hat, parts, columns


def only(**switches: bool) -> dict[str, bool]:
    names = ("despecification", "deduplication", "dissimilarity")
    return {name: switches.get(name, False) for name in names}


# ------------------------------------------------------------------------------------- schedules, strengths


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


def test_the_caption_to_leave_is_the_frequent_one_or_else_the_nearest():
    captions = ["a cat", "A  Cat", "the dog", "a CAT", "bird"]
    assert antithesis(captions, [30, 30, 1, 30, 1], rows=[2, 1, 0, 3]) == "A  Cat"
    assert antithesis(captions, [20, 20, 1, 20, 1], rows=[2, 1, 0, 3]) == "the dog"  # not more than 20
    assert antithesis(captions, [30, 30, 1, 30, 1], rows=[4]) == "bird"


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


def analytic_gradient(state: State, eps_hat: Tensor, target: Tensor, image: int = 0) -> tuple[float, Tensor]:
    """Cosine to ``target`` and its gradient by ``x_t`` with ``ε̂`` held fixed, from the closed forms."""
    x0 = (state.x_t[image] - math.sqrt(1 - state.alpha_bar) * eps_hat[image]) / math.sqrt(state.alpha_bar)
    f = TO_FEATURES @ (0.1 * x0[:3]).flatten()
    unit = f / f.norm()
    cosine = unit @ target
    by_x0 = 0.1 * TO_FEATURES.T @ (target - cosine * unit) / f.norm()
    gradient = torch.zeros_like(x0)
    gradient[:3] = by_x0.view(3, 8, 8) / math.sqrt(state.alpha_bar)
    return float(cosine), gradient


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


# ----------------------------------------------------------------------------------- where and when it acts


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


# ------------------------------------------------------------------------------------------ in the pipeline


class Thumbnail:
    """Embeds an image as its 8×8 thumbnail, standardised."""

    name, dim, size = "linear", 192, 8

    def features(self, pixels: Tensor) -> Tensor:
        small = torch.nn.functional.adaptive_avg_pool2d(pixels, 8).flatten(1)
        return torch.nn.functional.normalize(small - small.mean(1, keepdim=True), dim=1)


@pytest.fixture(scope="module")
def copied(tiny_pipe):
    """A pipeline and an index that holds what it draws for seed 1, but nothing like seed 2."""
    pipe = GuidedStableDiffusion.from_pipe(tiny_pipe)
    call = {"num_inference_steps": 6, "output_type": "pt"}
    drawn = pipe(["red apple"], generator=[torch.Generator().manual_seed(1)], **call).images.float()
    noise = torch.randn(1, 192, generator=torch.Generator().manual_seed(0))
    index = Index(torch.cat([Thumbnail().features(drawn), noise]), ["red apple", "noise"], [30, 1])
    return pipe, index


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler"])
def test_it_draws_something_else_where_the_model_would_repeat_a_training_image(copied, scheduler):
    import diffusers

    pipe, index = copied
    kind = getattr(diffusers, scheduler)
    pipe = GuidedStableDiffusion.from_pipe(pipe, scheduler=kind.from_config(pipe.scheduler.config))
    call = {"num_inference_steps": 6, "output_type": "pt"}
    amg = AMG(index, Thumbnail(), schedule="constant", lambda_b=0.6, sim_offset=0.6, edits=1)

    def draw(seeds: list[int], **options):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return pipe(["red apple"] * len(seeds), generator=generators, **call, **options)

    plain, guided = draw([1, 2]), draw([1, 2], guidance=[amg])
    similarity = [
        float(index.search(Thumbnail().features(output.images[:1].float()).numpy(), 1)[0][0, 0])
        for output in (plain, guided)
    ]
    assert similarity[1] < similarity[0] - 0.04
    quiet = not any(row["fired"] for row in guided.trace if row["image"] == 1)
    if quiet:
        assert torch.equal(guided.images[1], plain.images[1])
    alone = draw([2], guidance=[amg]).images[0]
    torch.testing.assert_close(alone, guided.images[1], rtol=1e-3, atol=1e-3)
