"""``GuidedFlux``: FLUX.1's denoising loop with guidance terms and a trace."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import FluxPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps
from torch import Tensor

from afresh.errors import UserError
from train.denoising.families.flux import FluxDenoiser
from train.denoising.latents.scaling import to_vae
from train.denoising.network import running_device
from train.sampling.guidance import Guidance
from train.sampling.pipelines.guided import Callback, GuidedOutput, GuidedPipeline, asked_for, repeated
from train.sampling.pipelines.loop import GuidedLoop


class GuidedFlux(GuidedPipeline, FluxPipeline):
    """``FluxPipeline`` whose velocity guidance terms may correct at each step, under true classifier-free guidance.

    Takes FLUX.1 dev. Without terms it draws the stock pipeline's images bit for bit. The guidance that is distilled
    into the model cannot be taken apart, so terms need ``true_cfg_scale`` above 1 and a negative prompt (the empty one
    will do), and what they take from the scale they take from that.
    """

    STOCK = FluxPipeline
    CALLED: ClassVar = {"prompt_embeds": "embeds"}

    @classmethod
    def _switches(cls, pipeline: Any) -> dict[str, Any]:
        return {}

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether a negative prompt is steered away from."""
        return self._true_cfg

    @staticmethod
    def asked(scale: float, negative: list[str] | None) -> dict[str, Any]:
        """The scale that the model is told or, with negative prompts, that of true classifier-free guidance."""
        return {"guidance_scale": scale} if negative is None else {"true_cfg_scale": scale, "negative_prompt": negative}

    def _both(self, loop: Any, x_t: Tensor, t: Any, uncond: Any, cond: Any) -> Tensor:
        """In two passes, the prompt's first, as the stock pipeline."""
        if uncond is None:
            return loop.denoiser(x_t, t, cond)
        first, second = x_t.chunk(2)
        output = loop.denoiser(second, t, cond)
        return torch.cat([loop.denoiser(first, t, uncond), output])

    def _called_back(
        self, callback: Any, names: Sequence[str], step: int, t: Any, latents: Tensor, uncond: Any, cond: Any
    ) -> tuple[Tensor, Any, Any]:
        """As the stock pipeline calls it: packed latents, and the prompt's embeddings alone."""
        height, width = (side * self.vae_scale_factor for side in latents.shape[-2:])
        offered = {"latents": self._pack_latents(latents, *latents.shape), "prompt_embeds": cond.embeds}
        changed = callback(self, step, t, {name: offered[name] for name in names})
        packed = changed.pop("latents", offered["latents"])
        cond = cond.with_embeds(changed.pop("prompt_embeds", cond.embeds))
        return self._unpack_latents(packed, height, width, self.vae_scale_factor), uncond, cond

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        prompt_2: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        negative_prompt_2: str | list[str] | None = None,
        true_cfg_scale: float = 1.0,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 28,
        sigmas: list[float] | None = None,
        guidance_scale: float = 3.5,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
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
        """Draw images. All arguments but the last two are those of ``FluxPipeline`` (image prompts are left out); for
        these two see :class:`~train.sampling.pipelines.stable_diffusion.GuidedStableDiffusion`.

        Returns:
            :class:`GuidedOutput`, or the stock pipeline's ``(images,)`` with ``return_dict=False``.

        Raises:
            ValueError: as the stock pipeline.
            UserError: guidance terms without true classifier-free guidance.
        """
        given = negative_prompt is not None or None not in (negative_prompt_embeds, negative_pooled_prompt_embeds)
        self._true_cfg = true_cfg_scale > 1 and given
        if guidance and not self.transformer.config.guidance_embeds:
            raise UserError(
                "FLUX.1 schnell is distilled to a few steps without guidance: nothing can be taken back from it"
            )
        if guidance and not self._true_cfg:
            raise UserError(
                "FLUX.1 is distilled to be guided within: guidance terms need true classifier-free guidance beside it, "
                "true_cfg_scale above 1 and a negative prompt"
            )
        self._guidance_scale, self._joint_attention_kwargs = true_cfg_scale, joint_attention_kwargs
        self._current_timestep, self._interrupt = None, False
        watch, inputs = callback_on_step_end, asked_for(callback_on_step_end, callback_on_step_end_tensor_inputs)
        side = self.default_sample_size * self.vae_scale_factor
        height, width = height or side, width or side
        texts = {
            "prompt": prompt,
            "prompt_2": prompt_2,
            "prompt_embeds": prompt_embeds,
            "pooled_prompt_embeds": pooled_prompt_embeds,
        }
        negative = {
            "prompt": negative_prompt,
            "prompt_2": negative_prompt_2,
            "prompt_embeds": negative_prompt_embeds,
            "pooled_prompt_embeds": negative_pooled_prompt_embeds,
        }
        how = {"max_sequence_length": max_sequence_length}
        named = {f"negative_{name}": value for name, value in negative.items()}
        self.check_inputs(
            height=height, width=width, callback_on_step_end_tensor_inputs=inputs, **how, **texts, **named
        )
        denoiser = FluxDenoiser(
            self,
            guidance=guidance_scale,
            joint_attention_kwargs=joint_attention_kwargs,
            encoding={"lora_scale": (joint_attention_kwargs or {}).get("scale"), **how},
        )
        cond = denoiser.conditions(texts, num_images_per_prompt)
        uncond = denoiser.conditions(negative, num_images_per_prompt) if self._true_cfg else None
        device, batch_size, channels = self._execution_device, len(cond), self.transformer.config.in_channels // 4
        packed, _ = self.prepare_latents(
            batch_size, channels, height, width, cond.embeds.dtype, device, generator, latents
        )
        levels: Any = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps) if sigmas is None else sigmas
        if getattr(self.scheduler.config, "use_flow_sigmas", False):
            levels = None
        config = self.scheduler.config
        names = (("base_image_seq_len", 256), ("max_image_seq_len", 4096), ("base_shift", 0.5), ("max_shift", 1.15))
        mu = calculate_shift(packed.shape[1], *(config.get(name, default) for name, default in names))
        steps, num_inference_steps = retrieve_timesteps(
            self.scheduler, num_inference_steps, device, sigmas=levels, mu=mu
        )
        self.scheduler.set_begin_index(0)
        loop = GuidedLoop(self.scheduler, denoiser, self._run(denoiser, batch_size), guidance, steps[0], trace_tensors)
        prompts = repeated(prompt, num_images_per_prompt)
        x_T = self._unpack_latents(packed, height, width, self.vae_scale_factor)
        x_T, prepared = loop.prepare(steps[0], x_T, uncond, cond, prompts)
        x_0 = self._denoised(loop, steps, num_inference_steps, x_T, (uncond, prepared or cond), {}, watch, inputs)
        loop.warn_of_broken(prompts)
        if output_type == "latent":
            images = self._pack_latents(x_0, *x_0.shape)
        else:
            images = self.vae.decode(to_vae(x_0, self.vae).to(running_device(self.vae)), return_dict=False)[0]
            images = self.image_processor.postprocess(images, output_type=output_type)
        self.maybe_free_model_hooks()
        return GuidedOutput(images, None, loop.trace.rows()) if return_dict else (images,)
