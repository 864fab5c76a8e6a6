"""Stable Diffusion XL behind the denoiser's protocol: two text encoders, a pooled embedding, sizes and crops.

Its UNet is conditioned on the encoders' last hidden states but one, side by side, on the second one's pooled output,
and on six numbers: the image's size before it was brought to its own, where it was cropped, and its size (Podell et
al., "SDXL: Improving Latent Diffusion Models for High-Resolution Image Synthesis", ICLR 2024, §2.2), heights first.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from train.denoising.conditioning import Conditioning
from train.denoising.families.stable_diffusion import IDS, IMAGE, TIMESTEP, StableDiffusionDenoiser, tokenize
from train.denoising.network import running_device

IDS_2, POOLED, SIZES = "ids_2", "pooled", "time_ids"
"""Parts of a conditioning: the second tokenizer's ids, the pooled embedding ``[n, width]``, and ``[n, 6]`` original
height and width, top and left of the crop, height and width. Without these an image counts as uncropped, of the size
that is drawn."""


class StableDiffusionXLDenoiser(StableDiffusionDenoiser):
    """A pipeline's UNet and its two text encoders as one module; see :class:`StableDiffusionDenoiser`.

    Where the model says ``force_zeros_for_empty_prompt`` the empty prompt is encoded as zeros, as the stock pipeline
    has it where no negative prompt is given: in training, in what is detected and in what is drawn.
    """

    def __init__(self, pipe: Any, **options: Any) -> None:
        super().__init__(pipe, **options)
        self.text_encoder_2: Any = getattr(pipe, "text_encoder_2", None)

    def leave_unused_alone(self) -> None:
        """Freeze what no output hangs on: the first encoder's last layer, of which the one before is taken."""
        inner = getattr(self.text_encoder, "text_model", self.text_encoder)
        for module in (inner.encoder.layers[-1], inner.final_layer_norm):
            module.requires_grad_(False)

    def tokens(self, prompts: Sequence[str]) -> Conditioning:
        """Token ids of both tokenizers, on the CPU; see :meth:`StableDiffusionDenoiser.tokens`."""
        pairs = ((IDS, "tokenizer"), (IDS_2, "tokenizer_2"))
        return Conditioning({name: tokenize(self.pipe, prompts, part) for name, part in pairs})

    def encoded(self, conditioning: Conditioning) -> Conditioning:
        """Embeddings in the place of token ids; with gradients of the encoders that are trained."""
        parts = dict(conditioning.parts)
        if IDS not in parts:
            return conditioning
        found = []
        ids = parts.pop(IDS), parts.pop(IDS_2)
        for encoder, own in zip((self.text_encoder, self.text_encoder_2), ids, strict=True):
            trained = any(parameter.requires_grad for parameter in encoder.parameters())
            with contextlib.nullcontext() if trained else torch.no_grad():
                found.append(encoder(own.to(running_device(encoder)), output_hidden_states=True))
        embeds = torch.cat([one.hidden_states[-2] for one in found], dim=-1)
        pooled = found[1][0]
        if self.pipe.config.force_zeros_for_empty_prompt:
            empty = (ids[0] == tokenize(self.pipe, [""]).to(ids[0].device)).all(1).to(embeds.device)
            embeds = torch.where(empty[:, None, None], 0.0, embeds)
            pooled = torch.where(empty[:, None], 0.0, pooled)
        return Conditioning({"embeds": embeds, POOLED: pooled, **parts})

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Joined embeddings ``[n, tokens, width]`` and pooled ones, without sizes."""
        if self._encoding is None:
            return self.encoded(self.tokens(prompts))
        embeds, _, pooled, _ = self.pipe.encode_prompt(
            list(prompts), None, self.pipe._execution_device, 1, False, **self._encoding
        )
        if self.pipe.config.force_zeros_for_empty_prompt:
            empty = torch.tensor([not prompt for prompt in prompts], device=embeds.device)
            embeds, pooled = torch.where(empty[:, None, None], 0.0, embeds), torch.where(empty[:, None], 0.0, pooled)
        return Conditioning({"embeds": embeds, POOLED: pooled})

    def framed(self, conditioning: Conditioning, frames: Tensor) -> Conditioning:
        """With the sizes and crops of the images that are trained on, ``[n, 6]``."""
        sizes = frames.to(self.device, torch.float32)
        return Conditioning({**conditioning.expand(len(frames)).parts, SIZES: sizes})

    def conditions(  # type: ignore[override]  # a prompt here is more than there
        self,
        texts: Mapping[str, Any],
        pictures: tuple[Any, Any],
        num_images_per_prompt: int,
        sizes: tuple[Sequence[tuple[int, int]], Sequence[tuple[int, int]] | None],
    ) -> tuple[Conditioning | None, Conditioning]:
        """What a call of the pipeline conditions on, as the stock pipeline has it, bit for bit; see
        :meth:`StableDiffusionDenoiser.conditions`.

        Args:
            texts: arguments of ``encode_prompt``: prompts, negative ones, and the embeddings of both.
            pictures: image prompts, and their embeddings.
            num_images_per_prompt: images of each prompt.
            sizes: original size, crop and size; and the negative ones, None for the same.
        """
        pipe: Any = self.pipe
        device, cfg = pipe._execution_device, pipe.do_classifier_free_guidance
        embeds, negative, pooled, negative_pooled = pipe.encode_prompt(
            device=device,
            num_images_per_prompt=num_images_per_prompt,
            do_classifier_free_guidance=cfg,
            **texts,
            **(self._encoding or {}),
        )
        width = pooled.shape[-1] if pipe.text_encoder_2 is None else pipe.text_encoder_2.config.projection_dim

        def frame(one: Sequence[tuple[int, int]]) -> Tensor:
            return pipe._get_add_time_ids(*one, dtype=embeds.dtype, text_encoder_projection_dim=int(width))

        # Of several images with negative sizes the stock pipeline gives each half both in turn; so does this.
        both = torch.cat([frame(sizes[1] or sizes[0]), frame(sizes[0])] if cfg else [frame(sizes[0])] * 2)
        frames = both.to(device).repeat(len(embeds), 1).chunk(2)
        cond = {"embeds": embeds, POOLED: pooled.to(device), SIZES: frames[1]}
        uncond = {"embeds": negative, POOLED: negative_pooled, SIZES: frames[0]}
        if any(picture is not None for picture in pictures):
            images = pipe.prepare_ip_adapter_image_embeds(*pictures, device, len(embeds), cfg)
            for number, image in enumerate(images):
                halves = image.chunk(2) if cfg else (image, image)
                uncond[f"{IMAGE}.{number:02d}"], cond[f"{IMAGE}.{number:02d}"] = halves
        if (channels := self.unet.config.time_cond_proj_dim) is not None:  # guidance-distilled models
            scales = torch.tensor(pipe.guidance_scale - 1).repeat(len(embeds))
            scales = pipe.get_guidance_scale_embedding(scales, embedding_dim=channels)
            cond[TIMESTEP] = uncond[TIMESTEP] = scales.to(device=device, dtype=embeds.dtype)
        if not cfg:
            return None, Conditioning(cond)
        uncond[POOLED] = negative_pooled.to(device)
        return Conditioning(uncond), Conditioning(cond)

    def _added(self, parts: Mapping[str, Tensor], x_t: Tensor) -> dict[str, Any]:
        sizes = parts.get(SIZES)
        if sizes is None:
            height, width = (side * self.pipe.vae_scale_factor for side in x_t.shape[-2:])
            sizes = torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32, device=x_t.device)
            sizes = sizes.expand(len(x_t), -1)
        return {**super()._added(parts, x_t), "text_embeds": parts[POOLED], "time_ids": sizes}

    def _stock(self, conditioning: Conditioning, scheduler: Any) -> tuple[Any, dict[str, Tensor]]:
        from diffusers import StableDiffusionXLPipeline

        names = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet")
        stock = StableDiffusionXLPipeline(
            **{name: getattr(self.pipe, name) for name in names},
            scheduler=scheduler,
            force_zeros_for_empty_prompt=self.pipe.config.force_zeros_for_empty_prompt,
            add_watermarker=False,
        )
        empty = self.encode([""]).to(dtype=self.dtype).expand(len(conditioning)).parts
        own = conditioning.to(self.device, self.dtype).parts
        return stock, {
            "prompt_embeds": own["embeds"],
            "pooled_prompt_embeds": own[POOLED],
            "negative_prompt_embeds": empty["embeds"],
            "negative_pooled_prompt_embeds": empty[POOLED],
        }
