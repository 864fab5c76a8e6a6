"""``GuidedZImage``: Z-Image's denoising loop with guidance terms and a trace."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers import ZImagePipeline
from diffusers.pipelines.z_image.pipeline_z_image import get_default_z_image_sigmas, retrieve_timesteps
from torch import Tensor

from train.denoising.conditioning import Conditioning
from train.denoising.families.z_image import ZImageDenoiser, listed, stacked
from train.denoising.latents.scaling import to_vae
from train.sampling.guidance import Guidance
from train.sampling.pipelines.guided import Callback, GuidedOutput, GuidedPipeline, asked_for, repeated, shift_by_size


class GuidedZImage(GuidedPipeline, ZImagePipeline):
    """``ZImagePipeline`` whose velocity guidance terms may correct at each step.

    Without terms it draws the stock pipeline's images bit for bit. Its ``guidance_scale`` is the stock pipeline's ``w``
    of ``cond + w (cond − uncond)``; the trace's and the terms' is ``1 + w``.
    """

    STOCK = ZImagePipeline
    CALLED: ClassVar = {"prompt_embeds": "embeds"}

    @classmethod
    def _switches(cls, pipeline: Any) -> dict[str, Any]:
        return {}

    @staticmethod
    def asked(scale: float, negative: list[str] | None) -> dict[str, Any]:
        """The stock pipeline's scale of a classifier-free guidance scale, which is one more."""
        return {"guidance_scale": max(scale - 1, 0.0), "negative_prompt": negative}

    @property
    def cfg_scale(self) -> float:
        """``s`` of ``uncond + s (cond − uncond)``."""
        return 1 + float(self.guidance_scale)

    def _guided(self, uncond: Tensor, cond: Tensor) -> Tensor:
        """As the stock pipeline computes it, perhaps no longer than the prompt's own prediction allows."""
        guided = cond + self.guidance_scale * (cond - uncond)
        if self._cfg_normalization and float(self._cfg_normalization) > 0.0:
            for own, new in zip(cond, guided, strict=True):
                most, norm = (
                    torch.linalg.vector_norm(own) * float(self._cfg_normalization),
                    torch.linalg.vector_norm(new),
                )
                if norm > most:
                    new *= most / norm
        return guided

    def _both(self, loop: Any, x_t: Tensor, t: Any, uncond: Conditioning | None, cond: Conditioning) -> Tensor:
        """In one pass, the prompt's half first, as the stock pipeline; late in time perhaps the prompt's alone."""
        if uncond is None:
            return loop.denoiser(x_t, t, cond)
        if self._cfg_truncation is not None and float((1000 - t) / 1000) > float(self._cfg_truncation):
            return torch.cat([loop.denoiser(x_t[len(cond) :], t, cond)] * 2)  # what differs not is not guided
        first, second = loop.denoiser(x_t, t, Conditioning.join([cond, uncond])).chunk(2)
        return torch.cat([second, first])

    def _called_back(
        self, callback: Any, names: Sequence[str], step: int, t: Any, latents: Tensor, uncond: Any, cond: Any
    ) -> tuple[Tensor, Any, Any]:
        """As the stock pipeline calls it: embeddings are lists."""
        halves = {"prompt_embeds": cond, "negative_prompt_embeds": uncond}
        offered = {"latents": latents, **{name: listed(half) if half else [] for name, half in halves.items()}}
        changed = callback(self, step, t, {name: offered[name] for name in names})
        for name in halves:
            if changed.get(name, offered[name]) is not offered[name]:
                halves[name] = stacked(changed[name])
        return changed.get("latents", latents), halves["negative_prompt_embeds"], halves["prompt_embeds"]

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        sigmas: list[float] | None = None,
        guidance_scale: float = 5.0,
        cfg_normalization: bool = False,
        cfg_truncation: float = 1.0,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: list[Tensor] | None = None,
        negative_prompt_embeds: list[Tensor] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        joint_attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int = 512,
        *,
        guidance: Sequence[Guidance] = (),
        trace_tensors: bool = False,
    ) -> GuidedOutput | tuple[Any]:
        """Draw images. All arguments but the last two are those of ``ZImagePipeline``; for these two see
        :class:`~train.sampling.pipelines.stable_diffusion.GuidedStableDiffusion`.

        Returns:
            :class:`GuidedOutput`, or the stock pipeline's ``(images,)`` with ``return_dict=False``.

        Raises:
            ValueError: as the stock pipeline.
        """
        self._guidance_scale, self._joint_attention_kwargs, self._interrupt = (
            guidance_scale,
            joint_attention_kwargs,
            False,
        )
        self._cfg_normalization, self._cfg_truncation = cfg_normalization, cfg_truncation
        watch = callback_on_step_end, asked_for(callback_on_step_end, callback_on_step_end_tensor_inputs)
        denoiser = ZImageDenoiser(self, joint_attention_kwargs=joint_attention_kwargs, length=max_sequence_length)
        size = height or denoiser.side, width or denoiser.side
        if any(side % denoiser.multiple for side in size):
            raise ValueError(
                f"Height and width must be divisible by {denoiser.multiple} (got {size[0]} and {size[1]})."
            )
        texts = {
            "prompt": prompt,
            "negative_prompt": negative_prompt,
            "prompt_embeds": prompt_embeds,
            "negative_prompt_embeds": negative_prompt_embeds,
        }
        halves = denoiser.conditions(texts, num_images_per_prompt)
        device, channels = self._execution_device, self.transformer.in_channels
        x_T = self.prepare_latents(len(halves[1]), channels, *size, torch.float32, device, generator, latents)
        mu = shift_by_size(self.scheduler.config, (x_T.shape[2] // 2) * (x_T.shape[3] // 2), 1.15)
        levels = get_default_z_image_sigmas(num_inference_steps) if sigmas is None else sigmas
        steps = retrieve_timesteps(self.scheduler, num_inference_steps, device, sigmas=levels, mu=mu)
        self.scheduler.set_begin_index(0)
        prompts = repeated(prompt, num_images_per_prompt)
        images, trace = self._drawn(denoiser, x_T, halves, prompts, steps, (guidance, trace_tensors), watch)
        if output_type != "latent":
            images = self.vae.decode(to_vae(images.to(self.vae.dtype), self.vae), return_dict=False)[0]
            images = self.image_processor.postprocess(images, output_type=output_type)
        self.maybe_free_model_hooks()
        return GuidedOutput(images, None, trace) if return_dict else (images,)
