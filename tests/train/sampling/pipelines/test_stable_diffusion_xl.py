"""Guided Stable Diffusion XL: the stock images bit for bit without terms, and terms that touch only theirs."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch
from diffusers.callbacks import SDXLCFGCutoffCallback

from tests.train.families import tiny_xl
from tests.train.sampling.pipelines.test_pipelines import PROMPTS, SCHEDULERS, Scaled, seeds
from train.sampling.pipelines.registry import guided
from train.sampling.pipelines.stable_diffusion_xl import GuidedStableDiffusionXL


@pytest.fixture(scope="module")
def pipe():
    return tiny_xl()


def both(pipe, name: str = "EulerDiscreteScheduler", **options):
    """The stock and the guided pipeline, each with its own scheduler of a kind."""
    kind = getattr(diffusers, name)
    stock = diffusers.StableDiffusionXLPipeline(
        **{**pipe.components, "scheduler": kind.from_config(pipe.scheduler.config, **options)}, add_watermarker=False
    )
    stock.set_progress_bar_config(disable=True)
    drawing = guided(stock, scheduler=kind.from_config(stock.scheduler.config))
    assert type(drawing) is GuidedStableDiffusionXL
    return stock, drawing


@pytest.mark.parametrize(("name", "options"), SCHEDULERS)
def test_without_terms_the_images_are_the_stock_pipelines_bit_for_bit(pipe, name, options):
    stock, drawing = both(pipe, name, **options)
    call = {"num_inference_steps": 4, "output_type": "np"}
    expected = stock(PROMPTS, generator=seeds(1, 2), **call).images
    np.testing.assert_array_equal(drawing(PROMPTS, generator=seeds(1, 2), **call).images, expected)


def dim(pipe, i, t, tensors):
    return {"add_text_embeds": tensors["add_text_embeds"] * 0.5, "prompt_embeds": tensors["prompt_embeds"] * 0.9}


@pytest.mark.parametrize(
    "call",
    [
        {"negative_prompt": ["blue", "sad"]},
        {"negative_prompt": ["", ""]},
        {"prompt_2": ["smiling", "food"], "negative_prompt_2": ["blue", "sad"], "negative_prompt": ["no", "none"]},
        {"num_images_per_prompt": 2, "generator": "one"},
        {"guidance_scale": 1.0},
        {"guidance_rescale": 0.7},
        {"eta": 0.6, "scheduler": "DDIMScheduler"},
        {"height": 32, "width": 48},
        {"original_size": (512, 256), "crops_coords_top_left": (8, 16), "target_size": (64, 32)},
        {"negative_original_size": (256, 256), "negative_target_size": (32, 32)},
        {"denoising_end": 0.6},
        {"clip_skip": 1},
        {"timesteps": [901, 501, 101], "scheduler": "DPMSolverMultistepScheduler"},
        {"prompt_embeds": "computed"},
        {"latents": "given"},
        {"output_type": "latent"},
        {"output_type": "pt"},
        {"callback_on_step_end": dim, "callback_on_step_end_tensor_inputs": ["add_text_embeds", "prompt_embeds"]},
        {"callback_on_step_end": SDXLCFGCutoffCallback(cutoff_step_ratio=0.5), "prompt": ["red apple"]},
    ],
    ids=lambda call: next(iter(call)),
)
def test_every_usual_argument_means_what_it_means_in_the_stock_pipeline(pipe, call):
    call = dict(call)
    stock, drawing = both(pipe, call.pop("scheduler", "EulerDiscreteScheduler"))
    call = {"prompt": PROMPTS, "num_inference_steps": 3, "generator": "each", "output_type": "np", **call}
    if call.get("prompt_embeds") == "computed":
        names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
        call |= dict(zip(names, stock.encode_prompt(PROMPTS, device="cpu"), strict=True)) | {"prompt": None}
        call["prompt_embeds"] = call["prompt_embeds"] * 0.9
    if "latents" in call:
        call["latents"] = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(3))

    def draw(pipe):
        generator = seeds(1, 2)[: len(call["prompt"] or PROMPTS)] if call["generator"] == "each" else seeds(5)[0]
        return pipe(**{**call, "generator": generator}, return_dict=False)

    (expected,), (images,) = draw(stock), draw(drawing)
    np.testing.assert_array_equal(np.asarray(images), np.asarray(expected))


def test_a_half_precision_vae_that_overflows_decodes_as_in_the_stock_pipeline():
    half = tiny_xl().to(torch.float16)
    stock, drawing = both(half)
    call = {"num_inference_steps": 2, "output_type": "np"}
    expected = stock(PROMPTS, generator=seeds(1, 2), **call).images
    np.testing.assert_array_equal(drawing(PROMPTS, generator=seeds(1, 2), **call).images, expected)
    assert half.vae.dtype == torch.float16


@pytest.mark.parametrize(("name", "options"), SCHEDULERS[::4])
def test_images_that_no_term_acts_on_keep_every_bit(pipe, name, options):
    _, drawing = both(pipe, name, **options)
    call = {"num_inference_steps": 3, "output_type": "np"}
    plain = drawing(PROMPTS, generator=seeds(1, 2), **call).images
    output = drawing(PROMPTS, generator=seeds(1, 2), guidance=[Scaled([1])], **call)
    np.testing.assert_array_equal(output.images[0], plain[0])
    assert np.abs(output.images[1] - plain[1]).max() > 1e-3


def test_a_saved_guided_pipeline_is_opened_again(pipe, tmp_path):
    from train.denoising.opening.loading import load_pipeline

    guided(pipe).save_pretrained(tmp_path)
    assert type(load_pipeline(str(tmp_path))).__name__ == "StableDiffusionXLPipeline"
