"""Stable Diffusion 1.x and 2.x behind the denoiser's protocol."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel


FLOAT16_GAIN = 1024.0
"""Factor on what is differentiated through a float16 model, whose gradients would vanish among its small numbers."""


def tokenize(pipe: StableDiffusionPipeline, captions: Sequence[str]) -> torch.Tensor:
    """Token ids padded to the tokenizer's length: ``[n, tokens]`` int64. Longer captions are cut."""
    return pipe.tokenizer(
        list(captions),
        padding="max_length",
        max_length=pipe.tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids


@torch.no_grad()
def encode_captions(pipe: StableDiffusionPipeline, captions: Sequence[str]) -> torch.Tensor:
    """The text encoder's output ``[n, tokens, width]`` for captions, on the pipeline's device."""
    return pipe.text_encoder(tokenize(pipe, captions).to(pipe.text_encoder.device))[0]


def latent_shape(unet: UNet2DConditionModel) -> tuple[int, int, int]:
    """``(c, h, w)`` of the latents that the UNet takes by default."""
    side = unet.config.sample_size
    height, width = (side, side) if isinstance(side, int) else side
    return int(unet.config.in_channels), int(height), int(width)


def initial_noise(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """``x_T`` of a seed, float32 on the CPU: one noise on every device and in every dtype."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@contextlib.contextmanager
def frozen(unet: UNet2DConditionModel, *, checkpointing: bool = False) -> Iterator[None]:
    """The UNet without gradients of its weights while the block runs, so that those of its inputs cost less memory.

    Args:
        unet: left as it was when the block ends.
        checkpointing: compute activations again in the backward pass instead of keeping them: about a third more time
            for a fraction of the memory.
    """
    parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    switch = checkpointing and not unet.is_gradient_checkpointing
    for parameter in parameters:
        parameter.requires_grad_(False)
    if switch:
        unet.enable_gradient_checkpointing()
    try:
        yield
    finally:
        if switch:
            unet.disable_gradient_checkpointing()
        for parameter in parameters:
            parameter.requires_grad_(True)


def pixel_size(pipe: StableDiffusionPipeline) -> int:
    """Side in pixels of the images that the pipeline draws by default."""
    return int(pipe.unet.config.sample_size) * pipe.vae_scale_factor

