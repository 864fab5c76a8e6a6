"""The scoring loop against denoisers that are known in closed form, and against the stock pipeline."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor

from afresh.errors import UsageError, UserError
from tests.train.known_denoisers import SHAPE, KnownDenoiser, mixture_eps, with_denoiser
from train.denoising.families.stable_diffusion import tokenize
from train.memorization import magnitude, score
from train.memorization.signals.protocol import Seen
from train.memorization.signals.registry import SIGNALS

PROMPTS = ["red apple, food fruit", "grinning face", "flag"]
ALL = list(SIGNALS)


class Latents:
    """A signal of one's own, which keeps the latents that it sees."""

    name, looks_at, noise_level = "latents", "every step", None
    unconditional = attention = compares_seeds = False

    def __init__(self) -> None:
        self.seen: list[Seen] = []

    def observe(self, seen: Seen) -> Tensor:
        self.seen.append(seen)
        return seen.x_t.flatten(1).norm(dim=1)

    def combine(self, observed: Tensor) -> Tensor:
        return observed[:, -1]

    def of_prompt(self, values: Tensor) -> Tensor:
        return values.min()


@pytest.fixture(scope="module")
def means() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {caption: torch.randn(SHAPE, generator=generator) for caption in PROMPTS}


def test_magnitude_of_gaussians_of_one_width_is_the_closed_form(tiny_pipe, means):
    # s = 1 as for the empty prompt: m_t = √(1−ᾱ_t) √ᾱ_t ‖μ‖, whatever the noise.
    scores = score(with_denoiser(tiny_pipe, KnownDenoiser(tiny_pipe, means, s=1.0)), PROMPTS, steps=5)
    a = tiny_pipe.scheduler.alphas_cumprod[scores.timesteps].double()
    for row, caption in enumerate(PROMPTS):
        expected = ((1 - a) * a).sqrt() * means[caption].double().norm()
        assert scores.magnitudes[row] == pytest.approx(np.tile(expected, (4, 1)), rel=1e-5)


def test_magnitude_along_the_trajectory_to_one_image_is_the_closed_form(tiny_pipe, means):
    # s = 0 and scale 1: DDIM keeps ε, so x_t = √ᾱ_t μ + √(1−ᾱ_t) ε with ε fixed by x_T.
    unet = KnownDenoiser(tiny_pipe, means, s=0.0)
    scores = score(with_denoiser(tiny_pipe, unet), PROMPTS, steps=50, seeds=[3, 11], guidance_scale=1.0)
    a = tiny_pipe.scheduler.alphas_cumprod[scores.timesteps].double().reshape(-1, 1, 1, 1)
    for row, caption in enumerate(PROMPTS):
        mean = means[caption].double()
        for column, seed in enumerate((3, 11)):
            x_T = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)).double()
            eps = (x_T - a[0].sqrt() * mean) / (1 - a[0]).sqrt()
            x_t = a.sqrt() * mean + (1 - a).sqrt() * eps
            expected = (eps - (1 - a).sqrt() * x_t).flatten(1).norm(dim=1)
            assert scores.magnitudes[row, column] == pytest.approx(expected.numpy(), rel=1e-5)


def test_guided_trajectory_of_a_gaussian_mixture_and_its_magnitudes_are_the_closed_form(tiny_pipe):
    generator = torch.Generator().manual_seed(2)
    means = {caption: 0.3 * torch.randn(3, *SHAPE, generator=generator) for caption in PROMPTS[:2]}
    pipe, s, scale, seeds = with_denoiser(tiny_pipe, KnownDenoiser(tiny_pipe, means, 0.5)), 0.5, 3.0, [4, 9]
    latents = Latents()
    scores = score(
        pipe, PROMPTS[:2], steps=25, num_inference_steps=25, seeds=seeds, guidance_scale=scale,
        signals=["magnitude", latents],
    )  # fmt: skip
    a = tiny_pipe.scheduler.alphas_cumprod.double()[scores.timesteps]
    for row, (caption, column) in enumerate((c, k) for c in PROMPTS[:2] for k in range(2)):
        x_t = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seeds[column])).double()
        for step in range(25):
            eps_cond = mixture_eps(x_t, means[caption].double(), s, a[step])
            eps_uncond = mixture_eps(x_t, torch.zeros(1, *SHAPE).double(), 1.0, a[step])
            assert (latents.seen[step].x_t[row] - x_t).abs().max() < 1e-5
            m = scores.magnitudes[row // 2, column, step]
            assert m == pytest.approx((eps_cond - eps_uncond).norm().item(), rel=1e-5)
            if step < 24:
                eps = eps_uncond + scale * (eps_cond - eps_uncond)
                x_0 = (x_t - (1 - a[step]).sqrt() * eps) / a[step].sqrt()
                x_t = a[step + 1].sqrt() * x_0 + (1 - a[step + 1]).sqrt() * eps


@pytest.mark.parametrize("name", ["magnitude", "consistency", "agreement", "anisotropy"])
def test_models_that_predict_noise_and_velocity_score_the_same(tiny_pipe, means, name):
    noise, velocity = (
        score(
            with_denoiser(tiny_pipe, KnownDenoiser(tiny_pipe, means, 0.3, kind), kind),
            PROMPTS,
            steps=10,
            seeds=2,
            signals=[name],
        )
        for kind in ("epsilon", "v_prediction")
    )
    assert velocity.signal(name) == pytest.approx(noise.signal(name), rel=1e-5)


@pytest.mark.parametrize("seeds", [[0, 1, 2], [[0, 1, 2], [3, 4, 5], [6, 7, 8]]], ids=["shared", "own"])
def test_a_batch_gives_what_single_items_give(tiny_pipe, seeds):
    options = {"steps": 3, "num_inference_steps": 10, "seeds": np.array(seeds), "signals": ALL}
    single = score(tiny_pipe, PROMPTS, batch_size=1, **options)
    batch = score(tiny_pipe, PROMPTS, batch_size=7, **options)
    assert single.magnitudes.shape == (3, 3, 3)
    assert (single.magnitudes > 0).all()
    for name in ALL:
        assert batch.signal(name) == pytest.approx(single.signal(name), rel=1e-3)


def test_signals_asked_for_together_give_what_each_gives_alone(tiny_pipe):
    options = {"steps": 2, "num_inference_steps": 10, "seeds": 3}
    together = score(tiny_pipe, PROMPTS, signals=ALL, **options)
    for name in ALL:
        alone = score(tiny_pipe, PROMPTS, signals=[name], **options)
        assert alone.signal(name) == pytest.approx(together.signal(name), rel=1e-4)
        assert alone.evaluations <= together.evaluations


def test_the_denoiser_is_evaluated_as_often_as_the_signals_need_and_no_more(tiny_pipe, monkeypatch):
    evaluated = []
    forward = tiny_pipe.unet.forward
    monkeypatch.setattr(tiny_pipe.unet, "forward", lambda x, *a, **k: evaluated.append(len(x)) or forward(x, *a, **k))
    own = np.arange(6).reshape(3, 2)
    for signals, steps, seeds, expected in (
        (["magnitude"], 1, 2, 3 * 2 + 2),  # without a prompt once a seed
        (["magnitude"], 1, own, 2 * 3 * 2),
        (["magnitude"], 3, own, 3 * 2 * 3 * 2),
        (["magnitude"], 3, 2, 3 * 2 + 2 + 2 * 2 * 3 * 2),
        (["agreement"], 1, 2, 3 * 2),
        (["agreement"], 2, own, 3 * 2 * 3),  # both halves where a step follows, at the last one alone
        (["consistency"], 3, 2, 3 * 2),  # the first step, and nothing without a prompt
        (["attention_entropy"], 1, own, 3 * 2),
        (["anisotropy"], 3, own, 2 * 2 * 3 * 2),
        (["magnitude", "consistency", "attention_entropy"], 1, own, 2 * 3 * 2),
        (["magnitude", "anisotropy"], 1, 2, 2 * (3 * 2 + 2)),
    ):
        evaluated.clear()
        scores = score(tiny_pipe, PROMPTS, steps=steps, seeds=seeds, signals=signals, num_inference_steps=10)
        assert sum(evaluated) == scores.evaluations == expected, (signals, steps)
        assert len(scores.timesteps) == (steps if {"magnitude", "agreement", "attention_entropy"} & set(signals) else 1)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float16, 0.01), (torch.bfloat16, 0.05)], ids=str)
def test_half_precision_stays_within_a_stated_error(tiny_pipe, dtype, error):
    options = {"steps": 2, "num_inference_steps": 10, "seeds": 2, "signals": ALL}
    exact = score(tiny_pipe, PROMPTS, **options)
    rough = score(copy.deepcopy(tiny_pipe).to(dtype), PROMPTS, **options)
    assert rough.magnitudes == pytest.approx(exact.magnitudes, rel=error)
    for name in ALL[1:]:
        assert rough.signal(name) == pytest.approx(exact.signal(name), rel=error, abs=error)


def test_a_signal_of_ones_own_sees_what_the_others_see(tiny_pipe):
    latents = Latents()
    scores = score(tiny_pipe, PROMPTS[:1], steps=2, seeds=2, signals=[latents, "magnitude"], num_inference_steps=5)
    assert scores.per_prompt("latents") == scores.signal("latents").min()
    for step, seen in enumerate(latents.seen):
        assert seen.t == scores.timesteps[step]
        assert magnitude(seen.eps_cond, seen.eps_uncond).numpy() == pytest.approx(scores.magnitudes[0, :, step])
    with pytest.raises(UsageError, match="'consistency' was not computed: these were: latents, magnitude"):
        scores.signal("consistency")


def test_schedulers_of_other_samplers_do_not_clip_the_trajectory(tiny_pipe, means):
    from diffusers import EulerDiscreteScheduler

    pipe = with_denoiser(tiny_pipe, KnownDenoiser(tiny_pipe, {c: 5 * m for c, m in means.items()}, 0.5))
    expected = score(pipe, PROMPTS, steps=3, seeds=1).magnitudes
    # Its config has no word on clipping latents, and DDIM's own default would clip them to [−1, 1].
    config = {k: v for k, v in pipe.scheduler.config.items() if "clip" not in k and "sample" not in k}
    pipe.scheduler = EulerDiscreteScheduler.from_config(config)
    assert score(pipe, PROMPTS, steps=3, seeds=1).magnitudes == pytest.approx(expected, rel=1e-5)


def test_predictions_that_are_not_finite_name_the_prompt(tiny_pipe, means):
    broken = KnownDenoiser(tiny_pipe, means | {PROMPTS[1]: torch.full(SHAPE, torch.nan)}, 0.5)
    with pytest.raises(UserError, match="'grinning face': the model's predictions are not finite"):
        score(with_denoiser(tiny_pipe, broken), PROMPTS, seeds=1)


def test_the_first_step_is_the_pipelines_own(tiny_pipe):
    scores = score(tiny_pipe, PROMPTS[:1], steps=2, num_inference_steps=20, seeds=[5], guidance_scale=3.0)
    seen = []

    def watch(pipe, step, t, tensors):
        seen.append(tensors["latents"])
        return {}

    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(5))[None]
    tiny_pipe(
        PROMPTS[0],
        num_inference_steps=20,
        guidance_scale=3.0,
        latents=noise,
        output_type="latent",
        callback_on_step_end=watch,
    )
    tokens = tiny_pipe.text_encoder(tokenize(tiny_pipe, [PROMPTS[0], ""]))[0]
    with torch.no_grad():
        for step, x_t in enumerate((noise, seen[0])):
            t = int(scores.timesteps[step])
            cond, uncond = tiny_pipe.unet(torch.cat([x_t, x_t]), t, tokens).sample
            assert scores.magnitudes[0, 0, step] == pytest.approx((cond - uncond).norm().item(), rel=1e-4)


def test_nothing_of_the_pipeline_is_changed(tiny_pipe):
    scheduler, before = tiny_pipe.scheduler, tiny_pipe.scheduler.timesteps.clone()
    score(tiny_pipe, PROMPTS[:1], num_inference_steps=7, seeds=1)
    assert tiny_pipe.scheduler is scheduler
    assert torch.equal(scheduler.timesteps, before)


def test_wrong_requests_are_refused(tiny_pipe):
    for options, complaint in (
        ({"steps": 0}, "steps is 0"),
        ({"steps": 51}, "steps is 51"),
        ({"signals": ["magnitud"]}, "magnitud.*choose from magnitude"),
        ({"seeds": 0}, "nothing to score"),
        ({"seeds": 1, "signals": ["consistency"]}, "at least 2 seeds"),
        ({"signals": ["magnitude", "magnitude"]}, "each once"),
        ({"signals": []}, "choose from magnitude"),
        ({"batch_size": 0}, "batch_size"),
    ):
        with pytest.raises(UsageError, match=complaint):
            score(tiny_pipe, PROMPTS, **options)


