"""Fine-tuning Stable Diffusion XL: diffusers' own step, exact resume, caches of all embeddings, and adapters."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from PIL import Image

from curate.reading.writing import write_shard
from tests.train.families import tiny_xl
from tests.train.finetune.runs import assert_ends_with, killed_run_ends_the_same, same, settings, weights
from train.denoising.families.registry import denoiser_of
from train.denoising.opening.config import LoRAConfig
from train.denoising.opening.loading import load_pipeline
from train.finetune.batches.layout import image_sizes, lay_out
from train.finetune.caches.latents import encode_moments
from train.finetune.config import Augmentation, Buckets, FilterConfig
from train.finetune.data.scan import scan_once
from train.finetune.loop import run_finetune
from train.finetune.model.diffusion import draw_randomness

SIDES = [(96, 64), (64, 96), (64, 64), (128, 64)]  # width, height


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("xl")
    tiny_xl().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> str:
    """Eight images of several shapes."""
    folder, rng = tmp_path_factory.mktemp("shards"), np.random.default_rng(0)
    samples = []
    for number in range(8):
        width, height = SIDES[number % 4]
        pixels = rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC).save(file, "PNG")
        caption = ["red apple", "grinning face", "a smiling food", "fruit"][number // 2]
        samples.append((f"{number:04d}", {"png": file.getvalue(), "txt": caption.encode()}))
    write_shard(str(folder / "000000.tar"), samples)
    return str(folder)


def reference_steps(model: str, config, steps: int) -> tuple[dict[str, torch.Tensor], list[tuple[int, ...]]]:
    """The UNet's weights after so many steps of diffusers' ``train_text_to_image_sdxl.py``, and the sizes it was told.

    The step is that script's; the data and the random numbers are those that the run draws.
    """
    from diffusers import DDPMScheduler

    pipe = load_pipeline(model)
    unet, vae = pipe.unet.train(), pipe.vae
    pipe.text_encoder.eval(), pipe.text_encoder_2.eval()
    noise_scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=config.learning_rate, weight_decay=1e-2, eps=1e-8)
    shard_set = scan_once(config, Accelerator(cpu=True))
    sizes = image_sizes(config, 64, pipe.vae_scale_factor)
    loader, order = lay_out(shard_set, sizes, config, config.batch_size)
    told = []
    for step in range(steps):
        positions = range(step * config.batch_size, (step + 1) * config.batch_size)
        found = [order.at(position) for position in positions]
        images = [Image.open(io.BytesIO(loader.reader.read(row))) for row, _ in found]
        pixel_values = torch.from_numpy(np.stack([loader.load(row, visit) for row, visit in found])) / 255 * 2 - 1
        time_ids = []
        for image in images:  # resize so that the smaller side is the resolution, then crop the middle
            scale = max(64 / image.width, 64 / image.height)
            top, left = round((image.height * scale - 64) / 2), round((image.width * scale - 64) / 2)
            time_ids.append((image.height, image.width, top, left, 64, 64))
        told += time_ids
        captions = [shard_set.captions(row)[0] for row, _ in found]
        with torch.no_grad():
            embeds, pooled = [], None
            for tokenizer, encoder in zip(
                (pipe.tokenizer, pipe.tokenizer_2), (pipe.text_encoder, pipe.text_encoder_2), strict=True
            ):
                ids = tokenizer(
                    captions,
                    padding="max_length",
                    max_length=tokenizer.model_max_length,
                    truncation=True,
                    return_tensors="pt",
                ).input_ids
                output = encoder(ids, output_hidden_states=True, return_dict=False)
                pooled = output[0]
                embeds.append(output[-1][-2])
            prompt_embeds = torch.concat(embeds, dim=-1)
            posterior = vae.encode(pixel_values).latent_dist
        draws = draw_randomness(positions, posterior.mean.shape[1:], 1000, config.seed)
        model_input = (posterior.mean + posterior.std * draws.posterior) * vae.config.scaling_factor
        noisy_model_input = noise_scheduler.add_noise(model_input, draws.noise, draws.t)
        added = {"time_ids": torch.tensor(time_ids, dtype=torch.float32), "text_embeds": pooled}
        model_pred = unet(noisy_model_input, draws.t, prompt_embeds, added_cond_kwargs=added, return_dict=False)[0]
        loss = F.mse_loss(model_pred.float(), draws.noise.float(), reduction="mean")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return unet.state_dict(), told


def test_ten_steps_are_those_of_diffusers_own_script(model, shards, tmp_path):
    config = settings(
        model, shards, tmp_path / "run", steps=10, batch_size=2, caption_dropout=0.0, crop="center", resolution=64
    )
    run_finetune(config)
    expected, told = reference_steps(model, config, 10)
    assert len(set(told)) == 4  # sizes and crops that differ
    assert_ends_with(expected, model, tmp_path / "run")


def test_killed_and_run_again_it_ends_with_the_same_weights_to_the_bit(model, shards, tmp_path):
    options = {
        "steps": 8, "crop": "random", "buckets": Buckets(step=32), "filter": FilterConfig("every_step", threshold=1.5),
        "cache_text": "memory", "checkpoint_every": 2, "batch_size": 2, "ema_decay": 0.9,
    }  # fmt: skip
    lines = killed_run_ends_the_same(model, shards, tmp_path, **options)
    assert 0 < sum(line["dropped"] for line in lines) < 16


def test_the_filter_judges_by_the_empty_prompt_at_the_images_own_size_and_crop(model, shards, tmp_path):
    config = settings(
        model, shards, tmp_path / "run", steps=1, batch_size=1, caption_dropout=0.0, crop="center", resolution=64,
        filter=FilterConfig("every_step", threshold=100.0),
    )  # fmt: skip
    run_finetune(config)
    table = parquet.read_table(tmp_path / "run" / "verdicts.parquet").to_pylist()
    (seen,) = [one for one in table if one["judged"]]
    (found,) = [m for m in seen["magnitude_by_band"] if m is not None]

    pipe, shard_set = load_pipeline(model), scan_once(config, Accelerator(cpu=True))
    loader, order = lay_out(shard_set, image_sizes(config, 64, 4), config, 1)
    row, _ = order.at(0)
    assert seen["key"] == shard_set.identity(row)[1]
    draws = draw_randomness([0], (4, 16, 16), 1000, config.seed)
    denoiser = denoiser_of(pipe)
    moments = encode_moments(pipe.vae, torch.from_numpy(loader.load(row, 0))[None])
    mean, logvar = moments.chunk(2, 1)
    x_0 = (mean + (logvar / 2).exp() * draws.posterior) * pipe.vae.config.scaling_factor
    x_t = denoiser.schedule.noised(x_0, draws.noise, draws.t)
    frame = torch.tensor([loader.frame(row, 0)])
    with torch.no_grad():
        cond, uncond = (
            denoiser.predict(x_t, draws.t, denoiser.framed(denoiser.encode([text]), frame)).eps
            for text in (shard_set.captions(row)[0], "")
        )
    assert found == pytest.approx(float((cond - uncond).norm()), rel=1e-4)


def test_the_frame_of_an_image_is_the_part_that_is_trained_on(shards, tmp_path):
    config = settings("", shards, tmp_path, crop="random", resolution=64, augmentation=Augmentation(flip=0.5))
    loader, _ = lay_out(scan_once(config, Accelerator(cpu=True)), image_sizes(config, 64, 4), config, 2)
    flipped = plain = 0
    for visit in range(12):
        height, width, top, left, *target = loader.frame(0, visit)
        assert (height, width, target) == (64, 96, [64, 64]) and top == 0 and 0 <= left <= 32
        image = np.asarray(Image.open(io.BytesIO(loader.reader.read(0)))).transpose(2, 0, 1)
        seen = loader.load(0, visit).astype(int)
        distances = [
            np.abs(one[:, :, left : left + 64].astype(int) - seen).mean() for one in (image, image[:, :, ::-1])
        ]
        assert min(distances) < 12 and max(distances) > 20  # the crop lies between pixels
        flipped, plain = flipped + (distances[1] < distances[0]), plain + (distances[0] < distances[1])
    assert flipped and plain


def test_embeddings_of_both_encoders_and_the_pooled_one_are_cached(model, shards, tmp_path):
    options = {"steps": 3, "caption_dropout": 0.3, "cache_latents": "memory"}
    run_finetune(settings(model, shards, tmp_path / "fresh", **options))
    for where in ("memory", "disk"):
        run_finetune(settings(model, shards, tmp_path / where, cache_text=where, **options))
        pairs = zip(weights(tmp_path / "fresh").values(), weights(tmp_path / where).values(), strict=True)
        for fresh, cached in pairs:
            torch.testing.assert_close(fresh, cached, rtol=0, atol=3e-3)  # half precision
    assert same(weights(tmp_path / "memory"), weights(tmp_path / "disk"))


@pytest.mark.parametrize("text", [False, True])
def test_adapters_load_in_the_stock_pipeline_as_they_were_trained(model, shards, tmp_path, text):
    config = settings(
        model, shards, tmp_path / "run", steps=3, learning_rate=1e-2, lora=LoRAConfig(rank=2), train_text_encoder=text
    )
    run_finetune(config)
    stock, fused = tiny_xl(), load_pipeline(str(tmp_path / "run" / "model"))
    stock.load_lora_weights(str(tmp_path / "run" / "lora"))
    for name in ("text_encoder", "text_encoder_2"):
        assert bool(getattr(getattr(stock, name), "peft_config", None)) == text
    call = {"num_inference_steps": 2, "output_type": "latent", "generator": torch.Generator().manual_seed(0)}
    adapted = stock("red apple", **call).images
    call["generator"] = torch.Generator().manual_seed(0)
    torch.testing.assert_close(fused("red apple", **call).images, adapted, rtol=1e-4, atol=1e-4)
    call["generator"] = torch.Generator().manual_seed(0)
    assert (tiny_xl()("red apple", **call).images - adapted).abs().max() > 1e-2
    other = tiny_xl()
    other.load_lora_weights(str(tmp_path / "run" / "lora"), weight_name="kohya.safetensors")
    call["generator"] = torch.Generator().manual_seed(0)
    torch.testing.assert_close(other("red apple", **call).images, adapted, rtol=1e-4, atol=1e-4)
    own = load_pipeline(model, lora=str(tmp_path / "run" / "lora"))
    assert torch.equal(own.unet.conv_in.weight, fused.unet.conv_in.weight)


def test_trained_text_encoders_learn_but_for_what_no_output_hangs_on(model, shards, tmp_path):
    run_finetune(settings(model, shards, tmp_path / "run", steps=2, train_text_encoder=True))
    before, after = load_pipeline(model), load_pipeline(str(tmp_path / "run" / "model"))
    changed = {
        f"{part}.{name}": not torch.equal(value, getattr(before, part).state_dict()[name])
        for part in ("text_encoder", "text_encoder_2")
        for name, value in getattr(after, part).state_dict().items()
    }
    still = {name for name, moved in changed.items() if not moved}
    assert still and all("layers.1." in name or "final_layer_norm" in name for name in still)
    assert all(name.startswith("text_encoder.") for name in still)
    denoiser = denoiser_of(tiny_xl())
    assert set(denoiser.encoders) == {"text_encoder", "text_encoder_2"}


def test_the_run_leaves_a_folder_that_the_stock_pipeline_opens(model, shards, tmp_path):
    from diffusers import StableDiffusionXLPipeline

    config = settings(model, shards, tmp_path / "run", steps=1, ema_decay=0.9, snr_gamma=5.0)
    run_finetune(config)
    pipe = StableDiffusionXLPipeline.from_pretrained(tmp_path / "run" / "model", add_watermarker=False)
    assert type(pipe.scheduler).__name__ == "EulerDiscreteScheduler"
    assert Path(tmp_path / "run" / "model" / "README.md").exists()
