"""Stable Diffusion XL: what is opened and refused, what its UNet is conditioned on, and its VAE in half precision."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from afresh.errors import UserError
from tests.train.families import tiny_xl
from train.denoising.families.registry import denoiser_of
from train.denoising.latents.decoder import Decoder
from train.denoising.latents.scaling import to_network, to_vae, without_overflow
from train.denoising.opening.files import check_folder
from train.denoising.opening.loading import check_trainable, load_pipeline

PROMPTS = ["red apple", "grinning face"]


@pytest.fixture(scope="module")
def pipe():
    return tiny_xl()


@pytest.fixture(scope="module")
def model(pipe, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("xl")
    pipe.save_pretrained(folder)
    return folder


def with_index(folder: Path, target: Path, **changes: object) -> Path:
    shutil.copytree(folder, target)
    path = target / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return target


# ------------------------------------------------------------------------------------------------------- opening


def test_a_folder_is_opened_as_the_stock_pipeline(model):
    pipe = load_pipeline(str(model), dtype=torch.float16)
    assert type(pipe).__name__ == "StableDiffusionXLPipeline"
    assert pipe.unet.dtype == pipe.text_encoder_2.dtype == torch.float16
    assert pipe.watermark is None
    check_trainable(pipe, "it")


def test_the_refiner_is_refused_by_name(model, tmp_path):
    null = [None, None]
    folder = with_index(
        model,
        tmp_path / "refiner",
        _class_name="StableDiffusionXLImg2ImgPipeline",
        text_encoder=null,
        tokenizer=null,
        requires_aesthetics_score=True,
    )
    with pytest.raises(UserError, match="a refiner of Stable Diffusion XL, .*give the base"):
        load_pipeline(str(folder))


@pytest.mark.parametrize("part", ["text_encoder_2", "tokenizer_2", "vae"])
def test_a_half_present_model_names_the_missing_part(model, tmp_path, part):
    shutil.copytree(model, tmp_path / "half", ignore=shutil.ignore_patterns(part))
    with pytest.raises(UserError, match=f"lacks {part}:"):
        check_folder(tmp_path / "half", None)


def test_a_second_encoder_that_is_null_is_named(model, tmp_path):
    folder = with_index(model, tmp_path / "null", text_encoder_2=[None, None])
    with pytest.raises(UserError, match="this Stable Diffusion XL comes without text_encoder_2"):
        check_folder(folder, None)


def test_an_inpainting_unet_and_one_without_sizes_are_refused(model, tmp_path):
    from diffusers import UNet2DConditionModel

    pipe = tiny_xl()
    own = {key: value for key, value in pipe.unet.config.items() if not key.startswith("_")}
    for changes, said in (
        ({"in_channels": 9}, "takes 9 channels where latents have 4"),
        ({"addition_embed_type": None}, "not conditioned on pooled embeddings and sizes"),
    ):
        folder = tmp_path / said.split()[0]
        shutil.copytree(model, folder)
        UNet2DConditionModel(**own | changes).save_pretrained(folder / "unet")
        with pytest.raises(UserError, match=said):
            load_pipeline(str(folder))


# ---------------------------------------------------------------------------------------------------- conditioning


@pytest.mark.parametrize("zeros", [True, False])
def test_prompts_are_encoded_as_the_stock_pipeline_does_and_the_empty_one_as_its_unconditional_half(zeros):
    pipe = tiny_xl(force_zeros_for_empty_prompt=zeros)
    embeds, negative, pooled, negative_pooled = pipe.encode_prompt(PROMPTS, device="cpu")
    denoiser = denoiser_of(pipe)
    for encoded in (denoiser.encode([*PROMPTS, ""]), denoiser.encoded(denoiser.tokens([*PROMPTS, ""]))):
        assert torch.equal(encoded.embeds[:2], embeds) and torch.equal(encoded.parts["pooled"][:2], pooled)
        torch.testing.assert_close(encoded.embeds[2:], negative[:1], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(encoded.parts["pooled"][2:], negative_pooled[:1], rtol=1e-5, atol=1e-6)
        assert (encoded.embeds[2].abs().max() == 0) == zeros


def test_the_network_is_told_the_sizes_that_the_stock_pipeline_tells_it(pipe):
    denoiser, seen = denoiser_of(pipe), []
    hook = pipe.unet.register_forward_pre_hook(lambda _, args, given: seen.append(given), with_kwargs=True)
    try:
        pipe("red apple", num_inference_steps=1, height=32, width=48, guidance_scale=1, output_type="latent")
        denoiser(torch.randn(1, 4, 8, 12), 500, denoiser.encode(["red apple"]))
    finally:
        hook.remove()
    stock, own = (given["added_cond_kwargs"] for given in seen)
    assert torch.equal(stock["time_ids"], own["time_ids"])
    assert own["time_ids"].tolist() == [[32, 48, 0, 0, 32, 48]]
    assert torch.equal(stock["text_embeds"], own["text_embeds"])


def test_sizes_and_pooled_embeddings_change_the_prediction(pipe):
    denoiser = denoiser_of(pipe)
    x_t, cond = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0)), denoiser.encode(PROMPTS)
    frames = torch.tensor([[64, 64, 0, 0, 64, 64], [512, 384, 0, 40, 64, 64]])
    with torch.no_grad():
        plain, framed = denoiser(x_t, 500, cond), denoiser(x_t, 500, denoiser.framed(cond, frames))
    torch.testing.assert_close(framed[0], plain[0])  # the frame of an uncropped image of its own size
    assert (framed[1] - plain[1]).abs().max() > 1e-4
    empty = denoiser.framed(denoiser.encode([""]), frames)
    assert len(empty) == 2


# ------------------------------------------------------------------------------------------------------------ VAE


def test_latents_are_scaled_as_the_vaes_config_says_with_means_by_channel_too(pipe):
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(to_network(z, pipe.vae), z * 0.13025)
    assert torch.equal(to_vae(z, pipe.vae), z / 0.13025)
    vae = tiny_xl().vae
    vae.register_to_config(latents_mean=[1.0, 2.0, 3.0, 4.0], latents_std=[2.0, 2.0, 4.0, 4.0])
    torch.testing.assert_close(to_vae(to_network(z, vae), vae), z)
    torch.testing.assert_close(to_network(z, vae)[:, 2], (z[:, 2] - 3) * 0.13025 / 4)
    vae.register_to_config(latents_mean=None, latents_std=None, shift_factor=0.5)
    torch.testing.assert_close(to_network(z, vae), (z - 0.5) * 0.13025)
    torch.testing.assert_close(to_vae(to_network(z, vae), vae), z)


def test_a_half_precision_vae_works_in_float32_and_is_half_again_afterwards():
    pipe = tiny_xl().to(torch.float16)
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    seen = []
    hook = pipe.vae.encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    latents = denoiser_of(pipe).encode_pixels(pixels)
    hook.remove()
    assert seen == [torch.float32] and pipe.vae.dtype == torch.float16
    reference = denoiser_of(tiny_xl()).encode_pixels(pixels)
    torch.testing.assert_close(latents, reference, rtol=1e-2, atol=1e-3)
    decoded = Decoder(pipe.vae, torch.device("cpu"))(latents)
    assert decoded.dtype == torch.float32 and decoded.isfinite().all()
    with without_overflow(tiny_xl().vae) as vae:
        assert vae.dtype == torch.float32
