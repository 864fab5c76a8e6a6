"""Where an image is copied: the attention to the end token at the last step (Bright Ending).

Source: Chen et al., "Exploring Local Memorization in Diffusion Models via Bright Ending Attention" (ICLR 2025): at the
last step of a trajectory, where an image is copied from the training set its latents attend to the end token, and
elsewhere they do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from train.denoising.families.registry import denoiser_of
from train.denoising.families.stable_diffusion import end_positions
from train.memorization.cross_attention import as_map, end_share, finest_down_layers, recorded_attention

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline
    from PIL.Image import Image


@dataclass(frozen=True)
class BrightEnding:
    """Images and where they attend to the end token."""

    images: list[Image]
    masks: NDArray[np.float32]
    """``[n, h, w]`` in [0, 1]: the share of attention that the end token has at each latent of the finest layers."""


def bright_ending(
    pipe: StableDiffusionPipeline,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int],
    num_inference_steps: int = 50,
    guidance_scale: float = 7.5,
) -> BrightEnding:
    """Draw one image a prompt, and record the attention to the end token at the last step.

    The map is the mean over heads, and over the cross-attention layers of the down blocks at the finest resolution that
    has any (in Stable Diffusion 1.x two layers of 64 × 64, as in the paper). The end token is the first end-of-text
    token after the caption: the one whose embedding stands for the whole of it.

    Args:
        pipe: any Stable Diffusion pipeline, with its own scheduler; only the scheduler's state is changed, as by any
            call.
        prompts: n captions, drawn in one batch.
        seeds: n, of the initial noises; the same as in :func:`train.memorization.scoring`.
        num_inference_steps: steps of the trajectory.
        guidance_scale: classifier-free guidance scale.

    Raises:
        ValueError: not as many seeds as prompts.
        UserError: the UNet has no cross-attention in its down blocks.
    """
    if len(prompts) != len(seeds):
        raise ValueError(f"{len(prompts)} prompts and {len(seeds)} seeds: give one seed a prompt")
    denoiser = denoiser_of(pipe)
    noise, shape = denoiser.noise(seeds), denoiser.shape

    alone = num_inference_steps == 1
    end = end_positions(pipe, prompts)
    with recorded_attention(denoiser.network, len(prompts), end_share(end), on=alone) as recorded:

        def at_last(pipe: Any, step: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            recorded.on = step + 2 >= num_inference_steps
            return {}

        output = pipe(
            list(prompts),
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            latents=noise,
            callback_on_step_end=at_last,
        )
    masks = as_map(finest_down_layers(recorded.layers), shape[1:])
    return BrightEnding(output.images, masks.float().cpu().numpy())


def draw_mask(image: Image, mask: NDArray[np.float32], *, brightest: float | None = None) -> Image:
    """The mask laid over the image in a warm colour, as strong as the attention.

    Args:
        image: any size; drawn on as RGB.
        mask: ``[h, w]`` ≥ 0, stretched over the image smoothly.
        brightest: value that is drawn strongest; None takes the mask's own highest. Give one value to compare images.

    Returns:
        A new image of the same size.
    """
    from PIL import Image as Pillow

    highest = float(mask.max()) if brightest is None else brightest
    alpha = np.clip(mask / max(highest, 1e-12), 0, 1)
    heat = Pillow.fromarray((alpha * 200).astype(np.uint8)).resize(image.size, Pillow.Resampling.BICUBIC)
    colour = Pillow.new("RGB", image.size, (255, 96, 0))
    return Pillow.composite(colour, image.convert("RGB"), heat)

