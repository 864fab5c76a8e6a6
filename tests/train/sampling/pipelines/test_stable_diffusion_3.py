"""Guided Stable Diffusion 3: the stock pipeline's images bit for bit without terms, and terms on velocities."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch

from tests.train.families import t5, tiny_sd3
from tests.train.sampling.pipelines.test_pipelines import PROMPTS, Scaled, seeds
from train.denoising.families.registry import denoiser_of
from train.sampling.pipelines.registry import guided


@pytest.fixture(scope="module", params=[False, True], ids=["without T5", "with T5"])
def pipe(request):
    return tiny_sd3(with_t5=request.param)


def both(pipe, name: str = "FlowMatchEulerDiscreteScheduler", **options):
    kind = getattr(diffusers, name)
    stock = diffusers.StableDiffusion3Pipeline(
        **{
            **{n: p for n, p in pipe.components.items() if n not in ("image_encoder", "feature_extractor")},
            "scheduler": kind.from_config(pipe.scheduler.config, **options),
        }
    )
    stock.set_progress_bar_config(disable=True)
    return stock, guided(stock, scheduler=kind.from_config(stock.scheduler.config))


SCHEDULERS = [
    ("FlowMatchEulerDiscreteScheduler", {}),
    ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}),
    ("FlowMatchHeunDiscreteScheduler", {}),
    ("UniPCMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}),
]


@pytest.mark.parametrize(("name", "options"), SCHEDULERS)
def test_without_terms_the_images_are_the_stock_pipelines_bit_for_bit(pipe, name, options):
    stock, drawing = both(pipe, name, **options)
    call = {"num_inference_steps": 4, "output_type": "np"}
    expected = stock(PROMPTS, generator=seeds(1, 2), **call).images
    output = drawing(PROMPTS, generator=seeds(1, 2), **call)
    np.testing.assert_array_equal(output.images, expected)
    assert all(row["magnitude"] > 0 for row in output.trace)  # at σ = 1 too


def halve(pipe, i, t, tensors):
    return {"pooled_prompt_embeds": tensors["pooled_prompt_embeds"] * 0.5, "latents": tensors["latents"] * 0.9}


@pytest.mark.parametrize(
    "call",
    [
        {"negative_prompt": ["blue", "sad"]},
        {"prompt_2": ["smiling", "food"], "prompt_3": ["food", "fruit"], "negative_prompt_3": ["blue", "sad"]},
        {"num_images_per_prompt": 2, "generator": "one"},
        {"guidance_scale": 1.0},
        {"height": 32, "width": 48},
        {"sigmas": [1.0, 0.6, 0.2]},
        {"clip_skip": 1},
        {"max_sequence_length": 64},
        {"skip_guidance_layers": [1], "skip_layer_guidance_stop": 0.9},
        {"prompt_embeds": "computed"},
        {"latents": "given"},
        {"output_type": "latent"},
        {"callback_on_step_end": halve, "callback_on_step_end_tensor_inputs": ["pooled_prompt_embeds", "latents"]},
    ],
    ids=lambda call: next(iter(call)),
)
def test_every_usual_argument_means_what_it_means_in_the_stock_pipeline(pipe, call):
    call = dict(call)
    stock, drawing = both(pipe)
    call = {"prompt": PROMPTS, "num_inference_steps": 3, "generator": "each", "output_type": "np", **call}
    if call.get("prompt_embeds") == "computed":
        names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
        found = stock.encode_prompt(PROMPTS, PROMPTS, PROMPTS, torch.device("cpu"))
        call |= dict(zip(names, found, strict=True)) | {"prompt": None}
    if "latents" in call:
        call["latents"] = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(3))

    def draw(pipe):
        generator = seeds(1, 2) if call["generator"] == "each" else seeds(5)[0]
        return pipe(**{**call, "generator": generator}, return_dict=False)

    (expected,), (images,) = draw(stock), draw(drawing)
    np.testing.assert_array_equal(np.asarray(images), np.asarray(expected))


def test_taking_away_text_equals_sampling_at_a_lower_scale(pipe):
    """A correction of the velocity, from the first step at σ = 1 on: 7 − 2 is 5."""
    _, drawing = both(pipe)
    call = {"num_inference_steps": 4, "output_type": "latent"}
    expected = drawing(PROMPTS, generator=seeds(1, 2), guidance_scale=5.0, **call).images
    images = drawing(PROMPTS, generator=seeds(1, 2), guidance_scale=7.0, guidance=[Scaled([0, 1], 2.0)], **call).images
    torch.testing.assert_close(images, expected, rtol=1e-3, atol=1e-3)


def test_images_that_no_term_acts_on_keep_every_bit(pipe):
    _, drawing = both(pipe)
    call = {"num_inference_steps": 3, "output_type": "np"}
    plain = drawing(PROMPTS, generator=seeds(1, 2), **call).images
    output = drawing(PROMPTS, generator=seeds(1, 2), guidance=[Scaled([1])], **call)
    np.testing.assert_array_equal(output.images[0], plain[0])
    assert np.abs(output.images[1] - plain[1]).max() > 1e-3


def test_prompts_are_encoded_as_the_stock_pipeline_does(pipe):
    embeds, negative, pooled, negative_pooled = pipe.encode_prompt(PROMPTS, PROMPTS, PROMPTS)
    denoiser = denoiser_of(pipe)
    for encoded in (denoiser.encode([*PROMPTS, ""]), denoiser.encoded(denoiser.tokens([*PROMPTS, ""]))):
        torch.testing.assert_close(encoded.embeds[:2], embeds)
        torch.testing.assert_close(encoded.embeds[2:], negative[:1])
        torch.testing.assert_close(encoded.parts["pooled"], torch.cat([pooled, negative_pooled[:1]]))


def test_the_denoisers_own_drawing_follows_the_schedule_to_the_stock_pipelines_image(pipe):
    """``FlowSchedule.steps`` and ``step`` are the stock pipeline's Euler trajectory."""
    denoiser = denoiser_of(pipe)
    x_T, schedule = denoiser.noise([3]), denoiser.schedule
    cond, empty = denoiser.encode(["red apple"]), denoiser.encode([""])
    stock, _ = both(pipe)
    call = {"num_inference_steps": 4, "guidance_scale": 7.0, "latents": x_T, "output_type": "latent"}
    expected = stock("red apple", **call).images
    steps, x_t = schedule.steps(4), x_T
    with torch.no_grad():
        for t, following in zip(steps, [*steps[1:], 0.0], strict=True):
            prediction = denoiser.predict(x_t, t, cond).guided_from(denoiser.predict(x_t, t, empty), 7.0)
            x_t = schedule.step(prediction, following)
    torch.testing.assert_close(x_t, expected, rtol=1e-3, atol=1e-4)


def test_a_t5_tokenizer_of_fewer_tokens_says_how_many_stand_in_the_sequence():
    short = t5()[1]
    short.model_max_length = 1
    pipe = tiny_sd3()
    pipe.register_modules(tokenizer_3=short)
    stock, drawing = both(pipe)
    denoiser = denoiser_of(pipe)
    assert denoiser.sequence[-1] == ("tokenizer_3", 1) and denoiser.encode(["red apple"]).tokens == 16 + 1
    call = {"num_inference_steps": 2, "output_type": "np"}
    expected = stock("red apple", generator=seeds(1)[0], max_sequence_length=1, **call).images
    np.testing.assert_array_equal(drawing("red apple", generator=seeds(1)[0], **call).images, expected)
