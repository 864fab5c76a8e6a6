"""Guided Z-Image: the stock pipeline's images bit for bit, terms, and what the scale means."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch

from tests.train.families import tiny_z_image
from tests.train.sampling.pipelines.test_pipelines import PROMPTS, Scaled, seeds
from train.denoising.families.registry import denoiser_of
from train.sampling.pipelines.registry import guided
from train.sampling.pipelines.z_image import GuidedZImage

SIZE = {"height": 64, "width": 64}


@pytest.fixture(scope="module")
def pipe():
    return tiny_z_image()


def both(pipe, name: str = "FlowMatchEulerDiscreteScheduler", **options):
    kind = getattr(diffusers, name)
    scheduler = kind.from_config(pipe.scheduler.config, **options)
    stock = diffusers.ZImagePipeline(**{**pipe.components, "scheduler": scheduler})
    stock.set_progress_bar_config(disable=True)
    return stock, guided(stock, scheduler=kind.from_config(scheduler.config))


@pytest.mark.parametrize(
    "call",
    [
        {},
        {"guidance_scale": 0.0},
        {"negative_prompt": ["blue", "sad, and a longer one than that"]},
        {"num_images_per_prompt": 2, "generator": "one"},
        {"height": 32, "width": 48},
        {"sigmas": [1.0, 0.6, 0.2]},
        {"max_sequence_length": 24},
        {"cfg_normalization": 0.9},
        {"cfg_truncation": 0.2},
        {"prompt_embeds": "computed"},
        {"output_type": "latent"},
        {"callback_on_step_end": lambda pipe, i, t, tensors: {"latents": tensors["latents"] * 0.9}},
        {
            "callback_on_step_end": lambda pipe, i, t, tensors: {
                "prompt_embeds": [x * 0.5 for x in tensors["prompt_embeds"]]
            },
            "callback_on_step_end_tensor_inputs": ["prompt_embeds"],
        },
    ],
    ids=lambda call: next(iter(call), "plain"),
)
def test_without_terms_the_images_are_the_stock_pipelines_bit_for_bit(pipe, call):
    stock, drawing = both(pipe)
    call = {"prompt": PROMPTS, "num_inference_steps": 3, "generator": "each", "output_type": "np", **SIZE, **call}

    def draw(pipe):
        own = dict(call)
        if own.get("prompt_embeds") == "computed":
            own["prompt_embeds"], own["negative_prompt_embeds"] = stock.encode_prompt(list(PROMPTS))
            own["prompt"] = None
        elif own["prompt"] is not None:
            own["prompt"] = list(PROMPTS)  # the stock pipeline writes into it
        if "negative_prompt" in own:
            own["negative_prompt"] = list(own["negative_prompt"])
        own["generator"] = seeds(1, 2) if call["generator"] == "each" else seeds(5)[0]
        return pipe(**own, return_dict=False)

    (expected,), (images,) = draw(stock), draw(drawing)
    np.testing.assert_array_equal(np.asarray(images), np.asarray(expected))


def test_terms_take_from_a_scale_that_is_one_more_than_the_stock_pipelines(pipe):
    _, drawing = both(pipe)
    call = {"num_inference_steps": 3, "output_type": "latent", **SIZE}
    expected = drawing(PROMPTS, generator=seeds(1, 2), guidance_scale=2.0, **call).images
    guided = drawing(PROMPTS, generator=seeds(1, 2), guidance_scale=4.0, guidance=[Scaled([0, 1], 2.0)], **call)
    torch.testing.assert_close(guided.images, expected, rtol=1e-3, atol=1e-3)
    assert {row["scale"] for row in drawing(PROMPTS, guidance_scale=4.0, **call).trace} == {5.0}
    assert GuidedZImage.asked(7.5, None)["guidance_scale"] == 6.5


def test_a_batch_of_captions_of_several_lengths_is_what_each_is_alone(pipe):
    denoiser = denoiser_of(pipe)
    texts = ["red", "grinning face, face smiling, and some words more than the other has"]
    x_T = denoiser.noise([0, 1])
    with torch.no_grad():
        together = denoiser(x_T, 700.0, denoiser.encode(texts))
        alone = torch.cat([denoiser(x_T[i : i + 1], 700.0, denoiser.encode([texts[i]])) for i in range(2)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_the_denoisers_own_drawing_follows_the_schedule_to_the_stock_pipelines_image(pipe):
    denoiser = denoiser_of(pipe)
    x_T, schedule, cond = denoiser.noise([3]), denoiser.schedule, denoiser.encode(["red apple"])
    stock, _ = both(pipe)
    how = {"num_inference_steps": 4, "latents": x_T, "guidance_scale": 2.0, "output_type": "latent"}
    expected = stock("red apple", **how, **SIZE).images
    steps, x_t = schedule.steps(4), x_T
    with torch.no_grad():
        for t, following in zip(steps, [*steps[1:], 0.0], strict=True):
            prompted, empty = (denoiser.predict(x_t, t, one) for one in (cond, denoiser.encode([""])))
            x_t = schedule.step(denoiser.guided(prompted, empty, 3.0), following)
    torch.testing.assert_close(x_t, expected, rtol=1e-3, atol=1e-4)
    (image,) = denoiser.draw(cond, x_T, steps=4, guidance_scale=3.0)
    (same,) = stock("red apple", **{**how, "output_type": "pil"}, **SIZE).images
    assert image.size == (64, 64) and np.array_equal(np.asarray(image), np.asarray(same))
