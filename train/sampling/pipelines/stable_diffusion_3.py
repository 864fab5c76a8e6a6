"""``GuidedStableDiffusion3``: Stable Diffusion 3's denoising loop with guidance terms and a trace."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import retrieve_timesteps
from torch import Tensor

from train.denoising.families.stable_diffusion_3 import POOLED, StableDiffusion3Denoiser
from train.denoising.latents.scaling import to_vae
from train.sampling.guidance import Guidance
from train.sampling.pipelines.guided import Callback, GuidedOutput, GuidedPipeline, asked_for, repeated, shift_by_size


class GuidedStableDiffusion3(GuidedPipeline, StableDiffusion3Pipeline):
    """``StableDiffusion3Pipeline`` whose velocity guidance terms may correct at each step.

    Takes any Stable Diffusion 3 or 3.5 and its flow-matching schedulers. Without terms it draws the stock pipeline's
    images bit for bit; with terms, so does every image of the batch that no term acts on.
    """

    STOCK = StableDiffusion3Pipeline
    CALLED: ClassVar = {"prompt_embeds": "embeds", "pooled_prompt_embeds": POOLED}

    @classmethod
    def _switches(cls, pipeline: Any) -> dict[str, Any]:
        return {}

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        prompt_2: str | list[str] | None = None,
        prompt_3: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 28,
        sigmas: list[float] | None = None,
        guidance_scale: float = 7.0,
        negative_prompt: str | list[str] | None = None,
        negative_prompt_2: str | list[str] | None = None,
        negative_prompt_3: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        joint_attention_kwargs: dict[str, Any] | None = None,
        clip_skip: int | None = None,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int | None = None,
        skip_guidance_layers: list[int] | None = None,
        skip_layer_guidance_scale: float = 2.8,
        skip_layer_guidance_stop: float = 0.2,
        skip_layer_guidance_start: float = 0.01,
        mu: float | None = None,
        *,
        guidance: Sequence[Guidance] = (),
        trace_tensors: bool = False,
    ) -> GuidedOutput | tuple[Any]:
        """Draw images. All arguments but the last two are those of ``StableDiffusion3Pipeline`` (image prompts are left
        out); for these two see :class:`~train.sampling.pipelines.stable_diffusion.GuidedStableDiffusion`.

        Returns:
            :class:`GuidedOutput`, or the stock pipeline's ``(images,)`` with ``return_dict=False``.

        Raises:
            ValueError: as the stock pipeline.
        """
        self._guidance_scale, self._clip_skip, self._interrupt = guidance_scale, clip_skip, False
        self._joint_attention_kwargs = joint_attention_kwargs
        self._skip_layer_guidance_scale = skip_layer_guidance_scale
        watch = callback_on_step_end, asked_for(callback_on_step_end, callback_on_step_end_tensor_inputs)
        side = self.default_sample_size * self.vae_scale_factor
        height, width = height or side, width or side
        texts = {
            "prompt": prompt,
            "prompt_2": prompt_2,
            "prompt_3": prompt_3,
            "negative_prompt": negative_prompt,
            "negative_prompt_2": negative_prompt_2,
            "negative_prompt_3": negative_prompt_3,
            "prompt_embeds": prompt_embeds,
            "negative_prompt_embeds": negative_prompt_embeds,
            "pooled_prompt_embeds": pooled_prompt_embeds,
            "negative_pooled_prompt_embeds": negative_pooled_prompt_embeds,
        }
        how = {"max_sequence_length": max_sequence_length or StableDiffusion3Denoiser(self).t5_tokens}
        self.check_inputs(height=height, width=width, callback_on_step_end_tensor_inputs=watch[1], **how, **texts)
        denoiser = self._denoiser(how)
        halves = denoiser.conditions(texts, num_images_per_prompt)
        latents = self._noise(denoiser, halves[1], (height, width), generator, latents)
        device, prompts = self._execution_device, repeated(prompt, num_images_per_prompt)
        shift = self._shift(latents, mu)
        steps = retrieve_timesteps(self.scheduler, num_inference_steps, device, sigmas=sigmas, **shift)
        start, stop = (steps[1] * share for share in (skip_layer_guidance_start, skip_layer_guidance_stop))
        self._skipped = skip_guidance_layers, start, stop
        terms = guidance, trace_tensors
        latents, trace = self._drawn(denoiser, latents, halves, prompts, steps, terms, watch)
        images = self._finished(latents, output_type)
        return GuidedOutput(images, None, trace) if return_dict else (images,)

    def _denoiser(self, how: dict[str, Any]) -> StableDiffusion3Denoiser:
        """The model under the options of the call, which say with ``how`` the way prompts are encoded."""
        options = self.joint_attention_kwargs
        encoding = {"lora_scale": (options or {}).get("scale"), "clip_skip": self.clip_skip, **how}
        return StableDiffusion3Denoiser(self, joint_attention_kwargs=options, encoding=encoding)

    def _finished(self, latents: Tensor, output_type: str) -> Any:
        """Images in the form that was asked for."""
        images = latents
        if output_type != "latent":
            images = self.vae.decode(to_vae(latents, self.vae), return_dict=False)[0]
            images = self.image_processor.postprocess(images, output_type=output_type)
        self.maybe_free_model_hooks()
        return images

    def _shift(self, latents: Tensor, mu: float | None) -> dict[str, float]:
        """The shift of the noise levels by resolution, where the scheduler has one."""
        config, patch = self.scheduler.config, self.transformer.config.patch_size
        if mu is None and config.get("use_dynamic_shifting", None):
            tokens = (latents.shape[2] // patch) * (latents.shape[3] // patch)
            mu = shift_by_size(config, tokens, 1.16)
        return {} if mu is None else {"mu": mu}

    def _beside(
        self, loop: Any, i: int, t: Any, latents: Tensor, output: Tensor, output_cond: Tensor, cond: Any
    ) -> Tensor:
        """Guidance away from what the model says without some of its layers."""
        layers, start, stop = self._skipped
        if layers is None or not start < i < stop:
            return output
        without = loop.denoiser(latents, t, cond, skip_layers=layers)
        return output + (output_cond - without) * self._skip_layer_guidance_scale
