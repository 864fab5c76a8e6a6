"""Pixel-space pipelines: the stock ones' images without guidance, the same protocol with it; AMG on pixels."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, EulerDiscreteScheduler, UNet2DModel

from afresh.errors import UsageError, UserError
from train.denoising.coefficients import Coefficients
from train.denoising.conditioning import Conditioning
from train.sampling import AMG, GuidedUnconditional, PixelIndex, Rejection
from train.sampling.guidance import Correction, Part, Run, State, guide
from train.sampling.terms.amg_strengths import exponential


def unet(classes: int | None = None, out_channels: int = 3) -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=16,
        out_channels=out_channels,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        num_class_embeds=classes,
    ).eval()


def stock(kind=DDPMPipeline, model: UNet2DModel | None = None, **options):
    pipe = kind(model or unet(), DDPMScheduler(beta_schedule="squaredcos_cap_v2", **options))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(n) for n in numbers]


class Shift:
    """Adds a constant to ``ε̂`` of some images."""

    name = "shift"

    def __init__(self, rows: list[int], look=None, amount: float = 0.1) -> None:
        self.rows, self.look, self.amount = torch.tensor(rows), look, amount

    def start(self, run: Run):
        def step(state: State) -> Correction:
            if self.look:
                self.look(state)
            return Correction({"shift": Part(self.rows, torch.full_like(state.x_t[self.rows], self.amount))})

        return step


# ------------------------------------------------------------------------------------------- the stock pipelines


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("output_type", ["np", "pt", "pil"])
def test_ddpm_without_terms_is_the_stock_pipeline_bit_for_bit(prediction_type, output_type):
    pipe = stock(prediction_type=prediction_type)
    call = {"batch_size": 2, "num_inference_steps": 5, "output_type": output_type}
    expected = pipe(generator=seeds(1, 2), **call).images
    images = GuidedUnconditional.from_pipe(pipe)(generator=seeds(1, 2), **call).images
    assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(images, expected, strict=True))


@pytest.mark.parametrize("call", [{}, {"eta": 0.7}, {"eta": 0.5, "use_clipped_model_output": True}])
def test_ddim_without_terms_is_the_stock_pipeline_bit_for_bit(call):
    pipe = stock(DDIMPipeline)
    call = {"batch_size": 2, "num_inference_steps": 5, "output_type": "np", **call}
    expected = pipe(generator=torch.Generator().manual_seed(3), **call).images
    guided = GuidedUnconditional.from_pipe(pipe)
    assert isinstance(guided.scheduler, DDIMScheduler)
    np.testing.assert_array_equal(guided(generator=torch.Generator().manual_seed(3), **call).images, expected)
    (images,) = guided(generator=torch.Generator().manual_seed(3), return_dict=False, **call)
    np.testing.assert_array_equal(images, expected)


def test_a_model_that_predicts_variances_is_drawn_as_by_the_stock_pipeline_and_corrected_in_its_noise():
    pipe = stock(model=unet(out_channels=6), variance_type="learned_range")
    call = {"batch_size": 2, "num_inference_steps": 4, "output_type": "np"}
    expected = pipe(generator=seeds(1, 2), **call).images
    guided = GuidedUnconditional.from_pipe(pipe)
    np.testing.assert_array_equal(guided(generator=seeds(1, 2), **call).images, expected)
    moved = guided(generator=seeds(1, 2), guidance=[Shift([1])], **call).images
    np.testing.assert_array_equal(moved[0], expected[0])
    assert np.abs(moved[1] - expected[1]).max() > 1e-3
    kept = guided(generator=seeds(1, 2), guidance=[Shift([0, 1], amount=0.0)], **call).images
    np.testing.assert_allclose(kept, expected, atol=1e-5)  # the variances of a corrected image are its own


def test_steps_default_to_those_of_the_stock_pipelines(monkeypatch):
    seen = []
    for kind in (DDPMPipeline, DDIMPipeline):
        guided = GuidedUnconditional.from_pipe(stock(kind))
        monkeypatch.setattr(guided.scheduler, "set_timesteps", lambda n, set=guided.scheduler.set_timesteps: (
            seen.append(n), set(1)))
        guided(generator=seeds(1))
    assert seen == [1000, 50]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_images_that_no_term_acts_on_keep_every_bit_and_the_trace_says_which(prediction_type):
    guided = GuidedUnconditional.from_pipe(stock(prediction_type=prediction_type))
    call = {"batch_size": 3, "num_inference_steps": 4, "output_type": "np"}
    plain = guided(generator=seeds(1, 2, 3), **call).images
    output = guided(generator=seeds(1, 2, 3), guidance=[Shift([1])], **call)
    np.testing.assert_array_equal(output.images[[0, 2]], plain[[0, 2]])
    assert np.abs(output.images[1] - plain[1]).max() > 1e-3
    assert all(row["fired"] == (["shift"] if row["image"] == 1 else []) for row in output.trace)
    assert all(row["magnitude"] is None for row in output.trace)


def test_a_term_sees_the_noise_that_the_model_predicts_and_pixels():
    model = unet()
    guided = GuidedUnconditional.from_pipe(stock(model=model, prediction_type="v_prediction"))

    def look(state: State) -> None:
        v = model(state.x_t, torch.tensor(state.t)).sample
        eps = state.alpha_bar**0.5 * v + (1 - state.alpha_bar) ** 0.5 * state.x_t
        torch.testing.assert_close(state.eps_hat, eps, rtol=1e-4, atol=1e-4)
        rows = torch.tensor([1])
        torch.testing.assert_close(state.denoise(state.x_t[rows], None, rows), eps[rows], rtol=1e-4, atol=1e-4)
        pixels = state.decode(state.x0())
        torch.testing.assert_close(pixels, (state.x0() / 2 + 0.5).clamp(0, 1))
        assert state.eps_uncond is None and state.cond is None

    guided(batch_size=2, generator=seeds(1, 2), num_inference_steps=3, guidance=[Shift([0], look)])


# -------------------------------------------------------------------------------------------------------- classes


def class_pipe(null_class: int | None = 2):
    return GuidedUnconditional.from_pipe(
        stock(model=unet(classes=3)), null_class=null_class, class_names=["animals", "flags"]
    )


def test_classes_go_by_number_by_name_and_one_for_all():
    pipe = class_pipe()
    call = {"batch_size": 2, "num_inference_steps": 3, "output_type": "np"}
    by_number = pipe(generator=seeds(1, 2), class_labels=[0, 1], **call).images
    by_name = pipe(generator=seeds(1, 2), class_labels=["animals", "flags"], **call).images
    np.testing.assert_array_equal(by_number, by_name)
    flags = pipe(generator=seeds(1, 2), class_labels="flags", **call).images
    assert np.abs(flags[0] - by_number[0]).max() > 1e-4
    np.testing.assert_array_equal(flags[1], by_number[1])


@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_classifier_free_guidance_is_that_of_the_null_class(scale):
    pipe = class_pipe()
    call = {"batch_size": 1, "num_inference_steps": 1, "class_labels": 1, "guidance_scale": scale}
    row = pipe(generator=seeds(1), trace_tensors=True, **call).trace[0]
    x, t = row["x_t"][None], torch.tensor(row["t"])
    cond, null = (pipe.unet(x, t, class_labels=torch.tensor([label])).sample for label in (1, 2))
    torch.testing.assert_close(row["eps_hat"], (null + scale * (cond - null))[0], rtol=1e-4, atol=1e-4)
    assert row["magnitude"] == pytest.approx(float((cond - null).norm()), rel=1e-3)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({}, "give class_labels"),
        ({"class_labels": "cars"}, "'cars' is none of class_names: animals, flags"),
        ({"class_labels": [0, 1, 0]}, "3 class labels for 2 images"),
        ({"class_labels": 3}, "0 to 2"),
        ({"class_labels": 0, "generator": seeds(1)}, "1 generators for 2 images"),
    ],
)
def test_labels_that_do_not_fit_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        class_pipe()(batch_size=2, num_inference_steps=1, **call)


def test_guidance_needs_a_null_class_and_unconditional_models_take_no_labels(tiny_pipe):
    with pytest.raises(ValueError, match="null class"):
        class_pipe(null_class=None)(class_labels=0, guidance_scale=2.0, num_inference_steps=1)
    with pytest.raises(ValueError, match="unconditional"):
        GuidedUnconditional.from_pipe(stock())(class_labels=0, num_inference_steps=1)
    with pytest.raises(ValueError, match="StableDiffusionPipeline is no pixel-space pipeline"):
        GuidedUnconditional.from_pipe(tiny_pipe)


def test_a_scheduler_in_sigmas_is_given_scaled_noise():
    """Euler keeps ``x_0 + σ·noise``; terms see variance-preserving images all the same."""
    pipe = DDPMPipeline(unet(), DDPMScheduler())
    guided = GuidedUnconditional.from_pipe(pipe, scheduler=EulerDiscreteScheduler.from_config(pipe.scheduler.config))
    seen = []
    guided(
        batch_size=64,
        generator=seeds(*range(64)),
        num_inference_steps=4,
        guidance=[Shift([0], lambda s: seen.append(float(s.x_t.std())))],
    )
    assert seen[0] == pytest.approx(1.0, abs=0.05)


# --------------------------------------------------------------------------------------------------- AMG on pixels


def pixels(n: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def state_near(image: torch.Tensor, amount: float = 0.02) -> State:
    """A step at which image 0's ``x̂_0`` lies near ``image`` and image 1's lies anywhere."""
    x0 = torch.stack([image + amount * pixels(1, 5)[0], pixels(1, 6)[0]]) * 2 - 1
    assert bool((x0.abs() < 1).all())  # decoding clamps
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(1))
    alpha_bar = 0.6
    x_t = alpha_bar**0.5 * x0 + (1 - alpha_bar) ** 0.5 * eps
    labels = Conditioning({"labels": torch.zeros(1)})
    run = Run(2, 1000, lambda x: (x / 2 + 0.5).clamp(0, 1), lambda texts: labels.expand(len(texts)))
    at = Coefficients.of_alpha_bar(alpha_bar)
    return State(run, 0, 300.0, at, 1.0, x_t, None, eps, eps, None, None, lambda x, e, rows: eps[rows])


def test_normalised_distance_is_that_of_the_paper():
    images, queries = pixels(60), pixels(3, seed=1)
    index = PixelIndex(images, k=50, alpha=0.5)
    near = index.nearest(queries, 4)
    for i, query in enumerate(queries):
        distances = np.sort(np.linalg.norm((images - query).flatten(1).numpy(), axis=1))
        expected = -distances[:4] / (0.5 * distances[:50].mean())
        np.testing.assert_allclose(near.sigma[i], expected, rtol=1e-5)
        np.testing.assert_allclose(near.raw[i], distances[:4], rtol=1e-5)
    sigma, rows = index.against(queries)
    torch.testing.assert_close(sigma, near.sigma[:, 0])
    assert torch.equal(rows, near.rows[:, 0])


def test_alpha_is_calibrated_on_images_that_are_no_copies():
    others = pixels(200, seed=9)
    index = PixelIndex(pixels(60), ["x"] * 60).calibrated(others, share=0.05)
    nl2 = -index.nearest(others, 1).sigma[:, 0]
    assert float((nl2 < 1.4).float().mean()) == pytest.approx(0.05, abs=0.006)
    assert (len(index.images), index.captions[0], index.k) == (60, "x", 50)


def test_the_dissimilarity_term_on_pixels_is_equation_17():
    images = 0.9 * pixels(60)
    state = state_near(images[7])
    amg = AMG(PixelIndex(images, alpha=0.5), sim_form="paper", normalise=False, c_3=30.0)
    _, parts, columns = guide([("amg", amg.start(state.run))], state)
    assert columns["nearest"][0] == 7 and columns["similarity"][0] > columns["threshold"][0] > columns["similarity"][1]
    assert columns["threshold"][0] == pytest.approx(exponential(300 / 4, a=-1.95, b=-1.5, c=0.025))
    # σ = −d_1/(α·mean d) and ∂d_j/∂x̂ = (x̂ − z_j)/d_j; then pixels = x̂_0/2 + 1/2 and x̂_0 = (x_t − …)/√ᾱ.
    x = (state.x0()[0] / 2 + 0.5).flatten().double()
    d = (images.flatten(1).double() - x).norm(dim=1)
    near = d.argsort()[:50]
    units = (x - images.flatten(1).double()[near]) / d[near, None]
    mean = d[near].mean()
    by_pixels = -units[0] / (0.5 * mean) + d[near[0]] * units.mean(0) / (0.5 * mean**2)
    expected = 30 * math.sqrt(0.4) * by_pixels * 0.5 / math.sqrt(0.6)
    torch.testing.assert_close(parts["dissimilarity"].delta[0].flatten().double(), expected, rtol=1e-4, atol=1e-5)
    assert parts["dissimilarity"].rows.tolist() == [0]


def test_amg_steers_a_pixel_model_away_from_what_it_would_draw_and_leaves_the_others():
    guided = GuidedUnconditional.from_pipe(stock(DDIMPipeline))
    call = {"batch_size": 2, "num_inference_steps": 8, "output_type": "pt"}
    plain = guided(generator=seeds(1, 2), **call).images
    others = pixels(60, seed=3)
    index = PixelIndex(torch.cat([others, plain[:1]]), alpha=0.5)
    amg = AMG(index, schedule="constant", lambda_b=-1.0)
    output = guided(generator=seeds(1, 2), guidance=[amg], **call)
    assert torch.equal(output.images[1], plain[1])
    before, after = index.nearest(plain[:1], 1).sigma, index.nearest(output.images[:1], 1).sigma
    assert float(before) > -0.1 and float(after) < float(before) - 0.2
    fired = [row for row in output.trace if row["fired"]]
    assert fired and all(row["image"] == 0 and row["nearest"] == 60 for row in fired)


def test_an_index_of_pixels_goes_with_its_own_preset_and_size():
    with pytest.raises(UsageError, match="preset main"):
        AMG(PixelIndex(pixels(4)), config="main")
    with pytest.raises(UserError, match="two images"):
        PixelIndex(pixels(1))
    with pytest.raises(ValueError, match="holds images of"):
        PixelIndex(pixels(4)).nearest(torch.zeros(1, 3, 8, 8), 1)


def test_guided_class_labels_are_encoded_for_the_caption_deduplication_term():
    """On objects, where σ is positive, e_N is the class of the nearest image: G_dup steers away from that class."""
    from curate.embed.registry import load_embedder
    from curate.index.training_index import TrainingIndex
    from train.sampling.terms.judges import as_pixels

    pipe = class_pipe()
    images = pipe(batch_size=4, class_labels=[0, 1, 0, 1], generator=seeds(1, 2, 3, 4), num_inference_steps=3).images
    layout = load_embedder("layout")
    names = ["animals", "flags", "animals", "flags"]
    index = TrainingIndex.build(
        layout.embed(images), names, ["s"] * 4, list("abcd"), np.ones(4, bool), np.arange(4), "layout"
    )
    amg = AMG(index, layout, schedule="constant", lambda_b=-1.0, c_1=0.5, c_2=1.0, dissimilarity=False)
    call = {"batch_size": 2, "class_labels": 0, "guidance_scale": 3.0, "num_inference_steps": 3}
    output = pipe(generator=seeds(1, 2), guidance=[amg], trace_tensors=True, **call)
    row = next(row for row in output.trace if row["caption"] is not None)
    x, t = row["x_t"][None], torch.tensor(row["t"])
    near = pipe.unet(x, t, class_labels=torch.tensor([names.index(row["caption"])])).sample
    expected = -row["s_2"] * (near[0] - row["eps_uncond"])
    torch.testing.assert_close(row["delta.deduplication"], expected, rtol=1e-3, atol=1e-4)
    assert as_pixels(images).shape == (4, 3, 16, 16)


def test_rejection_draws_only_copies_again_and_keeps_the_others_bit_for_bit():
    pipe = GuidedUnconditional.from_pipe(stock(DDIMPipeline))

    def draw(rows: list[int], now: list[int]):
        calls.append(rows)
        return pipe(batch_size=len(rows), generator=seeds(*now), num_inference_steps=3, output_type="pt")

    calls: list[list[int]] = []
    plain = draw([0, 1], [1, 2]).images
    index = PixelIndex(torch.cat([pixels(60, seed=3), plain[:1]]), alpha=0.5)
    calls.clear()
    kept = Rejection(index, tries=3)(draw, [1, 2])
    assert calls[0] == [0, 1] and all(rows == [0] for rows in calls[1:]) and len(calls) == kept[0].tries > 1
    assert torch.equal(kept[1].image, plain[1]) and (kept[1].seed, kept[1].tries) == (2, 1)
    assert kept[0].seed != 1 and not torch.equal(kept[0].image, plain[0])
    assert {row["image"] for row in kept[0].trace} == {0}
    assert Rejection(index, tries=1)(draw, [1, 2])[0].similarity == pytest.approx(0.0, abs=1e-3)
