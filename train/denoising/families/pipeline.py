"""What the families of diffusers' pipelines share: a network, its schedule, a VAE, text encoders, the stock drawing."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from train.denoising.conditioning import Conditioning
from train.denoising.kinds import ENCODERS
from train.denoising.latents.scaling import to_network, without_overflow
from train.denoising.network import FLOAT16_GAIN, frozen, running_device
from train.denoising.predictions import Prediction
from train.denoising.schedules import NoiseSchedule, schedule_of

if TYPE_CHECKING:
    from PIL.Image import Image


class PipelineDenoiser(torch.nn.Module):
    """A pipeline's network and text encoders as one module, so that both train under one data-parallel wrapper.

    A family derives its denoiser from this: it sets the modules under the names that the pipeline has for them, and
    adds ``network``, ``tokens``, ``encoded``, ``encode``, ``forward`` and ``_stock``.

    Args:
        pipe: its parts are shared.
    """

    def __init__(self, pipe: Any) -> None:
        super().__init__()
        self.pipe = pipe

    network: Any

    @cached_property
    def schedule(self) -> NoiseSchedule:
        """Of the pipeline's scheduler, as it was when first asked for."""
        return self.schedule_on(self.pipe.scheduler)

    def schedule_on(self, scheduler: Any, device: torch.device | str = "cpu") -> NoiseSchedule:
        """The forward process under a scheduler of this family."""
        return schedule_of(scheduler, device)

    @property
    def encoders(self) -> dict[str, Any]:
        """The text encoders by the names that the pipeline has for them, of those that it has."""
        return {name: part for name in ENCODERS if (part := getattr(self, name, None)) is not None}

    @property
    def sequence(self) -> list[tuple[str, int]]:
        """The tokenizers whose tokens make the sequence, one after the other, and how many each has."""
        return [("tokenizer", int(self.pipe.tokenizer.model_max_length))]

    @property
    def multiple(self) -> int:
        """Sides of images are multiples of it, in pixels."""
        return int(self.pipe.vae_scale_factor)

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(c, h, w)`` of the latents that the network takes by default."""
        return latent_shape(self.network)

    @property
    def device(self) -> torch.device:
        """Where the network runs."""
        return running_device(self.network)

    @property
    def dtype(self) -> torch.dtype:
        """Of the network's weights."""
        return self.network.dtype

    @property
    def gain(self) -> float:
        """Factor on what is differentiated, so that float16's gradients do not vanish."""
        return FLOAT16_GAIN if self.dtype == torch.float16 else 1.0

    def framed(self, conditioning: Conditioning, frames: Tensor) -> Conditioning:
        """With what the network is to know of the images that are trained on, ``[n, 6]``: nothing here.

        Args:
            conditioning: of n images, or of one for all.
            frames: original height and width, top and left of the crop, height and width, in pixels.
        """
        return conditioning

    @property
    def frame(self) -> tuple[str, str] | None:
        """Text that is put before and after a prompt, which a language model is asked; None where there is none."""
        return None

    def leave_unused_alone(self) -> None:
        """Freeze weights of the text encoders that no output hangs on: there are none here."""

    def predict(self, x_t: Tensor, t: Any, conditioning: Conditioning) -> Prediction:
        """The output in float32, in every space."""
        return self.schedule.prediction(self(x_t, t, conditioning).float(), x_t.float(), t)

    def guided(self, cond: Prediction, uncond: Prediction, scale: float) -> Prediction:
        """What a trajectory follows: classifier-free guidance."""
        return cond.guided_from(uncond, scale)

    def noise(self, seeds: Sequence[int]) -> Tensor:
        """``x_T`` of seeds, ``[n, c, h, w]``."""
        drawn = torch.stack([initial_noise(self.shape, int(seed)) for seed in seeds])
        return drawn.to(self.device, self.dtype) * self.schedule.init_sigma

    def frozen(self, *, checkpointing: bool = False) -> AbstractContextManager[None]:
        """See :func:`train.denoising.network.frozen`."""
        return frozen(self.network, checkpointing=checkpointing)

    @property
    def side(self) -> int:
        """Of the square that it draws by default, in pixels."""
        return self.shape[1] * int(self.pipe.vae_scale_factor)

    @torch.no_grad()
    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Latents ``[n, c, h, w]`` float32 of ``[n, 3, H, W]`` in [0, 1]: the VAE's posterior means."""
        latents = []
        with without_overflow(self.pipe.vae) as vae:
            for one in pixels.split(1):  # a VAE's activations are large
                one = one.to(running_device(vae), vae.dtype)
                latents.append(to_network(vae.encode(one * 2 - 1).latent_dist.mean.float(), vae))
        return torch.cat(latents)

    @torch.no_grad()
    def draw(self, conditioning: Conditioning, x_T: Tensor, *, steps: int, guidance_scale: float) -> list[Image]:
        """What the stock pipeline draws, by DDIM or Euler's steps, from noise ``x_T [n, c, h, w]`` under a
        conditioning of n images.
        """
        from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

        # A scheduler of its own: drawing moves its state.
        kind: Any = FlowMatchEulerDiscreteScheduler if self.schedule.space == "velocity" else DDIMScheduler
        stock, texts = self._stock(conditioning, kind.from_config(self.pipe.scheduler.config))
        stock.set_progress_bar_config(disable=True)
        return stock(
            **texts,
            latents=x_T.to(self.device, self.dtype),
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
        ).images

    def _stock(self, conditioning: Conditioning, scheduler: Any) -> tuple[Any, dict[str, Tensor]]:
        """The stock pipeline of the same parts, and the conditioning as it takes it."""
        raise NotImplementedError


def latent_shape(network: Any) -> tuple[int, int, int]:
    """``(c, h, w)`` of the latents that a network takes by default."""
    side = network.config.sample_size
    height, width = (side, side) if isinstance(side, int) else side
    return int(network.config.in_channels), int(height), int(width)


def initial_noise(shape: tuple[int, ...], seed: int) -> Tensor:
    """``x_T`` of a seed, float32 on the CPU: one noise on every device and in every dtype."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
