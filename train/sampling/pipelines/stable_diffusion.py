"""``GuidedStableDiffusion``: Stable Diffusion's denoising loop with guidance terms and a trace.

pipe = GuidedStableDiffusion.from_pipe(stable_diffusion_pipeline)
output = pipe(prompts, guidance=[AMG(index, embedder)])
output.images, output.trace
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import retrieve_timesteps
from torch import Tensor

from train.denoising.families.stable_diffusion import StableDiffusionDenoiser
from train.sampling.guidance import Guidance
from train.sampling.pipelines.guided import Callback, GuidedOutput, GuidedPipeline, asked_for, repeated

__all__ = ["GuidedOutput", "GuidedStableDiffusion"]


class GuidedStableDiffusion(GuidedPipeline, StableDiffusionPipeline):
    """``StableDiffusionPipeline`` whose ``ε̂`` guidance terms may correct at each step.

    Takes any Stable Diffusion 1.x or 2.x pipeline and any of its schedulers. Without terms it draws the stock
    pipeline's images bit for bit; with terms, so does every image of the batch that no term acts on.
    """

    STOCK = StableDiffusionPipeline

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        guidance_scale: float = 7.5,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        ip_adapter_image: Any = None,
        ip_adapter_image_embeds: list[Tensor] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        guidance_rescale: float = 0.0,
        clip_skip: int | None = None,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        *,
        guidance: Sequence[Guidance] = (),
        trace_tensors: bool = False,
    ) -> GuidedOutput | tuple[Any, Any]:
        """Draw images. All arguments but the last two are those of ``StableDiffusionPipeline``.

        Args:
            guidance: terms that correct ``ε̂``, in this order; before ``guidance_rescale``, which then sees the result.
            trace_tensors: also keep ``x_t``, ``eps_uncond``, ``eps_cond``, ``eps_hat`` and each part's ``delta.<part>``
                in the trace (float32, on the CPU), from which every ``ε̂`` can be recomputed.

        Returns:
            :class:`GuidedOutput`, or the stock pipeline's ``(images, nsfw)`` with ``return_dict=False``.

        Raises:
            ValueError: as the stock pipeline; or guidance was asked of a model or scheduler that has no ``ε``.
        """
        self._guidance_scale, self._guidance_rescale, self._clip_skip = guidance_scale, guidance_rescale, clip_skip
        self._cross_attention_kwargs, self._interrupt = cross_attention_kwargs, False
        watch = callback_on_step_end, asked_for(callback_on_step_end, callback_on_step_end_tensor_inputs)
        height, width = self._size(height, width)
        texts, images = (prompt, negative_prompt, prompt_embeds, negative_prompt_embeds), ip_adapter_image
        self.check_inputs(prompt, height, width, None, *texts[1:], images, ip_adapter_image_embeds, watch[1])
        denoiser = StableDiffusionDenoiser(
            self,
            cross_attention_kwargs=cross_attention_kwargs,
            encoding={"lora_scale": (cross_attention_kwargs or {}).get("scale"), "clip_skip": clip_skip},
        )
        halves = denoiser.conditions(texts, (images, ip_adapter_image_embeds), num_images_per_prompt)
        device, prompts = self._execution_device, repeated(prompt, num_images_per_prompt)
        steps = retrieve_timesteps(self.scheduler, num_inference_steps, device, timesteps, sigmas)
        latents = self._noise(denoiser, halves[1], (height, width), generator, latents)
        options, terms = self.prepare_extra_step_kwargs(generator, eta), (guidance, trace_tensors)
        latents, trace = self._drawn(denoiser, latents, halves, prompts, steps, terms, watch, options)
        pixels, nsfw = self._finished(latents, output_type, generator, halves[1].embeds.dtype)
        return GuidedOutput(pixels, nsfw, trace) if return_dict else (pixels, nsfw)

    def _finished(
        self, latents: Tensor, output_type: str, generator: Any, dtype: torch.dtype
    ) -> tuple[Any, list[bool] | None]:
        """Images in the form that was asked for, and which of them the safety checker blacked out."""
        nsfw = None
        images = latents
        if output_type != "latent":
            decoded = self.vae.decode(latents / self.vae.config.scaling_factor, return_dict=False, generator=generator)
            images, nsfw = self.run_safety_checker(decoded[0], self._execution_device, dtype)
        denormalise = [not flag for flag in nsfw] if nsfw is not None else [True] * len(images)
        images = self.image_processor.postprocess(images, output_type=output_type, do_denormalize=denormalise)
        self.maybe_free_model_hooks()
        return images, nsfw
