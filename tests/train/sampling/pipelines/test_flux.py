"""Guided FLUX.1: the stock pipeline's images bit for bit, terms under true guidance, and what is refused."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch

from afresh.errors import UserError
from tests.train.families import tiny_flux
from tests.train.sampling.pipelines.test_pipelines import PROMPTS, Scaled, seeds
from train.denoising.families.registry import denoiser_of
from train.sampling.pipelines.registry import guided


@pytest.fixture(scope="module", params=[True, False], ids=["dev", "schnell"])
def pipe(request):
    return tiny_flux(guidance_embeds=request.param)


def both(pipe, name: str = "FlowMatchEulerDiscreteScheduler", **options):
    kind = getattr(diffusers, name)
    parts = {n: p for n, p in pipe.components.items() if n not in ("image_encoder", "feature_extractor")}
    stock = diffusers.FluxPipeline(**{**parts, "scheduler": kind.from_config(pipe.scheduler.config, **options)})
    stock.set_progress_bar_config(disable=True)
    drawing = guided(stock, scheduler=kind.from_config(stock.scheduler.config))
    stock.default_sample_size = drawing.default_sample_size = pipe.default_sample_size
    return stock, drawing


@pytest.mark.parametrize(
    "call",
    [
        {},
        {"negative_prompt": ["blue", "sad"], "true_cfg_scale": 3.0},
        {"negative_prompt": ["blue", "sad"]},
        {"prompt_2": ["smiling", "food"], "guidance_scale": 7.0},
        {"num_images_per_prompt": 2, "generator": "one"},
        {"height": 32, "width": 48},
        {"sigmas": [1.0, 0.6, 0.2]},
        {"max_sequence_length": 64},
        {"prompt_embeds": "computed"},
        {"output_type": "latent"},
        {"scheduler": "UniPCMultistepScheduler"},
        {"callback_on_step_end": lambda pipe, i, t, tensors: {"latents": tensors["latents"] * 0.9}},
    ],
    ids=lambda call: next(iter(call), "plain"),
)
def test_without_terms_the_images_are_the_stock_pipelines_bit_for_bit(pipe, call):
    call, flow = dict(call), {}
    if "scheduler" in call:
        flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "use_dynamic_shifting": False}
    stock, drawing = both(pipe, call.pop("scheduler", "FlowMatchEulerDiscreteScheduler"), **flow)
    call = {"prompt": PROMPTS, "num_inference_steps": 3, "generator": "each", "output_type": "np", **call}
    if call.get("prompt_embeds") == "computed":
        embeds, pooled, _ = stock.encode_prompt(PROMPTS)
        call |= {"prompt": None, "prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def draw(pipe):
        generator = seeds(1, 2) if call["generator"] == "each" else seeds(5)[0]
        return pipe(**{**call, "generator": generator}, return_dict=False)

    (expected,), (images,) = draw(stock), draw(drawing)
    np.testing.assert_array_equal(np.asarray(images), np.asarray(expected))


def test_terms_act_under_true_guidance_and_are_refused_without_it():
    _, drawing = both(tiny_flux())
    call = {"num_inference_steps": 3, "output_type": "latent", "negative_prompt": ["", ""]}
    expected = drawing(PROMPTS, generator=seeds(1, 2), true_cfg_scale=3.0, **call).images
    images = drawing(PROMPTS, generator=seeds(1, 2), true_cfg_scale=5.0, guidance=[Scaled([0, 1], 2.0)], **call).images
    torch.testing.assert_close(images, expected, rtol=1e-3, atol=1e-3)
    with pytest.raises(UserError, match="guidance terms need true classifier-free guidance"):
        drawing(PROMPTS, guidance=[Scaled([0])], num_inference_steps=2)
    _, schnell = both(tiny_flux(guidance_embeds=False))
    with pytest.raises(UserError, match="schnell is distilled to a few steps without guidance"):
        schnell(PROMPTS, guidance=[Scaled([0])], true_cfg_scale=3.0, **call)


def test_the_denoisers_own_drawing_follows_the_schedule_to_the_stock_pipelines_image(pipe):
    denoiser = denoiser_of(pipe)
    x_T, schedule, cond = denoiser.noise([3]), denoiser.schedule, denoiser.encode(["red apple"])
    stock, _ = both(pipe)
    packed = pipe._pack_latents(x_T, *x_T.shape)
    expected = stock("red apple", num_inference_steps=4, latents=packed, output_type="latent").images
    steps, x_t = schedule.steps(4), x_T
    with torch.no_grad():
        for t, following in zip(steps, [*steps[1:], 0.0], strict=True):
            prompted, empty = (denoiser.predict(x_t, t, one) for one in (cond, denoiser.encode([""])))
            x_t = schedule.step(denoiser.guided(prompted, empty, 7.5), following)
    torch.testing.assert_close(pipe._pack_latents(x_t, *x_t.shape), expected, rtol=1e-3, atol=1e-4)
    (image,) = denoiser.draw(cond, x_T, steps=2, guidance_scale=7.5)
    assert image.size == (64, 64)
