"""Anisotropy minimisation: AdamW on the signal of that name, image by image."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.train.sampling.pipelines.test_pipelines import seeds
from tests.train.sampling.terms.test_rivals import denoise, make_start, text
from train.denoising.conditioning import Conditioning
from train.memorization import score
from train.sampling import AnisotropyMinimisation, GuidedStableDiffusion

PROMPTS = ["red apple", "grinning face"]
GAMMA = (2.0, 0.5)


def at_low_noise(x: Tensor, cond: Conditioning, rows: Tensor | None = None) -> Tensor:
    """Another function of the same text, as a denoiser is another one at another timestep."""
    return 0.3 * x + (x - 0.2) * denoise(torch.zeros_like(x), cond)


def anisotropy(x: Tensor, cond: Conditioning, uncond: Conditioning) -> Tensor:
    """The equation, written out."""
    low, empty = at_low_noise(x, cond), at_low_noise(x, uncond)
    direction = low - empty
    cosine = (direction * empty).sum(1) / (direction.norm(dim=1) * empty.norm(dim=1))
    m = (denoise(x, cond) - denoise(x, uncond)).flatten(1).norm(dim=1) * (4 * 64 * 64 / x[0].numel()) ** 0.5
    return GAMMA[0] * cosine.mean((1, 2)) + GAMMA[1] * m


def start_at_both_ends(asked: list[int]):
    return replace(make_start(), denoise_at=lambda t: asked.append(t) or at_low_noise)


def test_it_is_adamw_on_each_images_own_anisotropy():
    asked: list[int] = []
    start = start_at_both_ends(asked)
    options = {"cosine_weight": GAMMA[0], "magnitude_weight": GAMMA[1], "target": -2.0}
    change = AnisotropyMinimisation(steps=3, slice=2, **options).prepare(start)
    for i in range(3):
        x, first = start.x_t[i : i + 1], start.cond.embeds[i : i + 1, :1]
        rest = start.cond.embeds[i : i + 1, 1:].clone().requires_grad_()
        optimizer = torch.optim.AdamW([rest], lr=0.05)
        for _ in range(3):
            optimizer.zero_grad()
            anisotropy(x, text(torch.cat([first, rest], 1)), start.uncond[:1]).sum().backward()
            optimizer.step()
        torch.testing.assert_close(change.cond.embeds[i, 1:], rest.detach()[0], rtol=1e-4, atol=1e-5)
    assert torch.equal(change.cond.embeds[:, 0], start.cond.embeds[:, 0])  # the beginning
    torch.testing.assert_close(change.columns["anisotropy"], anisotropy(start.x_t, start.cond, start.uncond))
    after = anisotropy(start.x_t, change.cond, start.uncond)
    torch.testing.assert_close(change.columns["anisotropy_after"], after)
    assert set(asked) == {41} and bool((after < change.columns["anisotropy"]).all())


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_what_it_starts_from_is_the_signal_and_images_at_the_target_keep_every_bit(tiny_pipe, prediction_type):
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler.from_config(tiny_pipe.scheduler.config, prediction_type=prediction_type)
    guided = GuidedStableDiffusion.from_pipe(tiny_pipe, scheduler=scheduler)
    signal = score(guided, PROMPTS, seeds=np.array([[1], [2]]), signals=["anisotropy"]).per_prompt("anisotropy")
    target = float(signal.mean())
    call = {"num_inference_steps": 50, "output_type": "latent"}
    call["callback_on_step_end"] = lambda pipe, i, t, tensors: setattr(pipe, "_interrupt", i >= 1) or {}
    output = guided(PROMPTS, generator=seeds(1, 2), guidance=[AnisotropyMinimisation(target=target)], **call)
    found = [row["anisotropy"] for row in output.trace[:2]]
    assert found == pytest.approx(signal.tolist(), rel=1e-3)
    weak, strong = int(np.argmin(signal)), int(np.argmax(signal))
    plain = guided(PROMPTS, generator=seeds(1, 2), **call).images
    assert torch.equal(output.images[weak], plain[weak]) and not torch.equal(output.images[strong], plain[strong])
    assert output.trace[strong]["anisotropy_after"] < found[strong]
    assert [output.trace[i]["anisotropy_steps"] > 0 for i in (weak, strong)] == [False, True]


def test_it_needs_a_prompt_and_guidance(tiny_pipe):
    guided = GuidedStableDiffusion.from_pipe(tiny_pipe)
    with pytest.raises(ValueError, match="classifier-free guidance"):
        guided("flag", guidance_scale=1.0, num_inference_steps=1, guidance=[AnisotropyMinimisation()])
