"""Attention masking against its equation, and what it leaves alone."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0

from tests.train.sampling.pipelines.test_pipelines import seeds
from train.denoising.conditioning import GAIN, MASK, Conditioning
from train.denoising.families.stable_diffusion import StableDiffusionDenoiser, tokenize
from train.memorization.cross_attention import cross_attention_layers
from train.sampling import AttentionMasking, GuidedStableDiffusion, RandomTokens

PROMPTS = ["red apple, food fruit", "flag"]


class Published:
    """``softmax(C s_0, s_1, …, s_N, −∞, …)`` written out, for a batch whose images have N + 1 tokens each."""

    def __init__(self, beginning: float, lengths: list[int]) -> None:
        self.beginning, self.lengths = beginning, lengths

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        q, k, v = (
            part.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for part in (attn.to_q(hidden_states), attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states))
        )
        logits = q @ k.transpose(-1, -2) * attn.scale
        logits[..., 0] *= self.beginning
        for image, length in enumerate(self.lengths):
            logits[image, :, :, length:] = -torch.inf
        return attn.to_out[0]((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))


@torch.no_grad()
@pytest.mark.parametrize(("beginning", "mask_end"), [(1.25, False), (2.0, True), (1.0, False)])
def test_the_prediction_under_the_prompt_is_that_of_the_published_softmax(tiny_pipe, beginning, mask_end):
    guided = GuidedStableDiffusion.from_pipe(tiny_pipe)
    term = AttentionMasking(beginning=beginning, mask_end=mask_end)
    call = {"num_inference_steps": 2, "output_type": "latent", "trace_tensors": True}
    trace = guided(PROMPTS, generator=seeds(1, 2), guidance=[term], **call).trace[:2]
    plain = guided(PROMPTS, generator=seeds(1, 2), **call).trace[:2]
    ends = (tokenize(tiny_pipe, PROMPTS) == tiny_pipe.tokenizer.eos_token_id).int().argmax(1).tolist()
    lengths = [end + 1 - mask_end for end in ends]
    assert [row["attended"] for row in trace] == lengths

    layers = cross_attention_layers(tiny_pipe.unet).values()
    for layer in layers:
        layer.set_processor(Published(beginning, lengths))
    try:
        embeds = StableDiffusionDenoiser(tiny_pipe).encode(PROMPTS).embeds
        x_t = torch.stack([row["x_t"] for row in trace])
        expected = tiny_pipe.unet(x_t, trace[0]["t"], embeds, return_dict=False)[0]
    finally:
        for layer in layers:
            layer.set_processor(AttnProcessor2_0())
    for image, row in enumerate(trace):
        torch.testing.assert_close(row["eps_cond"], expected[image], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(row["eps_uncond"], plain[image]["eps_uncond"], rtol=1e-4, atol=1e-5)
    assert not any(module._forward_hooks for module in tiny_pipe.unet.modules())


def test_words_that_another_term_put_in_are_attended_to(tiny_pipe):
    guided = GuidedStableDiffusion.from_pipe(tiny_pipe)
    terms = [RandomTokens(kind="repeat", number=3), AttentionMasking()]
    first = guided("a", generator=seeds(1), num_inference_steps=1, guidance=terms, output_type="latent").trace[0]
    assert first["attended"] == len(tiny_pipe.tokenizer("a a a a").input_ids) < 16
    with pytest.raises(ValueError, match="let tokens act first"):
        guided("a", num_inference_steps=1, guidance=terms[::-1], output_type="latent")


def test_it_needs_the_prompt_as_text(tiny_pipe):
    guided = GuidedStableDiffusion.from_pipe(tiny_pipe)
    embeds = tiny_pipe.encode_prompt("red apple", torch.device("cpu"), 1, False)[0]
    with pytest.raises(ValueError, match="prompts as text"):
        guided(prompt_embeds=embeds, guidance_scale=1.0, num_inference_steps=1, guidance=[AttentionMasking()])


def text(n: int, tokens: int, **parts: torch.Tensor) -> Conditioning:
    return Conditioning({"embeds": torch.ones(n, tokens, 4), **parts})


def test_a_gain_travels_with_its_text_and_no_other():
    gain, mask = torch.tensor([[2.0, 1.0, 1.0]]), torch.tensor([[True, True, False]])
    edited = text(1, 3, **{GAIN: gain, MASK: mask})
    both = Conditioning.join([text(1, 3), edited])
    assert both.parts[GAIN].tolist() == [[1, 1, 1], [2, 1, 1]]
    assert both.parts[MASK].tolist() == [[True] * 3, [True, True, False]]
    assert edited.padded(5).parts[GAIN].tolist() == [[2, 1, 1, 1, 1]]
    assert text(2, 3).put(torch.tensor([1]), edited).parts[GAIN].tolist() == [[1, 1, 1], [2, 1, 1]]
    assert text(1, 3).beside(edited).parts.keys() == {"embeds"}  # another caption is attended to as it is
    assert edited.same_text(text(1, 3)).tolist() == text(1, 3).same_text(edited).tolist() == [False]
    assert edited.same_text(edited).tolist() == [True]
