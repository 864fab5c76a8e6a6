"""Stable Diffusion 1.x and 2.x behind the denoiser's protocol."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from train.denoising.conditioning import GAIN, MASK, Conditioning
from train.denoising.latents.scaling import to_network, without_overflow
from train.denoising.network import FLOAT16_GAIN, frozen, gained, running_device
from train.denoising.predictions import Prediction
from train.denoising.schedules import NoiseSchedule

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    from PIL.Image import Image

IDS, TIMESTEP, IMAGE = "ids", "timestep_cond", "image_embeds"
"""Parts of a conditioning beside the prompt's embeddings: token ids that are not encoded yet, the guidance scale of a
distilled model, and image prompts (``image_embeds.00``, …)."""


class StableDiffusionDenoiser(torch.nn.Module):
    """A pipeline's UNet and text encoder as one module, so that both train under one data-parallel wrapper.

    Args:
        pipe: any Stable Diffusion pipeline; its parts are shared.
        cross_attention_kwargs: of a call of the pipeline, for the UNet.
        encoding: options of ``pipe.encode_prompt`` in a call of the pipeline (``clip_skip``, ``lora_scale``); None
            encodes prompts as the model was trained.
    """

    def __init__(
        self,
        pipe: StableDiffusionPipeline,
        *,
        cross_attention_kwargs: dict[str, Any] | None = None,
        encoding: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        # A pipeline that was loaded without its text encoder takes embeddings alone.
        self.text_encoder: Any = getattr(pipe, "text_encoder", None)
        self.unet = pipe.unet
        self.pipe = pipe
        self._cross_attention_kwargs, self._encoding = cross_attention_kwargs, encoding

    @cached_property
    def schedule(self) -> NoiseSchedule:
        """Of the pipeline's scheduler, as it was when first asked for."""
        return NoiseSchedule(self.pipe.scheduler)

    @property
    def network(self) -> UNet2DConditionModel:
        """The UNet."""
        return self.unet

    @property
    def encoders(self) -> dict[str, Any]:
        """The text encoders by the names that the pipeline has for them, each trained along if asked for."""
        names = ("text_encoder", "text_encoder_2")
        return {name: part for name in names if (part := getattr(self, name, None)) is not None}

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(c, h, w)`` of the latents that the UNet takes by default."""
        return latent_shape(self.unet)

    @property
    def device(self) -> torch.device:
        """Where the UNet runs."""
        return running_device(self.unet)

    @property
    def dtype(self) -> torch.dtype:
        """Of the UNet's weights."""
        return self.unet.dtype

    @property
    def gain(self) -> float:
        """Factor on what is differentiated, so that float16's gradients do not vanish."""
        return FLOAT16_GAIN if self.dtype == torch.float16 else 1.0

    # ------------------------------------------------------------------------------------------------- conditioning

    def tokens(self, prompts: Sequence[str]) -> Conditioning:
        """Token ids, which :meth:`forward` encodes: what a text encoder that is trained sees. On the CPU."""
        return Conditioning({IDS: tokenize(self.pipe, prompts)})

    def encoded(self, conditioning: Conditioning) -> Conditioning:
        """Prompt embeddings in the place of token ids; with gradients where the text encoder is trained."""
        if IDS not in conditioning.parts:
            return conditioning
        trained = any(parameter.requires_grad for parameter in self.text_encoder.parameters())
        with contextlib.nullcontext() if trained else torch.no_grad():
            ids = conditioning.parts[IDS].to(running_device(self.text_encoder))
            return Conditioning({"embeds": self.text_encoder(ids)[0]})

    def framed(self, conditioning: Conditioning, frames: Tensor) -> Conditioning:
        """With what the network is to know of the images that are trained on, ``[n, 6]``: nothing here.

        Args:
            conditioning: of n images, or of one for all.
            frames: original height and width, top and left of the crop, height and width, in pixels.
        """
        return conditioning

    def leave_unused_alone(self) -> None:
        """Freeze weights of the text encoders that no output hangs on: there are none here."""

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """The text encoder's output ``[n, tokens, width]`` for prompts."""
        if self._encoding is None:
            return self.encoded(self.tokens(prompts))
        embeds = self.pipe.encode_prompt(list(prompts), self.pipe._execution_device, 1, False, **self._encoding)[0]
        return Conditioning({"embeds": embeds})

    @torch.no_grad()
    def conditions(
        self,
        texts: tuple[Any, Any, Tensor | None, Tensor | None],
        pictures: tuple[Any, Any],
        num_images_per_prompt: int,
    ) -> tuple[Conditioning | None, Conditioning]:
        """What a call of the pipeline conditions on, as the stock pipeline has it, bit for bit: the empty (or negative)
        prompt, if there is classifier-free guidance, and the prompt.

        Args:
            texts: prompt, negative prompt, and the embeddings of both.
            pictures: image prompts, and their embeddings.
            num_images_per_prompt: images of each prompt.
        """
        pipe: Any = self.pipe
        prompt, negative_prompt, prompt_embeds, negative_prompt_embeds = texts
        device, cfg = pipe._execution_device, pipe.do_classifier_free_guidance
        embeds, negative = pipe.encode_prompt(
            prompt,
            device,
            num_images_per_prompt,
            cfg,
            negative_prompt,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            **(self._encoding or {}),
        )
        parts: dict[str, Tensor] = {}  # both halves' where there are two
        if any(picture is not None for picture in pictures):
            images = pipe.prepare_ip_adapter_image_embeds(*pictures, device, len(embeds), cfg)
            parts = {f"{IMAGE}.{number:02d}": image for number, image in enumerate(images)}
        if (width := self.unet.config.time_cond_proj_dim) is not None:  # guidance-distilled models
            scales = torch.tensor(pipe.guidance_scale - 1).repeat(len(embeds))
            scales = pipe.get_guidance_scale_embedding(scales, embedding_dim=width)
            parts[TIMESTEP] = scales.to(device=device, dtype=embeds.dtype)
        if not cfg:
            return None, Conditioning({"embeds": embeds, **parts})
        both = {name: part.chunk(2) for name, part in parts.items()}
        halves = [{name: half[i] for name, half in both.items()} for i in range(2)]
        return Conditioning({"embeds": negative, **halves[0]}), Conditioning({"embeds": embeds, **halves[1]})

    # ------------------------------------------------------------------------------------------------- the denoiser

    def forward(self, x_t: Tensor, t: Any, conditioning: Conditioning) -> Tensor:
        """The UNet's output, like ``x_t``.

        Args:
            x_t: ``[n, c, h, w]``.
            t: a timestep, or one an image ``[n]``.
            conditioning: of n images, or of one for all.
        """
        parts = self.encoded(conditioning).expand(len(x_t)).parts
        options: dict[str, Any] = {}
        if MASK in parts:
            options["encoder_attention_mask"] = parts[MASK]
        if TIMESTEP in parts:
            options["timestep_cond"] = parts[TIMESTEP]
        if added := self._added(parts, x_t):
            options["added_cond_kwargs"] = added
        if self._cross_attention_kwargs is not None:
            options["cross_attention_kwargs"] = self._cross_attention_kwargs
        with gained(self.unet, parts[GAIN]) if GAIN in parts else contextlib.nullcontext():
            return self.unet(x_t, t, encoder_hidden_states=parts["embeds"], return_dict=False, **options)[0]

    def _added(self, parts: Mapping[str, Tensor], x_t: Tensor) -> dict[str, Any]:
        """What the UNet is conditioned on beside the sequence: image prompts."""
        images = [parts[name] for name in sorted(parts) if name.startswith(f"{IMAGE}.")]
        return {IMAGE: images} if images else {}

    def predict(self, x_t: Tensor, t: Any, conditioning: Conditioning) -> Prediction:
        """The output in float32, in every space."""
        return self.schedule.prediction(self(x_t, t, conditioning).float(), x_t.float(), t)

    def noise(self, seeds: Sequence[int]) -> Tensor:
        """``x_T`` of seeds, ``[n, c, h, w]``."""
        drawn = torch.stack([initial_noise(self.shape, int(seed)) for seed in seeds])
        return drawn.to(self.device, self.dtype) * self.schedule.init_sigma

    def frozen(self, *, checkpointing: bool = False) -> AbstractContextManager[None]:
        """See :func:`train.denoising.network.frozen`."""
        return frozen(self.unet, checkpointing=checkpointing)

    # ------------------------------------------------------------------------------------------------------- images

    @property
    def side(self) -> int:
        """Of the square that it draws by default, in pixels."""
        return pixel_size(self.pipe)

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
    def draw(
        self, conditioning: Conditioning, x_T: Tensor, *, steps: int, guidance_scale: float
    ) -> list[Image]:
        """What the stock pipeline draws by DDIM from noise ``x_T [n, c, h, w]`` under a conditioning of n images."""
        from diffusers import DDIMScheduler

        # A scheduler of its own: drawing moves its state.
        stock, texts = self._stock(conditioning, DDIMScheduler.from_config(self.pipe.scheduler.config))
        stock.set_progress_bar_config(disable=True)
        return stock(
            **texts,
            latents=x_T.to(self.device, self.dtype),
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
        ).images

    def _stock(self, conditioning: Conditioning, scheduler: Any) -> tuple[Any, dict[str, Tensor]]:
        """The stock pipeline of the same parts, and the conditioning as it takes it."""
        from diffusers import StableDiffusionPipeline

        stock = StableDiffusionPipeline(
            **{name: getattr(self.pipe, name) for name in ("vae", "text_encoder", "tokenizer", "unet")},
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        embeds = conditioning.embeds.to(self.device, self.dtype)
        negative = self.encode([""]).embeds.to(self.dtype).expand_as(embeds)
        return stock, {"prompt_embeds": embeds, "negative_prompt_embeds": negative}


def tokenize(pipe: Any, captions: Sequence[str], part: str = "tokenizer") -> Tensor:
    """Token ids padded to the tokenizer's length: ``[n, tokens]`` int64. Longer captions are cut."""
    tokenizer = getattr(pipe, part)
    return tokenizer(
        list(captions),
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids


def encode_captions(pipe: StableDiffusionPipeline, captions: Sequence[str]) -> Tensor:
    """The text encoder's output ``[n, tokens, width]`` for captions, where the pipeline runs."""
    return StableDiffusionDenoiser(pipe).encode(captions).embeds


def end_positions(pipe: StableDiffusionPipeline, prompts: Sequence[str]) -> Tensor:
    """``[n]`` int64: where the first end-of-text token of each prompt stands."""
    return (tokenize(pipe, prompts) == pipe.tokenizer.eos_token_id).int().argmax(dim=1)


def latent_shape(unet: UNet2DConditionModel) -> tuple[int, int, int]:
    """``(c, h, w)`` of the latents that the UNet takes by default."""
    side = unet.config.sample_size
    height, width = (side, side) if isinstance(side, int) else side
    return int(unet.config.in_channels), int(height), int(width)


def initial_noise(shape: tuple[int, ...], seed: int) -> Tensor:
    """``x_T`` of a seed, float32 on the CPU: one noise on every device and in every dtype."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pixel_size(pipe: StableDiffusionPipeline) -> int:
    """Side in pixels of the images that the pipeline draws by default."""
    return int(pipe.unet.config.sample_size) * pipe.vae_scale_factor
