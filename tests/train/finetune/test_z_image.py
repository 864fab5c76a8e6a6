"""Fine-tuning Z-Image: diffusers' own step in reversed time, exact resume, adapters, and what is not trained."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from afresh.errors import UsageError
from tests.train.families import tiny_z_image
from tests.train.finetune.runs import assert_adapters_load, assert_ends_with, killed_run_ends_the_same, settings
from tests.train.finetune.test_stable_diffusion_3 import shards
from train.denoising.opening.config import LoRAConfig
from train.denoising.opening.loading import load_pipeline
from train.finetune.batches.layout import image_sizes, lay_out
from train.finetune.config import FilterConfig, Flow
from train.finetune.data.order import generator
from train.finetune.data.scan import scan_once
from train.finetune.loop import run_finetune
from train.finetune.model.diffusion import draw_randomness

__all__ = ["shards"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("z-image")
    tiny_z_image().save_pretrained(folder)
    return str(folder)


def reference_steps(model: str, config, steps: int) -> dict[str, torch.Tensor]:
    """The transformer's weights after steps of diffusers' ``train_dreambooth_lora_z_image.py`` without its adapters, on
    the data and the random numbers that the run draws, at ``--weighting_scheme none``.
    """
    pipe = load_pipeline(model)
    transformer, vae = pipe.transformer.train(), pipe.vae
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=config.learning_rate, weight_decay=1e-2, eps=1e-8)
    shard_set = scan_once(config, Accelerator(cpu=True))
    loader, order = lay_out(shard_set, image_sizes(config, 64, 8), config, config.batch_size)
    for step in range(steps):
        positions = range(step * config.batch_size, (step + 1) * config.batch_size)
        found = [order.at(position) for position in positions]
        pixel_values = torch.from_numpy(np.stack([loader.load(row, visit) for row, visit in found])) / 255 * 2 - 1
        with torch.no_grad():
            prompt_embeds, _ = pipe.encode_prompt(
                [shard_set.captions(row)[0] for row, _ in found], do_classifier_free_guidance=False
            )
            posterior = vae.encode(pixel_values).latent_dist
        drawn = draw_randomness(positions, posterior.mean.shape[1:], 1000, config.seed)
        u = torch.stack([torch.rand((), generator=generator(config.seed, "timesteps", one)) for one in positions])
        indices = (u * pipe.scheduler.config.num_train_timesteps).long()
        timesteps = pipe.scheduler.timesteps[indices]
        sigmas = pipe.scheduler.sigmas[indices].view(-1, 1, 1, 1)
        model_input = posterior.mean + posterior.std * drawn.posterior
        model_input = (model_input - vae.config.shift_factor) * vae.config.scaling_factor
        noisy_model_input = (1.0 - sigmas) * model_input + sigmas * drawn.noise
        model_pred = transformer(
            list(noisy_model_input.unsqueeze(2).unbind(dim=0)),
            (1000 - timesteps) / 1000,
            prompt_embeds,
            return_dict=False,
        )[0]
        model_pred = -torch.stack(model_pred, dim=0).squeeze(2)
        target = drawn.noise - model_input
        loss = torch.mean(((model_pred.float() - target.float()) ** 2).reshape(len(target), -1), 1).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return transformer.state_dict()


def test_ten_steps_are_those_of_diffusers_own_script(model, shards, tmp_path):
    config = settings(
        model, shards, tmp_path / "run", steps=10, batch_size=2, caption_dropout=0.0, crop="center", resolution=64,
        flow=Flow(density="uniform"),
    )  # fmt: skip
    run_finetune(config)
    assert_ends_with(reference_steps(model, config, 10), model, tmp_path / "run")


def test_killed_and_run_again_it_ends_with_the_same_weights_to_the_bit(model, shards, tmp_path):
    options = {
        "steps": 8, "resolution": 64, "filter": FilterConfig("every_step", threshold=1.0), "cache_text": "memory",
        "checkpoint_every": 2, "batch_size": 2,
    }  # fmt: skip
    lines = killed_run_ends_the_same(model, shards, tmp_path, **options)
    assert sum(line["judged"] for line in lines) > 0


def test_adapters_load_in_the_stock_pipeline_as_they_were_trained(model, shards, tmp_path):
    lora = LoRAConfig(rank=2)
    run_finetune(settings(model, shards, tmp_path / "run", steps=3, learning_rate=1e-2, resolution=64, lora=lora))
    assert_adapters_load(tiny_z_image, tmp_path / "run", height=64, width=64)


def test_its_language_model_is_not_trained(model, shards, tmp_path):
    with pytest.raises(UsageError, match="train_text_encoder: Z-Image's is a language model, which is never trained"):
        run_finetune(settings(model, shards, tmp_path / "run", train_text_encoder=True))
