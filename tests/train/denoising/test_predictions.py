"""One prediction in every space, for variance-preserving schedules and for flow matching."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from train.denoising.coefficients import Coefficients
from train.denoising.predictions import Prediction, output_per_eps
from train.denoising.schedules import NoiseSchedule

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def randn(seed: int) -> torch.Tensor:
    return torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("at", [Coefficients.of_alpha_bar(0.3), Coefficients(0.35, 0.65)], ids=["vp", "flow"])
@pytest.mark.parametrize("space", ["epsilon", "sample", "velocity"])
def test_every_space_tells_the_same_image_and_noise(at, space):
    x_0, eps = randn(0), randn(1)
    x_t = at.signal * x_0 + at.noise * eps
    said = Prediction({"epsilon": eps, "sample": x_0, "velocity": eps - x_0}[space], x_t, at, space)
    torch.testing.assert_close(said.eps, eps, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(said.x0, x_0, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(said.velocity, eps - x_0, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("space", ["epsilon", "v_prediction", "sample", "velocity"])
def test_a_correction_of_the_noise_is_worth_as_much_in_the_models_own_space(space):
    at = Coefficients.of_alpha_bar(0.3)
    if space == "velocity":
        at = Coefficients(0.3, 0.7)
    x_t, output, delta = randn(0), randn(1), 0.1 * randn(2)
    before = Prediction(output, x_t, at, space).eps
    after = Prediction(output + output_per_eps(space, at) * delta, x_t, at, space).eps
    torch.testing.assert_close(after - before, delta, atol=1e-5, rtol=1e-4)


def test_in_flow_matching_the_difference_of_noises_vanishes_at_pure_noise_and_that_of_velocities_does_not():
    """With ``x_t = (1−σ) x_0 + σ ε``: ``Δε = (1−σ) Δv``."""
    x_t, u, other = randn(0), randn(1), randn(2)
    for sigma in (1.0, 0.4):
        at = Coefficients(1 - sigma, sigma)
        one, two = (Prediction(output, x_t, at, "velocity") for output in (u, other))
        torch.testing.assert_close(one.eps - two.eps, (1 - sigma) * (u - other), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(one.x0 - two.x0, -sigma * (u - other), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_noising_and_targets_are_diffusers_to_the_last_bit(prediction_type):
    theirs = DDPMScheduler(**BETAS, prediction_type=prediction_type)
    schedule = NoiseSchedule(DDIMScheduler(**BETAS, prediction_type=prediction_type))
    x_0, eps, t = randn(0), randn(1), torch.tensor([0, 500, 999])
    assert torch.equal(schedule.noised(x_0, eps, t), theirs.add_noise(x_0, eps, t))
    target = eps if prediction_type == "epsilon" else theirs.get_velocity(x_0, eps, t)
    assert torch.equal(schedule.target(x_0, eps, t), target)


@pytest.mark.parametrize("space", ["epsilon", "v_prediction", "sample"])
def test_a_step_is_ddims(space):
    theirs = DDIMScheduler(**BETAS, prediction_type=space, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    schedule = NoiseSchedule(theirs)
    theirs.set_timesteps(20)
    assert schedule.steps(20) == theirs.timesteps.tolist()
    x_t, output = randn(0), randn(1)
    t, following = schedule.steps(20)[4:6]
    ours = schedule.step(schedule.prediction(output, x_t, t), following)
    torch.testing.assert_close(ours, theirs.step(output, t, x_t).prev_sample, atol=1e-5, rtol=1e-5)


def test_a_model_that_sees_pure_noise_is_followed_from_there():
    """Zero terminal SNR: ``ᾱ_T = 0``, where ``x̂_0`` of a v-prediction is ``−v``."""
    schedule = NoiseSchedule(DDIMScheduler(**BETAS, prediction_type="v_prediction", rescale_betas_zero_snr=True))
    assert schedule.at(999).signal == 0
    said = schedule.prediction(randn(1), randn(0), 999)
    assert torch.equal(said.x0, -randn(1)) and bool(schedule.step(said, 950).isfinite().all())


def test_an_unknown_space_is_refused():
    with pytest.raises(ValueError, match="unknown prediction type 'score'"):
        NoiseSchedule(DDIMScheduler(**BETAS, prediction_type="score"))
