"""FLUX.1 behind the denoiser's protocol: flow matching, packed latents, and a guidance scale that is an input.

Black Forest Labs' transformer is conditioned on T5's sequence and CLIP's pooled output. *dev* is distilled from guided
predictions and takes their scale as an input: it has no branch without a prompt that was trained as one. What stands
for it is the model under the empty prompt at the same scale, so that the magnitude is that of ``û(e_p, g) − û(e_∅,
g)``, and its trajectory is that of the prompt alone. *schnell* takes no scale and can be detected, not guided.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from afresh.errors import UserError
from train.denoising.conditioning import GAIN, MASK, Conditioning
from train.denoising.families.pipeline import PipelineDenoiser
from train.denoising.families.stable_diffusion import IDS, tokenize
from train.denoising.network import running_device
from train.denoising.predictions import Prediction
from train.denoising.schedules import NoiseSchedule, schedule_of

IDS_2, POOLED = "ids_2", "pooled"
T5_TOKENS = 512
"""Tokens of T5, as the stock pipeline takes them by default."""
SIDE = 128
"""Latents along a side that the stock pipeline draws by default; its transformer does not say."""
GUIDANCE = 3.5
"""The guidance scale of detection and training, which is the stock pipeline's and the training script's default."""


class FluxDenoiser(PipelineDenoiser):
    """A pipeline's transformer and its text encoders as one module. Latents are ``[n, c, h, w]``; packed inside alone.

    Args:
        pipe: any FLUX.1 pipeline; its parts are shared.
        guidance: the scale that the transformer is told, where it is to be told one.
        joint_attention_kwargs: of a call of the pipeline, for the transformer.
        encoding: options of ``pipe.encode_prompt`` in a call; None encodes prompts as the model was trained.
    """

    def __init__(
        self,
        pipe: Any,
        *,
        guidance: float = GUIDANCE,
        joint_attention_kwargs: dict[str, Any] | None = None,
        encoding: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(pipe)
        self.text_encoder: Any = pipe.text_encoder
        self.text_encoder_2: Any = pipe.text_encoder_2
        self.transformer = pipe.transformer
        self.guidance, self._joint_attention_kwargs, self._encoding = guidance, joint_attention_kwargs, encoding

    @property
    def network(self) -> Any:
        """The transformer."""
        return self.transformer

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(c, h, w)`` of the latents that are drawn by default."""
        side = min(SIDE, int(self.pipe.default_sample_size))
        return int(self.transformer.config.in_channels) // 4, side, side

    @property
    def multiple(self) -> int:
        """Sides of images are multiples of a patch of two latents, in pixels."""
        return 2 * int(self.pipe.vae_scale_factor)

    @property
    def sequence(self) -> list[tuple[str, int]]:
        """The tokenizer whose tokens make the sequence: T5's."""
        return [("tokenizer_2", T5_TOKENS)]

    def schedule_on(self, scheduler: Any, device: torch.device | str = "cpu") -> NoiseSchedule:
        """The forward process under a scheduler of this family."""
        return schedule_of(scheduler, device, tokens=(self.shape[1] // 2) ** 2, evenly=True)

    def guided(self, cond: Prediction, uncond: Prediction, scale: float) -> Prediction:
        """The prompt's own prediction: the guidance is in it."""
        return cond

    def leave_unused_alone(self) -> None:
        """T5 is not trained."""
        self.text_encoder_2.requires_grad_(False)

    # ------------------------------------------------------------------------------------------------- conditioning

    def tokens(self, prompts: Sequence[str]) -> Conditioning:
        """Token ids of both tokenizers, on the CPU."""
        padding = {"padding": "max_length", "max_length": T5_TOKENS, "truncation": True}
        t5 = self.pipe.tokenizer_2(list(prompts), return_tensors="pt", **padding).input_ids
        return Conditioning({IDS: tokenize(self.pipe, prompts), IDS_2: t5})

    def encoded(self, conditioning: Conditioning) -> Conditioning:
        """Embeddings in the place of token ids; with gradients where CLIP is trained."""
        parts = dict(conditioning.parts)
        if IDS not in parts:
            return conditioning
        clip = self.text_encoder
        trained = any(parameter.requires_grad for parameter in clip.parameters())
        with contextlib.nullcontext() if trained else torch.no_grad():
            pooled = clip(parts.pop(IDS).to(running_device(clip))).pooler_output
        with torch.no_grad():
            embeds = self.text_encoder_2(parts.pop(IDS_2).to(running_device(self.text_encoder_2)))[0]
        return Conditioning({"embeds": embeds, POOLED: pooled, **parts})

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """T5's embeddings ``[n, tokens, width]`` and CLIP's pooled ones."""
        if self._encoding is None:
            return self.encoded(self.tokens(prompts))
        return self.conditions({"prompt": list(prompts)}, 1)

    @torch.no_grad()
    def conditions(self, texts: Mapping[str, Any], num_images_per_prompt: int) -> Conditioning:
        """What a call of the pipeline conditions one half on, as the stock pipeline has it, bit for bit.

        Args:
            texts: arguments of ``encode_prompt``: prompts, or their embeddings.
            num_images_per_prompt: images of each prompt.
        """
        embeds, pooled, _ = self.pipe.encode_prompt(
            device=self.pipe._execution_device,
            num_images_per_prompt=num_images_per_prompt,
            **texts,
            **(self._encoding or {}),
        )
        return Conditioning({"embeds": embeds, POOLED: pooled})

    # ------------------------------------------------------------------------------------------------- the denoiser

    def forward(self, x_t: Tensor, t: Any, conditioning: Conditioning) -> Tensor:
        """The transformer's velocity, like ``x_t``.

        Args:
            x_t: ``[n, c, h, w]``, sides even.
            t: a timestep, or one an image ``[n]``: thousandths of noise.
            conditioning: of n images, or of one for all.

        Raises:
            UserError: tokens are masked or weighed, which joint attention cannot do.
        """
        parts = self.encoded(conditioning).expand(len(x_t)).parts
        if GAIN in parts or (MASK in parts and not bool(parts[MASK].all())):
            raise UserError(
                "joint attention takes neither masks nor weights of tokens: attention masking and embeddings of "
                "several lengths are for models with cross-attention"
            )
        n, channels, height, width = x_t.shape
        embeds = parts["embeds"]
        place: dict[str, Any] = {"device": x_t.device, "dtype": embeds.dtype}
        guidance = None
        if self.transformer.config.guidance_embeds:
            guidance = torch.full([1], self.guidance, device=x_t.device, dtype=torch.float32).expand(n)
        output = self.transformer(
            hidden_states=self.pipe._pack_latents(x_t, n, channels, height, width),
            timestep=torch.as_tensor(t, device=x_t.device).expand(n).to(x_t.dtype) / 1000,
            guidance=guidance,
            pooled_projections=parts[POOLED],
            encoder_hidden_states=embeds,
            txt_ids=torch.zeros(embeds.shape[1], 3, **place),
            img_ids=self.pipe._prepare_latent_image_ids(n, height // 2, width // 2, **place),
            joint_attention_kwargs=self._joint_attention_kwargs or {},
            return_dict=False,
        )[0]
        factor = int(self.pipe.vae_scale_factor)
        return self.pipe._unpack_latents(output, height * factor, width * factor, factor)

    def draw(self, conditioning: Conditioning, x_T: Tensor, *, steps: int, guidance_scale: float) -> list[Any]:
        """What the stock pipeline draws from noise ``x_T [n, c, h, w]`` under a conditioning of n images, at the
        guidance scale of detection.
        """
        from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

        names = [
            name for name in self.pipe.components if name not in ("scheduler", "image_encoder", "feature_extractor")
        ]
        kind: Any = FlowMatchEulerDiscreteScheduler
        parts = {name: getattr(self.pipe, name) for name in names}
        stock: Any = FluxPipeline(**parts, scheduler=kind.from_config(self.pipe.scheduler.config))
        stock.set_progress_bar_config(disable=True)
        own = conditioning.to(self.device, self.dtype).parts
        n, channels, height, width = x_T.shape
        return stock(
            prompt_embeds=own["embeds"],
            pooled_prompt_embeds=own[POOLED],
            latents=stock._pack_latents(x_T.to(self.device, self.dtype), n, channels, height, width),
            height=height * stock.vae_scale_factor,
            width=width * stock.vae_scale_factor,
            num_inference_steps=steps,
            guidance_scale=self.guidance,
        ).images
