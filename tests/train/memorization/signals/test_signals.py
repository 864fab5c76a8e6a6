"""Consistency, anisotropy and attention, against values worked out by hand or by the plain formula."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

from afresh.errors import UserError
from tests.train.known_denoisers import KnownDenoiser, with_denoiser
from train.denoising.families.stable_diffusion import encode_captions, initial_noise
from train.memorization import magnitude, score
from train.memorization.cross_attention import attention_probabilities, cross_attention_layers, recorded_attention
from train.memorization.scoring import mean_attention
from train.memorization.signals.agreement import Agreement
from train.memorization.signals.anisotropy import Anisotropy
from train.memorization.signals.attention_entropy import entropy
from train.memorization.signals.consistency import Consistency
from train.memorization.signals.protocol import Seen
from train.memorization.signals.ssim import ms_ssim, rescaled


def test_consistency_of_a_prompt_is_that_of_its_most_similar_pair_of_seeds():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(4, 1, 4, 16, 16, generator=generator)
    x[2] = (x[0] + 0.05 * torch.rand(1, 4, 16, 16, generator=generator)).clamp(0, 1)
    signal = Consistency()
    values = signal.combine(x)
    pairs = {(i, j): ms_ssim(x[i], x[j]).item() for i in range(4) for j in range(i)}
    assert values[0].item() == values[2].item() == pytest.approx(pairs[2, 0])
    assert values[1].item() == pytest.approx(max(value for pair, value in pairs.items() if 1 in pair))
    assert signal.of_prompt(values).item() == pytest.approx(max(pairs.values()))


def test_a_prompt_whose_data_is_one_image_is_consistent_and_one_with_wide_data_is_not(tiny_pipe):
    generator = torch.Generator().manual_seed(1)
    # Smooth, as images are, and large enough to be seen in δ = −√(1−ᾱ_T) … at the first step.
    smooth = torch.nn.functional.interpolate(torch.randn(1, 4, 4, 4, generator=generator), size=16, mode="bilinear")[0]
    known = {"flag": 4 * smooth, "wide": torch.zeros(4, 16, 16)}
    unet = KnownDenoiser(tiny_pipe, known, s=0.0)
    unet.known[-1] = (unet.known[-1][0], unet.known[-1][1], 1.5)
    scores = score(with_denoiser(tiny_pipe, unet), list(known), seeds=4, signals=["consistency"])
    memorized, wide = scores.per_prompt("consistency")
    assert memorized > 0.8 > 0.4 > wide


def seen_at(eps_cond: torch.Tensor, eps_uncond: torch.Tensor, on_noise: bool) -> Seen:
    return Seen(torch.zeros_like(eps_cond), 41, 0.9, eps_cond, eps_uncond, {}, on_noise)


def test_anisotropy_adds_the_magnitude_at_high_noise_and_the_angle_at_low_noise():
    uncond = torch.zeros(1, 2, 2, 2)
    uncond[0, 0] = 2.0
    guidance = torch.zeros(1, 2, 2, 2)
    guidance[0, :, 0] = 1.0  # 45° from uncond in the first row of latents,
    guidance[0, 0, 1] = -3.0  # opposite in the second
    for signal, cosine in (
        (Anisotropy(), (2 * math.cos(math.pi / 4) - 2) / 4),
        (Anisotropy(per_latent=False), (2 * 2 - 2 * 2 * 3) / (4 * math.sqrt(2 * 2 + 2 * 9))),
    ):
        high = signal.observe(seen_at(uncond + guidance, uncond, False))
        low = signal.observe(seen_at(uncond + guidance, uncond, True))
        # L2 is √22 on 8 elements; latents of 64 × 64 × 4 have 2,048 times as many.
        assert high.item() == pytest.approx(math.sqrt(22 * 2048))
        assert low.item() == pytest.approx(cosine)
        value = signal.combine(torch.stack([high, low], dim=1))
        assert value.item() == pytest.approx(2 * cosine + math.sqrt(22 * 2048))


@pytest.mark.parametrize("scale", [1.0, -1.0], ids=["towards", "against"])
def test_anisotropy_of_a_gaussian_has_the_sign_of_its_width_against_the_empty_prompts(tiny_pipe, scale):
    # ε(x) is c·x with c falling in the width; the empty prompt's is 1. So guidance is a multiple of ε(x, e_∅).
    unet = KnownDenoiser(tiny_pipe, {"flag": torch.zeros(4, 16, 16)}, s=0.5 if scale > 0 else 2.0)
    scores = score(with_denoiser(tiny_pipe, unet), ["flag"], seeds=2, signals=["anisotropy"])
    assert scores.observed["anisotropy"][0, :, 1] == pytest.approx(scale, abs=1e-4)


def test_entropy_is_that_of_known_distributions():
    shares = torch.tensor([[1.0, 0, 0, 0], [0.25] * 4, [0.5, 0.5, 0, 0]])
    assert entropy(shares).tolist() == pytest.approx([0, math.log(4), math.log(2)])


@pytest.mark.parametrize("processor", [AttnProcessor, AttnProcessor2_0])
def test_attention_is_recorded_beside_the_layers_own_processor_and_changes_nothing(tiny_pipe, processor):
    unet = copy.deepcopy(tiny_pipe.unet)
    unet.set_attn_processor(processor())
    generator = torch.Generator().manual_seed(0)
    x, text = torch.randn(4, 4, 16, 16, generator=generator), torch.randn(4, 16, 32, generator=generator)
    with torch.no_grad():
        before = unet(x, 500, text).sample
        with recorded_attention(unet, 2, lambda maps: maps) as recorded:
            during = unet(x, 500, text).sample
        layers, recorded.layers = recorded.layers, {}
        after = unet(x, 500, text).sample
    assert torch.equal(before, during) and torch.equal(before, after)
    assert recorded.layers == {}  # nothing is left on the layers
    assert {type(one) for one in unet.attn_processors.values()} == {processor}
    assert set(layers) == set(cross_attention_layers(unet)) and len(layers) > 2
    for name, maps in layers.items():
        assert name.endswith("attn2")
        assert maps.shape[::3] == (2, 16)  # the last two rows of the batch, all tokens
        assert torch.allclose(maps.sum(-1), torch.ones(()), atol=1e-5)


def test_attention_probabilities_are_those_that_the_layer_uses(tiny_pipe):
    layer = next(iter(cross_attention_layers(tiny_pipe.unet).values()))
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 64, layer.to_q.in_features, generator=generator)
    text = torch.randn(2, 16, layer.to_k.in_features, generator=generator)
    with torch.no_grad():
        maps = attention_probabilities(layer, hidden, text)
        values = layer.to_v(text).unflatten(-1, (layer.heads, -1)).transpose(1, 2)
        mixed = layer.to_out[0]((maps @ values).transpose(1, 2).flatten(2))
        assert torch.allclose(mixed, AttnProcessor()(layer, hidden, text), atol=1e-5)


def test_layers_get_free_of_the_recorder_when_a_forward_pass_fails(tiny_pipe):
    unet = copy.deepcopy(tiny_pipe.unet)
    with pytest.raises(RuntimeError), recorded_attention(unet, 1, mean_attention):
        unet(torch.zeros(1, 4, 16, 16), 0, torch.zeros(1, 16, 7))
    assert not any(layer._forward_pre_hooks for layer in cross_attention_layers(unet).values())


def test_a_denoiser_without_cross_attention_is_refused_by_name(tiny_pipe):
    pipe = with_denoiser(tiny_pipe, KnownDenoiser(tiny_pipe, {"flag": torch.zeros(4, 16, 16)}, 1.0))
    with pytest.raises(UserError, match="KnownDenoiser has no cross-attention layer"):
        score(pipe, ["flag"], signals=["attention_entropy"])


def test_joint_is_magnitude_times_agreement(tiny_pipe):
    names = ["joint", "agreement", "magnitude"]
    scores = score(tiny_pipe, ["flag", "horse"], steps=3, seeds=3, signals=names)
    joint, agreement, m = (scores.per_prompt(name) for name in names)
    assert joint == pytest.approx(agreement * m, rel=1e-5)
    assert score(tiny_pipe, ["flag"], seeds=3, signals=["joint"], form="rms").per_prompt("joint")[0] < joint[0] / 10


def test_joint_on_noise_takes_no_step(tiny_pipe):
    scores = score(tiny_pipe, ["flag", "horse"], steps=3, seeds=[4, 9], signals=["joint_on_noise"])
    assert (scores.evaluations, scores.timesteps.tolist()) == (2 + 4, [])  # without a prompt, and with each
    noise = torch.stack([initial_noise((4, 16, 16), seed) for seed in (4, 9)])

    def eps(caption: str) -> torch.Tensor:
        embeds = encode_captions(tiny_pipe, [caption]).expand(2, -1, -1)
        with torch.no_grad():
            return tiny_pipe.unet(noise, 800, encoder_hidden_states=embeds, return_dict=False)[0]

    for caption, found in zip(["flag", "horse"], scores.per_prompt("joint_on_noise"), strict=True):
        one, other = rescaled(noise - (1 - tiny_pipe.scheduler.alphas_cumprod[800]) ** 0.5 * eps(caption)).split(1)
        m = magnitude(eps(caption), eps("")).mean()
        assert found == pytest.approx((m * ms_ssim(one, other)).item(), rel=1e-4)


def test_agreement_on_noise_is_whole_where_one_image_is_known_and_low_where_any_may_come(tiny_pipe):
    known = {"flag": torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(3)), "any": torch.zeros(4, 16, 16)}
    unet = KnownDenoiser(tiny_pipe, known, s=0.0)
    unet.known[-1] = (unet.known[-1][0], unet.known[-1][1], 1.5)

    class OnNoise(Agreement):
        name, looks_at, noise_level = "on_noise", "no step", 0.8

    scores = score(with_denoiser(tiny_pipe, unet), list(known), seeds=4, signals=[OnNoise()])
    memorized, free = scores.per_prompt("on_noise")
    assert memorized == pytest.approx(1, abs=1e-5)
    assert free < 0.5


def test_agreement_is_the_similarity_of_the_predicted_images_at_the_last_step(tiny_pipe):
    class Images(Agreement):
        name = "images"

        def __init__(self):
            self.found = []

        def observe(self, seen):
            self.found.append((seen.x_t - (1 - seen.alpha_bar) ** 0.5 * seen.eps_cond) / seen.alpha_bar**0.5)
            return super().observe(seen)

    images = Images()
    scores = score(
        tiny_pipe, ["flag"], steps=3, num_inference_steps=10, seeds=3, signals=[images, "agreement", "consistency"]
    )
    x_0 = rescaled(images.found[-1])
    expected = max(ms_ssim(x_0[i : i + 1], x_0[j : j + 1]).item() for i in range(3) for j in range(i))
    assert scores.per_prompt("agreement").item() == pytest.approx(expected, rel=1e-4)
    assert scores.per_prompt("agreement") == scores.per_prompt("images") == scores.signal("agreement").max()
    assert scores.per_prompt("agreement") != scores.per_prompt("consistency")
