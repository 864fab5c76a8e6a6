"""The end token's attention at the last step: which numbers it is made of, and the drawing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from afresh.errors import UserError
from train.denoising.families.stable_diffusion import initial_noise, tokenize
from train.memorization import bright_ending, draw_mask
from train.memorization.cross_attention import cross_attention_layers, recorded_attention
from train.memorization.end_attention import end_positions, finest_down_layers

PROMPTS = ["red apple, food fruit", "flag"]


def test_the_mask_is_the_end_tokens_attention_in_the_finest_down_layers_at_the_last_step(tiny_pipe):
    found = bright_ending(tiny_pipe, PROMPTS, seeds=[3, 4], num_inference_steps=3, guidance_scale=2.0)
    latents = []
    noise = torch.stack([initial_noise((4, 16, 16), seed) for seed in (3, 4)])
    drawn = tiny_pipe(
        PROMPTS,
        num_inference_steps=3,
        guidance_scale=2.0,
        latents=noise,
        callback_on_step_end=lambda pipe, step, t, tensors: latents.append((t, tensors["latents"])) or {},
    )
    assert [np.array(a).tolist() for a in found.images] == [np.array(b).tolist() for b in drawn.images]
    with torch.no_grad(), recorded_attention(tiny_pipe.unet, 2, lambda maps: maps.mean(1)) as recorded:
        text = tiny_pipe.text_encoder(tokenize(tiny_pipe, PROMPTS))[0]
        tiny_pipe.unet(latents[1][1], latents[2][0], text)
    name = next(name for name in cross_attention_layers(tiny_pipe.unet) if name.startswith("down_blocks."))
    maps = recorded.layers[name]
    assert found.masks.shape == (2, 8, 8)
    for row, mask in enumerate(found.masks):
        end = int(end_positions(tiny_pipe, PROMPTS)[row])
        assert mask.ravel() == pytest.approx(maps[row, :, end].numpy(), rel=1e-3)
    assert not any(layer._forward_pre_hooks for layer in cross_attention_layers(tiny_pipe.unet).values())


def test_the_end_token_is_the_first_one_after_the_caption(tiny_pipe):
    ids = tokenize(tiny_pipe, PROMPTS)
    for row, end in enumerate(end_positions(tiny_pipe, PROMPTS).tolist()):
        assert ids[row, end] == tiny_pipe.tokenizer.eos_token_id
        assert tiny_pipe.tokenizer.eos_token_id not in ids[row, :end]


def test_layers_are_chosen_by_name_and_size():
    maps = {"down_blocks.1.x": torch.ones(1, 16, 2), "down_blocks.0.y": torch.zeros(1, 64, 2)}
    maps |= {"down_blocks.0.z": torch.full((1, 64, 2), 2.0), "up_blocks.3.x": torch.full((1, 256, 2), 9.0)}
    assert torch.equal(finest_down_layers(maps), torch.ones(1, 64, 2))
    with pytest.raises(UserError, match="down blocks"):
        finest_down_layers({"up_blocks.3.x": maps["up_blocks.3.x"]})


def test_one_step_is_the_last_one_and_seeds_are_counted(tiny_pipe):
    assert bright_ending(tiny_pipe, PROMPTS[:1], seeds=[1], num_inference_steps=1).masks.max() > 0
    with pytest.raises(ValueError, match="one seed a prompt"):
        bright_ending(tiny_pipe, PROMPTS, seeds=[1])


def test_the_mask_is_drawn_where_it_is_bright():
    image = Image.new("L", (64, 64), 0)
    mask = np.zeros((8, 8), np.float32)
    mask[:, 4:] = 0.3
    drawn = np.array(draw_mask(image, mask))
    assert drawn.shape == (64, 64, 3)
    assert (drawn[:, :24] == 0).all() and (drawn[:, 40:, 0] > 150).all() and (drawn[:, 40:, 2] == 0).all()
    assert np.array(draw_mask(image, mask, brightest=0.6))[0, -1, 0] == pytest.approx(drawn[0, -1, 0] / 2, abs=2)
    assert not np.array(draw_mask(image, np.zeros((8, 8), np.float32))).any()
