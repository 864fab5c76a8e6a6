"""Pipelines in the states that users have them in: offloaded, compiled, with other decoders, adapters, long prompts."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny

from curate.embed import load_embedder
from curate.index import TrainingIndex
from train.denoising.conditioning import Conditioning
from train.denoising.families.registry import denoiser_of
from train.denoising.latents.decoder import Decoder
from train.denoising.latents.preview import preview_of
from train.memorization import score
from train.sample_model.small import tiny_pipeline
from train.sampling import AMG, GuidedStableDiffusion
from train.sampling.guidance import Run, State, StepFunction

CPU = torch.device("cpu")
PROMPTS = ["grinning face, face smiling", "red apple, food fruit"]


@pytest.fixture
def pipe():
    """One of its own, for tests that change it."""
    return tiny_pipeline()


@pytest.fixture(scope="module")
def index(emoji) -> TrainingIndex:
    images, captions = zip(*emoji[:12], strict=True)
    n, embeddings = len(images), load_embedder("layout").embed(list(images))
    names = [str(i) for i in range(n)]
    # Not calibrated: most cosines of unrelated images lie above 0, so that every part of AMG acts.
    return TrainingIndex(embeddings.astype(np.float16), list(captions), ["s"] * n, names, np.ones(n, bool),
                         np.arange(n), "layout")  # fmt: skip


def always(index: TrainingIndex, **options) -> AMG:
    """AMG that guides every image at every step."""
    constants = {"schedule": "constant", "lambda_b": -1.0, "min_count": 10**6, **options}
    return AMG(index, load_embedder("layout"), **constants)


class Looking:
    """A term that changes nothing and looks."""

    name = "looking"

    def __init__(self, look) -> None:
        self.look = look

    def start(self, run: Run) -> StepFunction:
        return lambda state: self.look(state)


def drawn(pipe, guidance, **options):
    seeds = [torch.Generator().manual_seed(n) for n in range(2)]
    options = {"num_inference_steps": 3, "output_type": "np", "generator": seeds, "guidance": guidance, **options}
    return GuidedStableDiffusion.from_pipe(pipe)(**options)


# -------------------------------------------------------------------------------------------------- long prompts


@pytest.mark.parametrize("through_unet", [False, True])
def test_prompt_embeddings_longer_than_the_tokenizers_limit_are_guided(pipe, index, through_unet):
    limit = pipe.tokenizer.model_max_length
    embeds = torch.randn(2, 2 * limit, 32, generator=torch.Generator().manual_seed(0))
    seen = []

    def look(state: State) -> None:
        rows = torch.tensor([0])
        near = state.encode_prompts(["red apple"])
        assert near.tokens == limit and state.cond.tokens == 2 * limit
        own = pipe.unet(state.x_t[rows], state.t, near.embeds).sample
        torch.testing.assert_close(state.denoise(state.x_t[rows], near, rows), own, atol=1e-5, rtol=1e-4)
        seen.append(state.step)

    negative = torch.zeros_like(embeds)
    guidance = [always(index, through_unet=through_unet, despecification=False), Looking(look)]
    output = drawn(pipe, guidance, prompt_embeds=embeds, negative_prompt_embeds=negative)
    assert seen == [0, 1, 2]
    alike = [row for row in output.trace if row["step"] and row["similarity"] > 0]  # its strength goes with it
    assert len(alike) > 2 and all("deduplication" in row["fired"] for row in alike)
    assert np.isfinite(output.images).all()


# -------------------------------------------------------------------------------------------------------- offload


def offloaded(pipe):
    """Sequential offload as on a GPU: weights are kept elsewhere, each layer's come when it runs."""
    from accelerate import cpu_offload

    for part in (pipe.unet, pipe.text_encoder, pipe.vae):
        cpu_offload(part, CPU, offload_buffers=True)
    assert next(pipe.unet.parameters()).is_meta
    return pipe


def test_an_offloaded_model_is_scored_as_any_other(pipe):
    options = {"steps": 2, "seeds": 2, "signals": ["magnitude", "agreement"]}
    expected = score(pipe, PROMPTS, **options)
    found = score(offloaded(pipe), PROMPTS, **options)
    np.testing.assert_allclose(found.magnitudes, expected.magnitudes, rtol=1e-5)


def test_an_offloaded_model_is_guided_as_any_other(pipe, index):
    expected = drawn(copy.deepcopy(pipe), [always(index)], prompt=PROMPTS)
    found = drawn(offloaded(pipe), [always(index)], prompt=PROMPTS)
    assert all("dissimilarity" in row["fired"] for row in found.trace)
    np.testing.assert_allclose(found.images, expected.images, atol=1e-4)


# ------------------------------------------------------------------------------------------------------- decoders


@pytest.mark.parametrize("compiled", ["whole", "decoder"])
def test_a_compiled_half_precision_vae_is_watched_with_its_own_weights(pipe, compiled):
    vae = pipe.vae.half()
    plain = copy.deepcopy(vae).float()
    if compiled == "whole":
        vae = torch.compile(vae)
    else:
        vae.decoder = torch.compile(vae.decoder)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(Decoder(vae, CPU)(latents), Decoder(plain, CPU)(latents), atol=1e-5, rtol=1e-4)


def test_weights_that_are_not_there_are_an_error_and_not_noise(pipe):
    vae = pipe.vae.half()
    del vae.decoder.conv_out.bias
    with pytest.raises(RuntimeError, match="conv_out.bias"):
        Decoder(vae, CPU)(torch.zeros(1, 4, 8, 8))


def test_a_tiny_decoder_is_previewed_and_guided(pipe, index):
    torch.manual_seed(0)
    widths = {"encoder_block_out_channels": (8,) * 3, "decoder_block_out_channels": (8,) * 3}
    layers = {"num_encoder_blocks": (1,) * 3, "num_decoder_blocks": (1,) * 3}
    pipe.vae = AutoencoderTiny(**widths, **layers)
    assert pipe.vae_scale_factor == 4
    decode = Decoder(pipe.vae, CPU)
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    assert decode(latents).shape == preview_of(pipe.vae, decode, CPU)(latents).shape == (1, 3, 64, 64)
    amg = AMG(index, load_embedder("layout"), "early", lambda_a=-1.0, lambda_b=-1.0)
    output = drawn(pipe, [amg], prompt=PROMPTS)
    assert any(row["fired"] for row in output.trace) and np.isfinite(output.images).all()


# ------------------------------------------------------------------------------------------------------- adapters


def test_captions_to_steer_from_are_encoded_at_the_adapters_scale(pipe):
    peft = pytest.importorskip("peft")
    pipe.text_encoder.add_adapter(peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    encoded = {}

    def look(state: State) -> None:
        for row, prompt in enumerate(PROMPTS):  # what the call itself encoded
            torch.testing.assert_close(state.encode_prompts([prompt]).embeds, state.cond[[row]].embeds)
        encoded[scale] = state.cond.embeds

    for scale in (0.0, 1.0):
        drawn(pipe, [Looking(look)], prompt=PROMPTS, cross_attention_kwargs={"scale": scale}, num_inference_steps=1)
    assert not torch.allclose(encoded[0.0], encoded[1.0], atol=1e-3)


# ------------------------------------------------------------------------------------------------------- families


def test_any_of_the_pipelines_shares_its_parts_with_its_denoiser(pipe):
    guided = GuidedStableDiffusion.from_pipe(pipe)
    for one in (pipe, guided):
        denoiser = denoiser_of(one)
        assert denoiser.network is pipe.unet and denoiser_of(denoiser) is denoiser
        assert denoiser.shape == (4, 16, 16) and denoiser.noise([3, 4]).shape == (2, 4, 16, 16)
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    from afresh.errors import UserError

    unet = UNet2DModel(8, block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))
    with pytest.raises(UserError, match="DDPMPipeline is of no family"):
        denoiser_of(DDPMPipeline(unet, DDPMScheduler()))


def test_a_pipeline_without_its_text_encoder_takes_embeddings(pipe):
    embeds = denoiser_of(pipe).encode(PROMPTS)
    pipe.text_encoder = None
    denoiser = denoiser_of(pipe)
    output = denoiser.predict(denoiser.noise([0, 1]), 500, Conditioning({"embeds": embeds.embeds}))
    assert output.eps.shape == (2, 4, 16, 16)
