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
        watch = callback_on_step_end, asked_for(callback_on_step_end, callback_on_step_end_tensor_inputs)
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
        given = {"ip_adapter_image": ip_adapter_image, "ip_adapter_image_embeds": ip_adapter_image_embeds, **texts}
        asked = {"callback_steps": None, "callback_on_step_end_tensor_inputs": watch[1]}
        self.check_inputs(height=height, width=width, **asked, **given)
        denoiser, pictures = self._denoiser(), (ip_adapter_image, ip_adapter_image_embeds)
        own = original_size or (height, width), crops_coords_top_left, target_size or (height, width)
        negative = negative_original_size, negative_crops_coords_top_left, negative_target_size
        sizes: Any = own, None if None in negative else negative
        halves = denoiser.conditions(texts, pictures, num_images_per_prompt, sizes)
        steps, prompts = self._steps(num_inference_steps, timesteps, sigmas), repeated(prompt, num_images_per_prompt)
        latents = self._noise(denoiser, halves[1], (height, width), generator, latents)
        options, terms = self.prepare_extra_step_kwargs(generator, eta), (guidance, trace_tensors)
        latents, trace = self._drawn(denoiser, latents, halves, prompts, steps, terms, watch, options)
        images = self._finished(latents, output_type)
        return GuidedOutput(images, None, trace) if return_dict else (images,)

    def _denoiser(self) -> StableDiffusionXLDenoiser:
        """The model under the options of the call."""
        scale = (self.cross_attention_kwargs or {}).get("scale")
        return StableDiffusionXLDenoiser(
            self,
            cross_attention_kwargs=self.cross_attention_kwargs,
            encoding={"lora_scale": scale, "clip_skip": self.clip_skip},
        )

    def _steps(self, number: int, timesteps: Any, sigmas: Any) -> tuple[Any, int]:
        """The timesteps, to where another model takes over (``denoising_end``), and how many steps they make."""
        steps, number = retrieve_timesteps(self.scheduler, number, self._execution_device, timesteps, sigmas)
        if self.denoising_end is not None and 0 < self.denoising_end < 1:
            trained = self.scheduler.config.num_train_timesteps
            last = round(trained - self.denoising_end * trained)
            number = sum(bool(t >= last) for t in steps)
            steps = steps[:number]
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(0)
        return steps, number

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
