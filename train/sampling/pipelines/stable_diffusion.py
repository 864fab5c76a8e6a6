"""``GuidedStableDiffusion``: Stable Diffusion's denoising loop with guidance terms and a trace.

pipe = GuidedStableDiffusion.from_pipe(stable_diffusion_pipeline)
output = pipe(prompts, guidance=[AMG(index, embedder)])
output.images, output.trace
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.pipelines.stable_diffusion.pipeline_output import StableDiffusionPipelineOutput
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import (
    rescale_noise_cfg,
    retrieve_timesteps,
)
from torch import Tensor

from train.denoising.decoding import _Decoder
from train.denoising.preview import preview_of
from train.sampling.guidance import Guidance, Run
from train.sampling.pipelines.loop import GuidedLoop


@dataclass
class GuidedOutput(StableDiffusionPipelineOutput):
    """The stock pipeline's output, and what happened on the way."""

    trace: list[dict[str, Any]] = field(default_factory=list)
    """One row a step and image: ``image, step, t, alpha_bar, magnitude`` (raw L2; None without
    classifier-free guidance), ``fired`` (names of the parts that changed ε̂), and the terms' own columns."""


class GuidedStableDiffusion(StableDiffusionPipeline):
    """``StableDiffusionPipeline`` whose ``ε̂`` guidance terms may correct at each step.

    Takes any Stable Diffusion 1.x or 2.x pipeline and any of its schedulers. Without terms it draws the stock
    pipeline's images bit for bit; with terms, so does every image of the batch that no term acts on.
    """

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **overrides: Any) -> GuidedStableDiffusion:
        """Share another pipeline's components, as they are.

        Unlike diffusers' own, this leaves their dtype alone: that one casts a half-precision model to
        float32, and since the components are shared, the original pipeline's too.

        Args:
            pipeline: a ``StableDiffusionPipeline``, or one with the same components.
            overrides: components to take instead, as in ``scheduler=…``.

        Raises:
            ValueError: ``pipeline`` lacks a component.
        """
        names = set(inspect.signature(StableDiffusionPipeline.__init__).parameters) - {"self"}
        arguments = {name: part for name, part in pipeline.components.items() if name in names}
        arguments["requires_safety_checker"] = pipeline.config.get("requires_safety_checker", False)
        arguments.update(overrides)
        missing = names - set(arguments) - set(cls._optional_components)
        if missing:
            raise ValueError(f"{type(pipeline).__name__} is no Stable Diffusion: it lacks {', '.join(sorted(missing))}")
        for name in cls._optional_components:
            arguments.setdefault(name, None)
        guided = cls(**arguments)
        guided.set_progress_bar_config(**getattr(pipeline, "_progress_bar_config", {}))
        return guided

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
        callback_on_step_end: Callable[..., dict[str, Tensor]]
        | PipelineCallback
        | MultiPipelineCallbacks
        | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        *,
        guidance: Sequence[Guidance] = (),
        trace_tensors: bool = False,
    ) -> GuidedOutput | tuple[Any, Any]:
        """Draw images. All arguments but the last two are those of ``StableDiffusionPipeline``.

        Args:
            guidance: terms that correct ``ε̂``, in this order; before ``guidance_rescale``, which then sees
                the result.
            trace_tensors: also keep ``x_t``, ``eps_uncond``, ``eps_cond``, ``eps_hat`` and each part's
                ``delta.<part>`` in the trace (float32, on the CPU), from which every ``ε̂`` can be
                recomputed.

        Returns:
            :class:`GuidedOutput`, or the stock pipeline's ``(images, nsfw)`` with ``return_dict=False``.

        Raises:
            ValueError: as the stock pipeline; or guidance was asked of a model or scheduler that has no
                ``ε``.
        """
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        if not height or not width:
            size = self.unet.config.sample_size
            sides = (size, size) if isinstance(size, int) else size
            height, width = (side * self.vae_scale_factor for side in sides)
        self.check_inputs(
            prompt,
            height,
            width,
            None,
            negative_prompt,
            prompt_embeds,
            negative_prompt_embeds,
            ip_adapter_image,
            ip_adapter_image_embeds,
            list(callback_on_step_end_tensor_inputs),
        )
        self._guidance_scale = guidance_scale
        self._guidance_rescale = guidance_rescale
        self._clip_skip = clip_skip
        self._cross_attention_kwargs = cross_attention_kwargs
        self._interrupt = False

        if prompt_embeds is not None:
            batch_size = len(prompt_embeds) * num_images_per_prompt
        else:
            batch_size = (1 if isinstance(prompt, str) else len(prompt or ())) * num_images_per_prompt
        device = self._execution_device

        prompt_embeds, negative_prompt_embeds = self.encode_prompt(
            prompt,
            device,
            num_images_per_prompt,
            self.do_classifier_free_guidance,
            negative_prompt,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            lora_scale=(cross_attention_kwargs or {}).get("scale"),
            clip_skip=clip_skip,
        )
        if self.do_classifier_free_guidance:  # one pass over both halves
            prompt_embeds = torch.cat([negative_prompt_embeds, prompt_embeds])
        added_cond_kwargs = None
        if ip_adapter_image is not None or ip_adapter_image_embeds is not None:
            image_embeds = self.prepare_ip_adapter_image_embeds(
                ip_adapter_image,
                ip_adapter_image_embeds,
                device,
                batch_size,
                self.do_classifier_free_guidance,
            )
            added_cond_kwargs = {"image_embeds": image_embeds}

        timesteps, num_inference_steps = retrieve_timesteps(
            self.scheduler, num_inference_steps, device, timesteps, sigmas
        )
        latents = self.prepare_latents(
            batch_size,
            self.unet.config.in_channels,
            height,
            width,
            prompt_embeds.dtype,
            device,
            generator,
            latents,
        )
        extra_step_kwargs = self.prepare_extra_step_kwargs(generator, eta)
        timestep_cond = None
        if self.unet.config.time_cond_proj_dim is not None:  # guidance-distilled models
            scales = torch.tensor(self.guidance_scale - 1).repeat(batch_size)
            timestep_cond = self.get_guidance_scale_embedding(
                scales, embedding_dim=self.unet.config.time_cond_proj_dim
            ).to(device=device, dtype=latents.dtype)
        denoiser = _Denoiser(self, batch_size, timestep_cond, added_cond_kwargs)

        decode = _Decoder(self.vae, device)
        run = Run(
            batch_size=batch_size,
            train_timesteps=self.scheduler.config.num_train_timesteps,
            decode=decode,
            encode_prompts=lambda texts: self.encode_prompt(list(texts), device, 1, False, clip_skip=clip_skip)[0],
            tokenizer=self.tokenizer,
            preview=lambda latents: preview_of(self.vae, decode, device)(latents),
        )
        first = torch.as_tensor(timesteps[0])
        loop = GuidedLoop(self.scheduler, denoiser, run, guidance, first, trace_tensors)
        latents, embeds_cond = loop.prepare(
            first, latents, *self._halves(prompt_embeds), _repeated(prompt, num_images_per_prompt)
        )
        if guidance and embeds_cond is not None:
            embeds_uncond = self._halves(prompt_embeds)[0]
            prompt_embeds = embeds_cond if embeds_uncond is None else torch.cat([embeds_uncond, embeds_cond])
        num_warmup_steps = len(timesteps) - num_inference_steps * self.scheduler.order
        self._num_timesteps = len(timesteps)
        with self.progress_bar(total=num_inference_steps) as progress_bar:
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    continue
                cfg = self.do_classifier_free_guidance
                x_t = self.scheduler.scale_model_input(torch.cat([latents] * 2) if cfg else latents, t)
                output = denoiser(x_t, t, prompt_embeds)
                output_uncond, output_cond = output.chunk(2) if cfg else (None, output)
                if output_uncond is not None:
                    output = output_uncond + self.guidance_scale * (output_cond - output_uncond)

                output = loop.correct(
                    i,
                    t,
                    x_t[:batch_size],
                    output_uncond,
                    output_cond,
                    output,
                    *self._halves(prompt_embeds),
                    self.guidance_scale,
                )

                if cfg and self.guidance_rescale > 0.0:
                    output = rescale_noise_cfg(output, output_cond, guidance_rescale=self.guidance_rescale)
                latents = self.scheduler.step(output, t, latents, **extra_step_kwargs, return_dict=False)[0]

                if callback_on_step_end is not None:
                    offered = {
                        "latents": latents,
                        "prompt_embeds": prompt_embeds,
                        "negative_prompt_embeds": negative_prompt_embeds,
                    }
                    offered = {name: offered[name] for name in callback_on_step_end_tensor_inputs}
                    changed = callback_on_step_end(self, i, t, offered)
                    latents = changed.pop("latents", latents)
                    prompt_embeds = changed.pop("prompt_embeds", prompt_embeds)
                    negative_prompt_embeds = changed.pop("negative_prompt_embeds", negative_prompt_embeds)
                due = i + 1 > num_warmup_steps and (i + 1) % self.scheduler.order == 0
                if i == len(timesteps) - 1 or due:
                    progress_bar.update()

        loop.warn_of_broken(_repeated(prompt, num_images_per_prompt))
        nsfw = None
        if output_type == "latent":
            images = latents
        else:
            images = self.vae.decode(latents / self.vae.config.scaling_factor, return_dict=False, generator=generator)[
                0
            ]
            images, nsfw = self.run_safety_checker(images, device, prompt_embeds.dtype)
        denormalise = [not flag for flag in nsfw] if nsfw is not None else [True] * len(images)
        images = self.image_processor.postprocess(images, output_type=output_type, do_denormalize=denormalise)
        self.maybe_free_model_hooks()
        if not return_dict:
            return images, nsfw
        return GuidedOutput(images=images, nsfw_content_detected=nsfw, trace=loop.trace.rows())

    def _halves(self, prompt_embeds: Tensor) -> tuple[Tensor | None, Tensor]:
        """Of the empty (or negative) prompt, if there is classifier-free guidance, and of the prompt."""
        if not self.do_classifier_free_guidance:
            return None, prompt_embeds
        embeds_uncond, embeds_cond = prompt_embeds.chunk(2)
        return embeds_uncond, embeds_cond


def _repeated(prompt: str | list[str] | None, times: int) -> list[str] | None:
    """The prompt of each image."""
    if prompt is None:
        return None
    return [text for text in ([prompt] if isinstance(prompt, str) else prompt) for _ in range(times)]


class _Denoiser:
    """The UNet under the conditions of one call."""

    def __init__(
        self,
        pipe: GuidedStableDiffusion,
        batch_size: int,
        timestep_cond: Tensor | None,
        added_cond_kwargs: dict[str, list[Tensor]] | None,
    ) -> None:
        self._pipe, self._batch_size = pipe, batch_size
        self._timestep_cond, self._added_cond_kwargs = timestep_cond, added_cond_kwargs

    def __call__(self, x: Tensor, t: Tensor, embeds: Tensor | None, rows: Tensor | None = None) -> Tensor:
        """The model's output for the whole batch, both halves, or for the images ``rows`` under a prompt."""
        timestep_cond, added = self._timestep_cond, self._added_cond_kwargs
        if rows is not None:
            timestep_cond = None if timestep_cond is None else timestep_cond[rows]
            if added is not None:  # IP-adapter images: the conditional half is the last
                added = {name: [image[-self._batch_size :][rows] for image in images] for name, images in added.items()}
        return self._pipe.unet(
            x,
            t,
            encoder_hidden_states=embeds,
            timestep_cond=timestep_cond,
            cross_attention_kwargs=self._pipe.cross_attention_kwargs,
            added_cond_kwargs=added,
            return_dict=False,
        )[0]

