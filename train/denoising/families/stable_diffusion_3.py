"""Stable Diffusion 3 and 3.5 behind the denoiser's protocol: flow matching, two CLIP encoders, and T5 where it is
there.

The transformer is conditioned on one sequence, the CLIP encoders' last hidden states but one side by side (padded to
T5's width) and then T5's (zeros without it), and on both CLIP encoders' pooled outputs (Esser et al., "Scaling
Rectified Flow Transformers for High-Resolution Image Synthesis", ICML 2024, §4).
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from afresh.errors import UserError
from train.denoising.conditioning import GAIN, MASK, Conditioning
from train.denoising.families.pipeline import PipelineDenoiser
from train.denoising.families.stable_diffusion import IDS, tokenize
from train.denoising.network import running_device
from train.denoising.schedules import NoiseSchedule, schedule_of

IDS_2, IDS_3, POOLED = "ids_2", "ids_3", "pooled"
T5_TOKENS = 256
"""Tokens of T5, as the stock pipeline takes them by default; a tokenizer that says so has fewer."""


class StableDiffusion3Denoiser(PipelineDenoiser):
    """A pipeline's transformer and its text encoders as one module.

    Args:
        pipe: any Stable Diffusion 3 pipeline; its parts are shared.
        joint_attention_kwargs: of a call of the pipeline, for the transformer.
        encoding: options of ``pipe.encode_prompt`` in a call; None encodes prompts as the model was trained.
    """

    def __init__(
        self, pipe: Any, *, joint_attention_kwargs: dict[str, Any] | None = None, encoding: dict[str, Any] | None = None
    ) -> None:
        super().__init__(pipe)
        self.text_encoder: Any = pipe.text_encoder
        self.text_encoder_2: Any = pipe.text_encoder_2
        self.text_encoder_3: Any = pipe.text_encoder_3
        self.transformer = pipe.transformer
        self._joint_attention_kwargs, self._encoding = joint_attention_kwargs, encoding

    @property
    def network(self) -> Any:
        """The transformer."""
        return self.transformer

    @property
    def multiple(self) -> int:
        """Sides of images are multiples of a patch's, in pixels."""
        return int(self.pipe.vae_scale_factor) * int(self.transformer.config.patch_size)

    def schedule_on(self, scheduler: Any, device: torch.device | str = "cpu") -> NoiseSchedule:
        """The forward process under a scheduler of this family."""
        return schedule_of(scheduler, device, tokens=(self.shape[1] // self.transformer.config.patch_size) ** 2)

    def leave_unused_alone(self) -> None:
        """T5 is not trained."""
        if self.text_encoder_3 is not None:
            self.text_encoder_3.requires_grad_(False)

    @property
    def t5_tokens(self) -> int:
        """Tokens of T5, or zeros in their place where its encoder is missing."""
        own = getattr(self.pipe.tokenizer_3, "model_max_length", T5_TOKENS)
        return min(T5_TOKENS, int(own))

    @property
    def sequence(self) -> list[tuple[str, int]]:
        """The tokenizers whose tokens make the sequence, one after the other, and how many each has."""
        return [("tokenizer", int(self.pipe.tokenizer.model_max_length)), ("tokenizer_3", self.t5_tokens)]

    # ------------------------------------------------------------------------------------------------- conditioning

    def tokens(self, prompts: Sequence[str]) -> Conditioning:
        """Token ids of all tokenizers that are there, on the CPU."""
        parts = {IDS: tokenize(self.pipe, prompts), IDS_2: tokenize(self.pipe, prompts, "tokenizer_2")}
        if self.text_encoder_3 is not None:
            padding = {"padding": "max_length", "max_length": self.t5_tokens, "truncation": True}
            parts[IDS_3] = self.pipe.tokenizer_3(list(prompts), return_tensors="pt", **padding).input_ids
        return Conditioning(parts)

    def encoded(self, conditioning: Conditioning) -> Conditioning:
        """Embeddings in the place of token ids; with gradients of the encoders that are trained."""
        parts = dict(conditioning.parts)
        if IDS not in parts:
            return conditioning
        clip = [
            self._run(encoder, parts.pop(name), output_hidden_states=True)
            for encoder, name in ((self.text_encoder, IDS), (self.text_encoder_2, IDS_2))
        ]
        embeds, pooled = torch.cat([one.hidden_states[-2] for one in clip], -1), torch.cat([one[0] for one in clip], -1)
        width = self.transformer.config.joint_attention_dim
        t5 = embeds.new_zeros(len(embeds), self.t5_tokens, width)
        if self.text_encoder_3 is not None:
            t5 = self._run(self.text_encoder_3, parts.pop(IDS_3))[0].to(embeds)
        embeds = torch.cat([pad(embeds, (0, width - embeds.shape[-1])), t5], dim=-2)
        return Conditioning({"embeds": embeds, POOLED: pooled, **parts})

    @staticmethod
    def _run(encoder: Any, ids: Tensor, **options: Any) -> Any:
        trained = any(parameter.requires_grad for parameter in encoder.parameters())
        with contextlib.nullcontext() if trained else torch.no_grad():
            return encoder(ids.to(running_device(encoder)), **options)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Joined embeddings ``[n, tokens, width]`` and pooled ones."""
        if self._encoding is None:
            return self.encoded(self.tokens(prompts))
        some = list(prompts)
        device = self.pipe._execution_device
        embeds, _, pooled, _ = self.pipe.encode_prompt(some, some, some, device, 1, False, **self._encoding)
        return Conditioning({"embeds": embeds, POOLED: pooled})

    @torch.no_grad()
    def conditions(
        self, texts: Mapping[str, Any], num_images_per_prompt: int
    ) -> tuple[Conditioning | None, Conditioning]:
        """What a call of the pipeline conditions on, as the stock pipeline has it, bit for bit: the empty (or negative)
        prompt, if there is classifier-free guidance, and the prompt.

        Args:
            texts: arguments of ``encode_prompt``: prompts, negative ones, and the embeddings of both.
            num_images_per_prompt: images of each prompt.
        """
        cfg = self.pipe.do_classifier_free_guidance
        embeds, negative, pooled, negative_pooled = self.pipe.encode_prompt(
            device=self.pipe._execution_device,
            num_images_per_prompt=num_images_per_prompt,
            do_classifier_free_guidance=cfg,
            **texts,
            **(self._encoding or {}),
        )
        cond = Conditioning({"embeds": embeds, POOLED: pooled})
        return (Conditioning({"embeds": negative, POOLED: negative_pooled}) if cfg else None), cond

    # ------------------------------------------------------------------------------------------------- the denoiser

    def forward(self, x_t: Tensor, t: Any, conditioning: Conditioning, **options: Any) -> Tensor:
        """The transformer's velocity, like ``x_t``.

        Args:
            x_t: ``[n, c, h, w]``.
            t: a timestep, or one an image ``[n]``: thousandths of noise.
            conditioning: of n images, or of one for all.
            options: of the transformer: layers to skip.

        Raises:
            UserError: tokens are masked or weighed, which joint attention cannot do.
        """
        parts = self.encoded(conditioning).expand(len(x_t)).parts
        if GAIN in parts or (MASK in parts and not bool(parts[MASK].all())):
            raise UserError(
                "joint attention takes neither masks nor weights of tokens: attention masking and embeddings "
                "of several lengths are for models with cross-attention"
            )
        return self.transformer(
            hidden_states=x_t,
            timestep=torch.as_tensor(t, device=x_t.device).expand(len(x_t)),
            encoder_hidden_states=parts["embeds"],
            pooled_projections=parts[POOLED],
            joint_attention_kwargs=self._joint_attention_kwargs,
            return_dict=False,
            **options,
        )[0]

    def _stock(self, conditioning: Conditioning, scheduler: Any) -> tuple[Any, dict[str, Tensor]]:
        from diffusers import StableDiffusion3Pipeline

        names = [
            name for name in self.pipe.components if name not in ("scheduler", "image_encoder", "feature_extractor")
        ]
        stock = StableDiffusion3Pipeline(**{name: getattr(self.pipe, name) for name in names}, scheduler=scheduler)
        empty = self.encode([""]).to(dtype=self.dtype).expand(len(conditioning)).parts
        own = conditioning.to(self.device, self.dtype).parts
        return stock, {
            "prompt_embeds": own["embeds"],
            "pooled_prompt_embeds": own[POOLED],
            "negative_prompt_embeds": empty["embeds"],
            "negative_pooled_prompt_embeds": empty[POOLED],
        }
