"""Random draws, noising and targets, and the schedules that a run may change."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, PNDMScheduler, StableDiffusionPipeline

from afresh.errors import UsageError, UserError
from tests.train.finetune.runs import log_lines, same, settings, weights
from train.denoising.schedules import NoiseSchedule
from train.finetune.config import FilterConfig, FinetuneConfig, ValidationConfig
from train.finetune.loop import run_finetune
from train.finetune.model.diffusion import draw_randomness, sampling_scheduler

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SHAPE = (4, 8, 8)


def config(**changes) -> FinetuneConfig:
    return FinetuneConfig(model="", out="", shards=[], **changes)


def test_a_sample_draws_the_same_in_any_batch():
    options = {"noise_offset": 0.1, "input_perturbation": 0.2}
    together = draw_randomness(range(3, 6), SHAPE, 1000, 0, **options)
    alone = draw_randomness([4], SHAPE, 1000, 0, **options)
    assert all(torch.equal(a[1:2], b) for a, b in zip(together, alone, strict=True))
    other = draw_randomness([4], SHAPE, 1000, 1, **options)
    assert not any(torch.equal(a, b) for a, b in zip(alone, other, strict=True))


def test_noise_offset_shifts_whole_channels_and_changes_no_other_draw():
    plain, offset = (draw_randomness(range(4), SHAPE, 1000, 0, noise_offset=o) for o in (0.0, 0.5))
    shift = offset.noise - plain.noise
    torch.testing.assert_close(shift, shift[:, :, :1, :1].expand_as(shift), atol=1e-6, rtol=0)
    assert shift[:, :, 0, 0].flatten().unique().numel() == 16  # one number a sample and channel
    assert 0.2 < shift[:, :, 0, 0].std() < 0.9
    assert torch.equal(offset.input_noise, offset.noise)
    for name in ("posterior", "t", "uniform"):
        assert torch.equal(getattr(plain, name), getattr(offset, name))


def test_input_perturbation_leaves_the_targets_noise_clean():
    plain, perturbed = (draw_randomness(range(4), SHAPE, 1000, 0, input_perturbation=p) for p in (0.0, 0.1))
    assert torch.equal(plain.input_noise, plain.noise) and torch.equal(plain.noise, perturbed.noise)
    xi = (perturbed.input_noise - perturbed.noise) / 0.1
    assert abs(float(xi.mean())) < 0.1 and abs(float(xi.std()) - 1) < 0.1
    assert abs(float((xi * plain.noise).mean())) < 0.1  # independent of ε
    for name in ("posterior", "t", "uniform"):
        assert torch.equal(getattr(plain, name), getattr(perturbed, name))


def test_the_model_sees_the_perturbed_noise_and_is_asked_for_the_clean_one(model, shards, tmp_path, monkeypatch):
    seen = {}

    def run(name: str, **changes) -> None:
        noised, target = NoiseSchedule.noised, NoiseSchedule.target

        def spy(kind, method):
            def call(self, x_0, noise, t):
                seen.setdefault((name, kind), noise.clone())
                return method(self, x_0, noise, t)

            return call

        with monkeypatch.context() as patch:
            patch.setattr(NoiseSchedule, "noised", spy("input", noised))
            patch.setattr(NoiseSchedule, "target", spy("target", target))
            run_finetune(settings(model, shards, tmp_path / name, steps=1, **changes))

    run("plain")
    run("perturbed", input_perturbation=0.1)
    assert torch.equal(seen["plain", "input"], seen["plain", "target"])
    assert torch.equal(seen["perturbed", "target"], seen["plain", "target"])
    assert not torch.equal(seen["perturbed", "input"], seen["plain", "input"])
    assert log_lines(tmp_path / "plain")[0]["loss"] != log_lines(tmp_path / "perturbed")[0]["loss"]


@pytest.mark.parametrize("kind", [DDIMScheduler, PNDMScheduler, EulerDiscreteScheduler])
def test_the_forward_process_is_the_same_whatever_sampler_the_model_came_with(kind):
    schedule = NoiseSchedule(kind(**BETAS, prediction_type="v_prediction"), torch.device("cpu"))
    x_0, noise, t = torch.randn(2, *SHAPE), torch.randn(2, *SHAPE), torch.tensor([10, 990])
    alpha_bar = schedule.alpha_bar[t].view(-1, 1, 1, 1)
    torch.testing.assert_close(schedule.noised(x_0, noise, t), alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * noise)
    v = alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * x_0
    torch.testing.assert_close(schedule.target(x_0, noise, t), v)
    torch.testing.assert_close(
        schedule.prediction(v, schedule.noised(x_0, noise, t), t).eps, noise, atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("kind", [DDIMScheduler, PNDMScheduler, EulerDiscreteScheduler])
def test_zero_terminal_snr_ends_in_pure_noise_and_the_sampler_is_told(kind):
    before = NoiseSchedule(kind(**BETAS), torch.device("cpu")).alpha_bar
    scheduler = sampling_scheduler(kind(**BETAS), config(zero_terminal_snr=True, prediction_type="v_prediction"))
    saved = scheduler.config
    assert saved.rescale_betas_zero_snr and saved.timestep_spacing == "trailing"
    assert saved.prediction_type == "v_prediction"
    alpha_bar = NoiseSchedule(scheduler, torch.device("cpu")).alpha_bar
    assert alpha_bar[-1] == 0 and alpha_bar[0] == pytest.approx(float(before[0]), abs=1e-6)
    scheduler.set_timesteps(10)
    assert int(scheduler.timesteps[0]) == 999


def test_a_sampler_without_the_setting_gives_way_to_ddim_which_does_not_clip_latents():
    wanted = config(zero_terminal_snr=True, prediction_type="v_prediction")
    scheduler = sampling_scheduler(PNDMScheduler(**BETAS), wanted)
    assert type(scheduler) is DDIMScheduler and not scheduler.config.clip_sample


def test_zero_terminal_snr_is_refused_for_a_model_that_predicts_the_noise():
    with pytest.raises(UsageError, match="zero_terminal_snr needs a model that predicts v"):
        sampling_scheduler(DDIMScheduler(**BETAS), config(zero_terminal_snr=True))


def test_a_scheduler_that_nothing_changes_is_left_as_it_is():
    scheduler = PNDMScheduler(**BETAS)
    assert sampling_scheduler(scheduler, config()) is scheduler


def test_a_model_taught_v_on_a_zero_terminal_snr_schedule_is_saved_as_one(model, shards, tmp_path):
    summary = run_finetune(
        settings(
            model, shards, tmp_path / "run", steps=2, zero_terminal_snr=True, prediction_type="v_prediction",
            filter=FilterConfig("every_step", threshold=1e9), caption_dropout=0.0,
        )
    )  # fmt: skip
    assert all(line["grad_norm"] > 0 for line in log_lines(tmp_path / "run"))
    assert summary["judged"] == 8
    pipe = StableDiffusionPipeline.from_pretrained(summary["model"], safety_checker=None)
    saved = pipe.scheduler.config
    assert (saved.rescale_betas_zero_snr, saved.timestep_spacing) == (True, "trailing")
    assert saved.prediction_type == "v_prediction"
    image = pipe("a", num_inference_steps=2, output_type="np", generator=torch.Generator().manual_seed(0)).images
    assert (image == image).all() and image.std() > 0


def test_a_run_with_noise_options_is_another_and_ends_the_same_each_time(model, shards, tmp_path):
    for name, options in {
        "plain": {},
        "one": {"noise_offset": 0.1, "input_perturbation": 0.1},
        "two": {"noise_offset": 0.1, "input_perturbation": 0.1},
    }.items():
        run_finetune(settings(model, shards, tmp_path / name, steps=2, **options))
    assert same(weights(tmp_path / "one"), weights(tmp_path / "two"))
    assert not same(weights(tmp_path / "one"), weights(tmp_path / "plain"))


def test_steps_of_validation_images_that_the_scheduler_cannot_take_are_told_before_training():
    scheduler = PNDMScheduler(**BETAS)
    with pytest.raises(UserError, match="validation.steps: PNDMScheduler cannot take 3 steps"):
        sampling_scheduler(scheduler, config(validation=ValidationConfig(every=5, steps=3)))
    assert sampling_scheduler(scheduler, config(validation=ValidationConfig(every=5, steps=4))) is scheduler
    assert scheduler.timesteps is None  # it was tried on another
