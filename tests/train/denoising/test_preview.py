"""The linear preview of a VAE's decoder."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from curate.embed.registry import load_embedder
from train.denoising.latents.decoder import Decoder
from train.denoising.latents.preview import LinearDecoder, dead_leaves, preview_of
from train.denoising.opening.loading import load_pipeline, sample_model_dir
from train.sampling import GuidedStableDiffusion

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pipe() -> GuidedStableDiffusion:
    return GuidedStableDiffusion.from_pipe(load_pipeline(str(sample_model_dir())))


def test_it_finds_a_linear_decoder_exactly():
    truth = LinearDecoder(0.01 * torch.randn(48, 4, 3, 3), 0.5 + 0.01 * torch.randn(48), 4)
    latents = torch.randn(3, 4, 8, 8)
    found = LinearDecoder.fit(latents, truth(latents))
    assert found.factor == 4
    other = torch.randn(2, 4, 5, 7)
    torch.testing.assert_close(found(other), truth(other), rtol=0, atol=1e-2)


def test_dead_leaves_are_the_same_each_time_and_of_many_sizes():
    images = dead_leaves(2, 32)
    assert images.shape == (2, 3, 32, 32) and torch.equal(images, dead_leaves(2, 32))
    assert images.min() >= 0 and images.max() <= 1
    assert len(images[0].flatten(1).unique(dim=1).T) > 20  # colours, each a disc of its own


def test_an_embedder_sees_nearly_the_same_in_the_preview_as_in_the_image(pipe):
    prompts = ["grinning face", "red heart", "flag: Japan", "clock face"]
    generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
    latents = pipe(prompts, num_inference_steps=4, generator=generators, output_type="latent").images
    decode = Decoder(pipe.vae, CPU)
    preview, full = preview_of(pipe.vae, decode, CPU)(latents), decode(latents)
    assert preview.shape == full.shape
    embedder = load_embedder("copy-detector")
    with torch.no_grad():
        cosine = (embedder.features(preview) @ embedder.features(full).T).numpy()
    assert cosine.diagonal().min() > 0.9
    assert (cosine.argmax(1) == np.arange(4)).all()


def test_a_vae_is_previewed_by_one_fit_whatever_its_dtype():
    config = {"block_out_channels": (8, 16), "norm_num_groups": 4, "latent_channels": 4}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = AutoencoderKL(**config, **blocks).to(torch.bfloat16).eval()
    preview = preview_of(vae, Decoder(vae, CPU), CPU)
    assert preview is preview_of(vae, Decoder(vae, CPU), CPU)
    pixels = preview(torch.randn(1, 4, 6, 6, dtype=torch.bfloat16))
    assert pixels.shape == (1, 3, 12, 12) and pixels.dtype == torch.float32 and preview.factor == 2
