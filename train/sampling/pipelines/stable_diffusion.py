"""``GuidedStableDiffusion``: Stable Diffusion's denoising loop with guidance terms and a trace.

pipe = GuidedStableDiffusion.from_pipe(stable_diffusion_pipeline)
output = pipe(prompts, guidance=[AMG(index, embedder)])
output.images, output.trace
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.pipelines.stable_diffusion.pipeline_output import StableDiffusionPipelineOutput
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import (
    rescale_noise_cfg,
    retrieve_timesteps,
)
from torch import Tensor

from train.denoising.conditioning import Conditioning
from train.denoising.families.stable_diffusion import StableDiffusionDenoiser
from train.denoising.latents.decoder import Decoder
from train.denoising.latents.preview import preview_of
from train.sampling.guidance import Guidance, Run
from train.sampling.pipelines.loop import GuidedLoop

Callback: TypeAlias = Callable[..., dict[str, Tensor]]
"""Also diffusers' ``PipelineCallback`` and ``MultiPipelineCallbacks``, which name the tensors that they ask for."""


@dataclass
class GuidedOutput(StableDiffusionPipelineOutput):
    """The stock pipeline's output, and what happened on the way."""

    trace: list[dict[str, Any]] = field(default_factory=list)
    """One row an evaluation and image: ``image, step`` (of the evaluation), ``number`` (of the step that it belongs to:
    second-order schedulers evaluate twice a step), ``t, alpha_bar, magnitude`` (raw L2, against the negative prompt
    where there is one) and ``scale`` (the effective guidance scale), both None without classifier-free guidance,
    ``fired`` (names of the parts that changed ε̂), and the terms' own columns."""


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
        watch, inputs = callback_on_step_end, list(callback_on_step_end_tensor_inputs)
        if isinstance(watch, PipelineCallback | MultiPipelineCallbacks):
            inputs = list(watch.tensor_inputs)
        height, width = self._size(height, width)
        texts, images = (prompt, negative_prompt, prompt_embeds, negative_prompt_embeds), ip_adapter_image
        self.check_inputs(prompt, height, width, None, *texts[1:], images, ip_adapter_image_embeds, inputs)
        denoiser = StableDiffusionDenoiser(
            self,
            cross_attention_kwargs=cross_attention_kwargs,
            encoding={"lora_scale": (cross_attention_kwargs or {}).get("scale"), "clip_skip": clip_skip},
        )
        uncond, cond = denoiser.conditions(texts, (images, ip_adapter_image_embeds), num_images_per_prompt)
        device, batch_size = self._execution_device, len(cond)
        steps, num_inference_steps = retrieve_timesteps(self.scheduler, num_inference_steps, device, timesteps, sigmas)
        channels, dtype = self.unet.config.in_channels, cond.embeds.dtype
        latents = self.prepare_latents(batch_size, channels, height, width, dtype, device, generator, latents)
        loop = GuidedLoop(self.scheduler, denoiser, self._run(denoiser, batch_size), guidance, steps[0], trace_tensors)
        prompts = _repeated(prompt, num_images_per_prompt)
        latents, prepared = loop.prepare(steps[0], latents, uncond, cond, prompts)
        halves, options = (uncond, prepared or cond), self.prepare_extra_step_kwargs(generator, eta)
        latents = self._denoised(loop, steps, num_inference_steps, latents, halves, options, watch, inputs)
        loop.warn_of_broken(prompts)
        pixels, nsfw = self._finished(latents, output_type, generator, dtype)
        return GuidedOutput(pixels, nsfw, loop.trace.rows()) if return_dict else (pixels, nsfw)

    def _size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """In pixels; the model's own where one is not given."""
        if height and width:
            return height, width
        size = self.unet.config.sample_size
        rows, columns = (size, size) if isinstance(size, int) else size
        return rows * self.vae_scale_factor, columns * self.vae_scale_factor

    def _run(self, denoiser: StableDiffusionDenoiser, batch_size: int) -> Run:
        """What terms see of the call."""
        device = self._execution_device
        decode = Decoder(self.vae, device)
        return Run(
            batch_size=batch_size,
            train_timesteps=self.scheduler.config.num_train_timesteps,
            decode=decode,
            encode_prompts=denoiser.encode,
            tokenizer=self.tokenizer,
            preview=lambda latents: preview_of(self.vae, decode, device)(latents),
        )

    def _denoised(
        self,
        loop: GuidedLoop,
        timesteps: Sequence[Any],
        num_inference_steps: int,
        latents: Tensor,
        conditions: tuple[Conditioning | None, Conditioning],
        step_kwargs: dict[str, Any],
        callback: Callback | None,
        callback_inputs: Sequence[str],
    ) -> Tensor:
        """The denoising loop: ``x_T [n, c, h, w]`` → ``x_0``."""
        uncond, cond = conditions
        num_warmup_steps = len(timesteps) - num_inference_steps * self.scheduler.order
        self._num_timesteps = len(timesteps)
        with self.progress_bar(total=num_inference_steps) as progress_bar:
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    continue
                cfg = uncond is not None
                x_t = self.scheduler.scale_model_input(torch.cat([latents] * 2) if cfg else latents, t)
                # One pass over both halves.
                output = loop.denoiser(x_t, t, Conditioning.join([uncond, cond]) if uncond is not None else cond)
                output_uncond, output_cond = output.chunk(2) if cfg else (None, output)
                if output_uncond is not None:
                    output = output_uncond + self.guidance_scale * (output_cond - output_uncond)
                output = loop.correct(
                    i, t, x_t[: len(latents)], output_uncond, output_cond, output, uncond, cond, self.guidance_scale
                )
                if cfg and self.guidance_rescale > 0.0:
                    output = rescale_noise_cfg(output, output_cond, guidance_rescale=self.guidance_rescale)
                latents = self.scheduler.step(output, t, latents, **step_kwargs, return_dict=False)[0]
                if callback is not None:
                    latents, uncond, cond = self._called_back(callback, callback_inputs, i, t, latents, uncond, cond)
                due = i + 1 > num_warmup_steps and (i + 1) % self.scheduler.order == 0
                if i == len(timesteps) - 1 or due:
                    progress_bar.update()
        return latents

    def _called_back(
        self,
        callback: Callback,
        names: Sequence[str],
        step: int,
        t: Any,
        latents: Tensor,
        uncond: Conditioning | None,
        cond: Conditioning,
    ) -> tuple[Tensor, Conditioning | None, Conditioning]:
        """What a callback leaves of the tensors that it asked for, which are called as in the stock pipeline.

        Its ``prompt_embeds`` are both halves; ends it classifier-free guidance, they are the prompt's alone.
        """
        length = max(cond.tokens, uncond.tokens if uncond is not None else 0)
        halves = [one.padded(length).embeds for one in (uncond, cond) if one is not None]
        offered = {"latents": latents, "prompt_embeds": torch.cat(halves), "negative_prompt_embeds": halves[0]}
        changed = callback(self, step, t, {name: offered[name] for name in names})
        embeds = changed.pop("prompt_embeds", offered["prompt_embeds"])
        if embeds is not offered["prompt_embeds"] or self.do_classifier_free_guidance != (uncond is not None):
            own = embeds.chunk(2) if self.do_classifier_free_guidance else [embeds[-len(latents) :]]
            base = cond if uncond is None else uncond
            uncond = base.padded(length).with_embeds(own[0]) if len(own) > 1 else None
            cond = cond.padded(length).with_embeds(own[-1])
        return changed.pop("latents", latents), uncond, cond

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


def _repeated(prompt: str | list[str] | None, times: int) -> list[str] | None:
    """The prompt of each image."""
    if prompt is None:
        return None
    return [text for text in ([prompt] if isinstance(prompt, str) else prompt) for _ in range(times)]
