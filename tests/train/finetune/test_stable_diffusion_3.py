"""Fine-tuning Stable Diffusion 3: diffusers' own step by flow matching, exact resume, caches, and adapters."""

from __future__ import annotations

import copy
from functools import partial

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers.training_utils import compute_loss_weighting_for_sd3

from afresh.errors import UsageError
from curate.reading.writing import write_shard
from curate.sample_set import load_part
from tests.train.families import tiny_sd3
from tests.train.finetune.runs import (
    assert_adapters_load,
    assert_ends_with,
    killed_run_ends_the_same,
    settings,
)
from train.denoising.opening.config import LoRAConfig
from train.denoising.opening.loading import load_pipeline
from train.finetune.batches.layout import image_sizes, lay_out
from train.finetune.config import Buckets, FilterConfig, Flow
from train.finetune.data.order import generator
from train.finetune.data.scan import scan_once
from train.finetune.loop import run_finetune
from train.finetune.model.diffusion import draw_randomness, timesteps_of


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("sd3")
    tiny_sd3(with_t5=True).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("shards")
    samples = load_part("finetune")[:8]
    write_shard(str(folder / "000000.tar"), [(sample.key, dict(sample.members)) for sample in samples])
    return str(folder)


def reference_steps(model: str, config, steps: int, precondition: bool, scheme: str) -> dict[str, torch.Tensor]:
    """The transformer's weights after steps of diffusers' ``train_dreambooth_lora_sd3.py`` without its adapters: its
    noising, preconditioning, target and weights, on the data and the random numbers that the run draws.
    """
    pipe = load_pipeline(model)
    transformer, vae = pipe.transformer.train(), pipe.vae
    noise_scheduler_copy = copy.deepcopy(pipe.scheduler)
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=config.learning_rate, weight_decay=1e-2, eps=1e-8)
    shard_set = scan_once(config, Accelerator(cpu=True))
    loader, order = lay_out(shard_set, image_sizes(config, 64, 8), config, config.batch_size)

    def get_sigmas(timesteps: torch.Tensor, n_dim: int = 4) -> torch.Tensor:
        schedule_timesteps = noise_scheduler_copy.timesteps
        step_indices = [(schedule_timesteps == t).nonzero().item() for t in timesteps]
        sigma = noise_scheduler_copy.sigmas[step_indices].flatten()
        return sigma.view(-1, *[1] * (n_dim - 1))

    for step in range(steps):
        positions = range(step * config.batch_size, (step + 1) * config.batch_size)
        found = [order.at(position) for position in positions]
        pixel_values = torch.from_numpy(np.stack([loader.load(row, visit) for row, visit in found])) / 255 * 2 - 1
        captions = [shard_set.captions(row)[0] for row, _ in found]
        with torch.no_grad():
            prompt_embeds, _, pooled_prompt_embeds, _ = pipe.encode_prompt(captions, captions, captions)
            posterior = vae.encode(pixel_values).latent_dist
        drawn = draw_randomness(positions, posterior.mean.shape[1:], 1000, config.seed)
        # u of the logit-normal density, from its own normal number.
        normal = []
        for position in positions:
            normal.append(torch.randn((), generator=generator(config.seed, "timesteps", position)))
        u = torch.sigmoid(torch.stack(normal))
        indices = (u * noise_scheduler_copy.config.num_train_timesteps).long()
        timesteps = noise_scheduler_copy.timesteps[indices]
        model_input = posterior.mean + posterior.std * drawn.posterior - vae.config.shift_factor
        model_input = model_input * vae.config.scaling_factor
        sigmas = get_sigmas(timesteps)
        noisy_model_input = (1.0 - sigmas) * model_input + sigmas * drawn.noise
        model_pred = transformer(
            hidden_states=noisy_model_input,
            timestep=timesteps,
            encoder_hidden_states=prompt_embeds,
            pooled_projections=pooled_prompt_embeds,
            return_dict=False,
        )[0]
        target = drawn.noise - model_input
        if precondition:
            model_pred = model_pred * (-sigmas) + noisy_model_input
            target = model_input
        weighting = compute_loss_weighting_for_sd3(weighting_scheme=scheme, sigmas=sigmas)
        loss = torch.mean(
            (weighting.float() * (model_pred.float() - target.float()) ** 2).reshape(len(captions), -1), 1
        )
        loss.mean().backward()
        torch.nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return transformer.state_dict()


@pytest.mark.parametrize(
    ("flow", "precondition", "scheme"),
    [
        (Flow(), False, "logit_normal"),
        (Flow(error_of="sample"), True, "logit_normal"),
        (Flow(weighting="cosmap"), False, "cosmap"),
        (Flow(weighting="sigma_sqrt", error_of="sample"), True, "sigma_sqrt"),
    ],
    ids=["velocity", "preconditioned", "cosmap", "sigma_sqrt"],
)
def test_ten_steps_are_those_of_diffusers_own_script(model, shards, tmp_path, flow, precondition, scheme):
    config = settings(
        model, shards, tmp_path / "run", steps=10, batch_size=2, caption_dropout=0.0, crop="center", flow=flow
    )
    run_finetune(config)
    assert_ends_with(reference_steps(model, config, 10, precondition, scheme), model, tmp_path / "run")


def test_noise_levels_follow_the_density_and_the_shift(shards):
    from diffusers import FlowMatchEulerDiscreteScheduler

    from train.denoising.schedules import FlowSchedule

    def drawn(flow: Flow, shift: float) -> torch.Tensor:
        schedule = FlowSchedule(FlowMatchEulerDiscreteScheduler(shift=shift))
        draw = timesteps_of(schedule, settings("", shards, "", flow=flow))
        g = torch.Generator().manual_seed(0)
        return torch.stack([draw(g) for _ in range(4000)]) / 1000

    for shift in (1.0, 3.0):  # the median of the logit-normal is u = 1/2, whatever its width
        middle = shift * 0.5 / (1 + (shift - 1) * 0.5)
        assert float(drawn(Flow(), shift).median()) == pytest.approx(middle, abs=0.02)
    uniform = drawn(Flow(density="uniform"), 1.0)
    assert float(uniform.mean()) == pytest.approx(0.5, abs=0.02) and float(uniform.min()) >= 0.001
    assert float(drawn(Flow(), 1.0).std()) < float(uniform.std())
    mode = drawn(Flow(density="mode"), 1.0)
    assert float(mode.min()) > 0 and float(mode.max()) <= 1


def test_killed_and_run_again_it_ends_with_the_same_weights_to_the_bit(model, shards, tmp_path):
    options = {
        "steps": 8, "crop": "random", "buckets": Buckets(step=32), "filter": FilterConfig("every_step", threshold=1.0),
        "cache_text": "memory", "checkpoint_every": 2, "batch_size": 2,
    }  # fmt: skip
    lines = killed_run_ends_the_same(model, shards, tmp_path, **options)
    assert sum(line["judged"] for line in lines) > 0


@pytest.mark.parametrize("text", [False, True])
def test_adapters_load_in_the_stock_pipeline_as_they_were_trained(model, shards, tmp_path, text):
    config = settings(
        model, shards, tmp_path / "run", steps=3, learning_rate=1e-2, lora=LoRAConfig(rank=2), train_text_encoder=text
    )
    run_finetune(config)
    assert_adapters_load(partial(tiny_sd3, with_t5=True), tmp_path / "run")


@pytest.mark.parametrize(
    "wrong",
    [{"snr_gamma": 5.0}, {"zero_terminal_snr": True}, {"prediction_type": "v_prediction"}],
    ids=["snr_gamma", "zero_terminal_snr", "prediction_type"],
)
def test_settings_for_schedules_of_betas_are_refused_by_name(model, shards, tmp_path, wrong):
    with pytest.raises(UsageError, match=f"{next(iter(wrong))} is for models with a schedule of betas"):
        run_finetune(settings(model, shards, tmp_path / "run", **wrong))


def test_a_shift_of_the_runs_own_is_saved_with_the_model(model, shards, tmp_path):
    run_finetune(settings(model, shards, tmp_path / "run", steps=1, flow=Flow(shift=2.0)))
    assert load_pipeline(str(tmp_path / "run" / "model")).scheduler.config.shift == 2.0
