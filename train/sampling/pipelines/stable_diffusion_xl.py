"""``GuidedStableDiffusionXL``: Stable Diffusion XL's denoising loop with guidance terms and a trace."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import retrieve_timesteps
from torch import Tensor

from train.denoising.families.stable_diffusion_xl import POOLED, SIZES, StableDiffusionXLDenoiser
from train.denoising.latents.scaling import to_vae, without_overflow
from train.denoising.network import running_device
from train.sampling.guidance import Guidance
from train.sampling.pipelines.guided import Callback, GuidedOutput, GuidedPipeline, asked_for, repeated
from train.sampling.pipelines.loop import GuidedLoop

Pair = tuple[int, int]


class GuidedStableDiffusionXL(GuidedPipeline, StableDiffusionXLPipeline):
    """``StableDiffusionXLPipeline`` whose ``ε̂`` guidance terms may correct at each step.

    Takes any Stable Diffusion XL base and any of its schedulers. Without terms it draws the stock pipeline's images bit
    for bit; with terms, so does every image of the batch that no term acts on.
    """

    STOCK = StableDiffusionXLPipeline
    CALLED: ClassVar = {"prompt_embeds": "embeds", "add_text_embeds": POOLED, "add_time_ids": SIZES}

    @classmethod
    def _switches(cls, pipeline: Any) -> dict[str, Any]:
        zeros = pipeline.config.get("force_zeros_for_empty_prompt", True)
        watermark = getattr(pipeline, "watermark", None) is not None
        return {"force_zeros_for_empty_prompt": zeros, "add_watermarker": watermark}

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        prompt_2: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        denoising_end: float | None = None,
        guidance_scale: float = 5.0,
        negative_prompt: str | list[str] | None = None,
        negative_prompt_2: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        ip_adapter_image: Any = None,
        ip_adapter_image_embeds: list[Tensor] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        guidance_rescale: float = 0.0,
        original_size: Pair | None = None,
        crops_coords_top_left: Pair = (0, 0),
        target_size: Pair | None = None,
        negative_original_size: Pair | None = None,
        negative_crops_coords_top_left: Pair = (0, 0),
        negative_target_size: Pair | None = None,
        clip_skip: int | None = None,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        *,
        guidance: Sequence[Guidance] = (),
        trace_tensors: bool = False,
    ) -> GuidedOutput | tuple[Any]:
        """Draw images. All arguments but the last two are those of ``StableDiffusionXLPipeline``; for these two see
        :class:`~train.sampling.pipelines.stable_diffusion.GuidedStableDiffusion`.

        Returns:
            :class:`GuidedOutput`, or the stock pipeline's ``(images,)`` with ``return_dict=False``.

        Raises:
            ValueError: as the stock pipeline; or guidance was asked of a model or scheduler that has no ``ε``.
        """
        self._guidance_scale, self._guidance_rescale, self._clip_skip = guidance_scale, guidance_rescale, clip_skip
        self._cross_attention_kwargs, self._interrupt = cross_attention_kwargs, False
        self._denoising_end = denoising_end
        watch, inputs = callback_on_step_end, asked_for(callback_on_step_end, callback_on_step_end_tensor_inputs)
        height, width = self._size(height, width)
        texts = {
            "prompt": prompt,
            "prompt_2": prompt_2,
            "negative_prompt": negative_prompt,
            "negative_prompt_2": negative_prompt_2,
            "prompt_embeds": prompt_embeds,
            "negative_prompt_embeds": negative_prompt_embeds,
            "pooled_prompt_embeds": pooled_prompt_embeds,
            "negative_pooled_prompt_embeds": negative_pooled_prompt_embeds,
        }
        pictures = ip_adapter_image, ip_adapter_image_embeds
        given = {"ip_adapter_image": pictures[0], "ip_adapter_image_embeds": pictures[1], **texts}
        self.check_inputs(
            height=height, width=width, callback_steps=None, callback_on_step_end_tensor_inputs=inputs, **given
        )
        denoiser = StableDiffusionXLDenoiser(
            self,
            cross_attention_kwargs=cross_attention_kwargs,
            encoding={"lora_scale": (cross_attention_kwargs or {}).get("scale"), "clip_skip": clip_skip},
        )
        negative: tuple[Pair, Pair, Pair] | None = None
        if negative_original_size is not None and negative_target_size is not None:
            negative = negative_original_size, negative_crops_coords_top_left, negative_target_size
        own = original_size or (height, width), crops_coords_top_left, target_size or (height, width)
        uncond, cond = denoiser.conditions(texts, pictures, num_images_per_prompt, (own, negative))
        device, batch_size, dtype = self._execution_device, len(cond), cond.embeds.dtype
        steps, num_inference_steps = retrieve_timesteps(self.scheduler, num_inference_steps, device, timesteps, sigmas)
        channels = self.unet.config.in_channels
        latents = self.prepare_latents(batch_size, channels, height, width, dtype, device, generator, latents)
        if denoising_end is not None and 0 < denoising_end < 1:
            trained = self.scheduler.config.num_train_timesteps
            last = round(trained - denoising_end * trained)
            num_inference_steps = sum(bool(t >= last) for t in steps)
            steps = steps[:num_inference_steps]
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(0)
        loop = GuidedLoop(self.scheduler, denoiser, self._run(denoiser, batch_size), guidance, steps[0], trace_tensors)
        prompts = repeated(prompt, num_images_per_prompt)
        latents, prepared = loop.prepare(steps[0], latents, uncond, cond, prompts)
        halves, options = (uncond, prepared or cond), self.prepare_extra_step_kwargs(generator, eta)
        latents = self._denoised(loop, steps, num_inference_steps, latents, halves, options, watch, inputs)
        loop.warn_of_broken(prompts)
        images = self._finished(latents, output_type)
        return GuidedOutput(images, None, loop.trace.rows()) if return_dict else (images,)

    def _finished(self, latents: Tensor, output_type: str) -> Any:
        """Images in the form that was asked for."""
        images = latents
        if output_type != "latent":
            with without_overflow(self.vae) as vae:
                latents = latents.to(vae.dtype) if vae.dtype == torch.float32 else latents
                images = vae.decode(to_vae(latents, vae).to(running_device(vae)), return_dict=False)[0]
            if self.watermark is not None:
                images = self.watermark.apply_watermark(images)
            images = self.image_processor.postprocess(images, output_type=output_type)
        self.maybe_free_model_hooks()
        return images
