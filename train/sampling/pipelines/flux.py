"""``GuidedFlux``: FLUX.1's denoising loop with guidance terms and a trace."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import FluxPipeline
from diffusers.pipelines.flux.pipeline_flux import retrieve_timesteps
from torch import Tensor

from afresh.errors import UserError
from train.denoising.families.flux import FluxDenoiser
from train.denoising.latents.scaling import to_vae
from train.denoising.network import running_device
from train.sampling.guidance import Guidance
from train.sampling.pipelines.guided import Callback, GuidedOutput, GuidedPipeline, asked_for, repeated, shift_by_size


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
        if guidance:
            self._check_guidable()
        self._guidance_scale, self._joint_attention_kwargs = true_cfg_scale, joint_attention_kwargs
        self._current_timestep, self._interrupt = None, False
        watch = callback_on_step_end, asked_for(callback_on_step_end, callback_on_step_end_tensor_inputs)
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
            height=height, width=width, callback_on_step_end_tensor_inputs=watch[1], **how, **texts, **named
        )
        denoiser = self._denoiser(guidance_scale, how)
        cond = denoiser.conditions(texts, num_images_per_prompt)
        uncond = denoiser.conditions(negative, num_images_per_prompt) if self._true_cfg else None
        device, channels = self._execution_device, self.transformer.config.in_channels // 4
        packed, _ = self.prepare_latents(
            len(cond), channels, height, width, cond.embeds.dtype, device, generator, latents
        )
        steps = self._steps(num_inference_steps, sigmas, packed.shape[1])
        x_T = self._unpack_latents(packed, height, width, self.vae_scale_factor)
        terms, prompts = (guidance, trace_tensors), repeated(prompt, num_images_per_prompt)
        x_0, trace = self._drawn(denoiser, x_T, (uncond, cond), prompts, steps, terms, watch)
        images = self._finished(x_0, output_type)
        return GuidedOutput(images, None, trace) if return_dict else (images,)

    def _denoiser(self, scale: float, how: dict[str, Any]) -> FluxDenoiser:
        """The model under the options of the call: the scale that it is told, and how prompts are encoded."""
        options = self.joint_attention_kwargs
        encoding = {"lora_scale": (options or {}).get("scale"), **how}
        return FluxDenoiser(self, guidance=scale, joint_attention_kwargs=options, encoding=encoding)

    def _check_guidable(self) -> None:
        """Refuse guidance terms where there is no classifier-free guidance that they could take from."""
        if not self.transformer.config.guidance_embeds:
            raise UserError(
                "FLUX.1 schnell is distilled to a few steps without guidance: nothing can be taken back from it"
            )
        if not self._true_cfg:
            raise UserError(
                "FLUX.1 is distilled to be guided within: guidance terms need true classifier-free guidance beside it, "
                "true_cfg_scale above 1 and a negative prompt"
            )

    def _steps(self, number: int, sigmas: list[float] | None, tokens: int) -> tuple[Any, int]:
        """The timesteps, shifted by the image's patches, and how many steps they make."""
        levels: Any = np.linspace(1.0, 1 / number, number) if sigmas is None else sigmas
        config = self.scheduler.config
        if getattr(config, "use_flow_sigmas", False):
            levels = None
        mu = shift_by_size(config, tokens, 1.15)
        steps = retrieve_timesteps(self.scheduler, number, self._execution_device, sigmas=levels, mu=mu)
        self.scheduler.set_begin_index(0)
        return steps

    def _finished(self, x_0: Tensor, output_type: str) -> Any:
        """Images in the form that was asked for; latents are packed."""
        if output_type == "latent":
            images = self._pack_latents(x_0, *x_0.shape)
        else:
            images = self.vae.decode(to_vae(x_0, self.vae).to(running_device(self.vae)), return_dict=False)[0]
            images = self.image_processor.postprocess(images, output_type=output_type)
        self.maybe_free_model_hooks()
        return images
