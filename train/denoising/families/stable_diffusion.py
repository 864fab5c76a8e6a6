"""Stable Diffusion 1.x and 2.x behind the denoiser's protocol."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from train.denoising.conditioning import GAIN, MASK, Conditioning
from train.denoising.families.pipeline import PipelineDenoiser
from train.denoising.families.pipeline import initial_noise as initial_noise
from train.denoising.families.pipeline import latent_shape as latent_shape
from train.denoising.network import gained, running_device

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

IDS, TIMESTEP, IMAGE = "ids", "timestep_cond", "image_embeds"
"""Parts of a conditioning beside the prompt's embeddings: token ids that are not encoded yet, the guidance scale of a
distilled model, and image prompts (``image_embeds.00``, …)."""


class StableDiffusionDenoiser(PipelineDenoiser):
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
        super().__init__(pipe)
        # A pipeline that was loaded without its text encoder takes embeddings alone.
        self.text_encoder: Any = getattr(pipe, "text_encoder", None)
        self.unet = pipe.unet
        self._cross_attention_kwargs, self._encoding = cross_attention_kwargs, encoding
        self.chunks = 1
        """Parts of a prompt, each of the tokenizer's length, that are encoded one by one and stand side by side."""

    @property
    def network(self) -> UNet2DConditionModel:
        """The UNet."""
        return self.unet

    # ------------------------------------------------------------------------------------------------- conditioning

    def tokens(self, prompts: Sequence[str]) -> Conditioning:
        """Token ids, which :meth:`forward` encodes: what a text encoder that is trained sees. On the CPU."""
        return Conditioning({IDS: tokenize(self.pipe, prompts, chunks=self.chunks)})

    def encoded(self, conditioning: Conditioning) -> Conditioning:
        """Prompt embeddings in the place of token ids; with gradients where the text encoder is trained."""
        if IDS not in conditioning.parts:
            return conditioning
        trained = any(parameter.requires_grad for parameter in self.text_encoder.parameters())
        with contextlib.nullcontext() if trained else torch.no_grad():
            ids = conditioning.parts[IDS].to(running_device(self.text_encoder))
            embeds = self.text_encoder(ids.unflatten(1, (self.chunks, -1)).flatten(0, 1))[0]
            return Conditioning({"embeds": embeds.unflatten(0, (-1, self.chunks)).flatten(1, 2)})

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


def tokenize(pipe: Any, captions: Sequence[str], part: str = "tokenizer", *, chunks: int = 1) -> Tensor:
    """Token ids padded to the tokenizer's length: ``[n, chunks * tokens]`` int64. Longer captions are cut.

    Args:
        pipe: whose tokenizer it is.
        captions: n texts.
        part: name of the tokenizer.
        chunks: sequences of the tokenizer's length, each with its own beginning and end, that a caption may fill.
    """
    tokenizer = getattr(pipe, part)
    if chunks > 1:
        words = tokenizer(list(captions), add_special_tokens=False, truncation=False).input_ids
        length = tokenizer.model_max_length - 2  # without beginning and end
        pieces = [one[length * i : length * (i + 1)] for one in words for i in range(chunks)]
        whole = [[tokenizer.bos_token_id, *one, tokenizer.eos_token_id] for one in pieces]
        rows = [row + [tokenizer.pad_token_id] * (length + 2 - len(row)) for row in whole]
        return torch.tensor(rows).unflatten(0, (-1, chunks)).flatten(1, 2)
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


def pixel_size(pipe: StableDiffusionPipeline) -> int:
    """Side in pixels of the images that the pipeline draws by default."""
    return int(pipe.unet.config.sample_size) * pipe.vae_scale_factor
