"""Z-Image behind the denoiser's protocol: flow matching in one stream of tokens, a language model for text encoder.

The transformer is given lists, an entry an image: latents of one frame, and as many token states as the caption has. It
counts time from noise to image, ``1 − σ``, and returns ``x_0 − ε``, the velocity with its sign changed. Classifier-free
guidance is the stock pipeline's ``cond + w (cond − uncond)``: its scale ``w`` is one less than the ``s`` of all else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from afresh.errors import UserError
from train.denoising.conditioning import GAIN, MASK, Conditioning
from train.denoising.families.pipeline import PipelineDenoiser
from train.denoising.families.stable_diffusion import IDS
from train.denoising.network import running_device
from train.denoising.schedules import NoiseSchedule, schedule_of

TOKENS = 512
"""Tokens of a caption in its frame, as the stock pipeline takes them by default."""
SIDE = 128
"""Latents along a side that the stock pipeline draws by default; its transformer does not say."""


class ZImageDenoiser(PipelineDenoiser):
    """A pipeline's transformer and its text encoder as one module.

    Args:
        pipe: any Z-Image pipeline; its parts are shared.
        joint_attention_kwargs: of a call of the pipeline, for the transformer.
        length: tokens of a caption.
    """

    def __init__(
        self, pipe: Any, *, joint_attention_kwargs: dict[str, Any] | None = None, length: int = TOKENS
    ) -> None:
        super().__init__(pipe)
        self.text_encoder: Any = pipe.text_encoder
        self.transformer = pipe.transformer
        self._joint_attention_kwargs, self._length = joint_attention_kwargs, length

    @property
    def network(self) -> Any:
        """The transformer."""
        return self.transformer

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(c, h, w)`` of the latents that are drawn by default, of no more patches than have a place."""
        side = min(SIDE, 2 * int(self.transformer.config.axes_lens[1]))
        return int(self.transformer.config.in_channels), side, side

    @property
    def multiple(self) -> int:
        """Sides of images are multiples of a patch of two latents, in pixels."""
        return 2 * int(self.pipe.vae_scale_factor)

    @property
    def sequence(self) -> list[tuple[str, int]]:
        """The tokenizer whose tokens make the sequence."""
        return [("tokenizer", self._length)]

    def schedule_on(self, scheduler: Any, device: torch.device | str = "cpu") -> NoiseSchedule:
        """The forward process under a scheduler of this family."""
        return schedule_of(scheduler, device, tokens=(self.shape[1] // 2) ** 2, evenly=True)

    def leave_unused_alone(self) -> None:
        """The language model is not trained."""
        self.text_encoder.requires_grad_(False)

    # ------------------------------------------------------------------------------------------------- conditioning

    @property
    def frame(self) -> tuple[str, str]:
        """What the tokenizer's chat template puts before and after a prompt."""
        before, _, after = self._asked("\0").partition("\0")
        return before, after

    def _asked(self, prompt: str) -> str:
        """A prompt as the language model is asked it."""
        asked = [{"role": "user", "content": prompt}]
        how = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": True}
        return str(self.pipe.tokenizer.apply_chat_template(asked, **how))

    def tokens(self, prompts: Sequence[str]) -> Conditioning:
        """Token ids, on the CPU, and which of them are the caption's."""
        texts = [self._asked(prompt) for prompt in prompts]
        padding = {"padding": "max_length", "max_length": self._length, "truncation": True}
        found = self.pipe.tokenizer(texts, return_tensors="pt", **padding)
        return Conditioning({IDS: found.input_ids, MASK: found.attention_mask.bool()})

    @torch.no_grad()
    def encoded(self, conditioning: Conditioning) -> Conditioning:
        """The language model's last hidden states but one in the place of token ids; the mask says what counts."""
        parts = dict(conditioning.parts)
        if IDS not in parts:
            return conditioning
        device = running_device(self.text_encoder)
        ids, mask = parts.pop(IDS).to(device), parts[MASK].to(device)
        states = self.text_encoder(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[-2]
        return Conditioning({**parts, "embeds": states, MASK: mask})

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """States ``[n, tokens, width]`` and their mask."""
        return self.encoded(self.tokens(prompts))

    @torch.no_grad()
    def conditions(
        self, texts: Mapping[str, Any], num_images_per_prompt: int
    ) -> tuple[Conditioning | None, Conditioning]:
        """What a call of the pipeline conditions on, as the stock pipeline has it, bit for bit: the empty (or negative)
        prompt, if there is classifier-free guidance, and the prompt.

        Args:
            texts: arguments of ``encode_prompt``: prompts, negative ones, and the embeddings of both.
            num_images_per_prompt: images of each prompt.

        Raises:
            ValueError: as the stock pipeline.
        """
        cfg = self.pipe.do_classifier_free_guidance
        if texts["prompt"] is None and cfg and texts["negative_prompt_embeds"] is None:
            raise ValueError("prompt_embeds without a prompt need negative_prompt_embeds for classifier-free guidance")
        own, negative = texts["prompt_embeds"], texts["negative_prompt_embeds"]
        if own is None or texts["prompt"] is not None:
            # The stock pipeline writes the frame into the list that it is given.
            copied = {name: list(text) if isinstance(text, list) else text for name, text in texts.items()}
            device = self.pipe._execution_device
            own, negative = self.pipe.encode_prompt(
                **copied, device=device, do_classifier_free_guidance=cfg, max_sequence_length=self._length
            )
        halves = [stacked([one for one in some for _ in range(num_images_per_prompt)]) if some else None
                  for some in (negative if cfg else None, own)]  # fmt: skip
        assert halves[1] is not None
        return halves[0], halves[1]

    # ------------------------------------------------------------------------------------------------- the denoiser

    def forward(self, x_t: Tensor, t: Any, conditioning: Conditioning) -> Tensor:
        """The transformer's velocity, like ``x_t``, in float32 as the stock pipeline has it, without masked tokens.

        Args:
            x_t: ``[n, c, h, w]``, sides even.
            t: a timestep, or one an image ``[n]``: thousandths of noise.
            conditioning: of n images, or of one for all.

        Raises:
            UserError: tokens are weighed, which this attention cannot do.
        """
        conditioning = self.encoded(conditioning).expand(len(x_t))
        if GAIN in conditioning.parts:
            raise UserError("joint attention takes no weights of tokens: attention masking is for cross-attention")
        x_t = x_t.to(self.dtype)
        output = self.transformer(
            list(x_t.unsqueeze(2).unbind(0)),
            (1000 - torch.as_tensor(t, device=x_t.device).expand(len(x_t))) / 1000,
            listed(conditioning),
            joint_attention_kwargs=self._joint_attention_kwargs,
            return_dict=False,
        )[0]
        return -torch.stack([one.float() for one in output]).squeeze(2)

    def draw(self, conditioning: Conditioning, x_T: Tensor, *, steps: int, guidance_scale: float) -> list[Any]:
        """What the stock pipeline draws from noise ``x_T [n, c, h, w]`` under a conditioning of n images."""
        scale = max(guidance_scale - 1, 0)
        return super().draw(conditioning, x_T.float(), steps=steps, guidance_scale=scale)

    def _stock(self, conditioning: Conditioning, scheduler: Any) -> tuple[Any, dict[str, Any]]:
        from diffusers import ZImagePipeline

        stock = ZImagePipeline(**{**self.pipe.components, "scheduler": scheduler})
        empty = self.encode([""]).to(dtype=self.dtype).expand(len(conditioning))
        own = conditioning.to(self.device, self.dtype)
        size = {"height": self.side, "width": self.side}
        return stock, {"prompt_embeds": listed(own), "negative_prompt_embeds": listed(empty), **size}


def listed(conditioning: Conditioning) -> list[Tensor]:
    """Embeddings as the transformer takes them: ``[tokens, width]`` of each image, without what is masked."""
    if MASK not in conditioning.parts:
        return list(conditioning.embeds.unbind(0))
    masks = conditioning.parts[MASK].bool()
    return [embeds[mask] for embeds, mask in zip(conditioning.embeds, masks, strict=True)]


def stacked(embeds: Sequence[Tensor]) -> Conditioning:
    """The inverse of :func:`listed`: padded to the longest."""
    return Conditioning.join([Conditioning({"embeds": one[None]}) for one in embeds])
