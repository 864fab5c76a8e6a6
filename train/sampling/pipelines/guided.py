"""What the guided pipelines of the families share: their parts, their denoising loop, their callbacks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.pipelines.stable_diffusion.pipeline_output import StableDiffusionPipelineOutput
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from torch import Tensor

from train.denoising.conditioning import Conditioning
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


class GuidedPipeline:
    """The loop of a guided pipeline; stands before its stock pipeline among a class's bases.

    Attributes:
        STOCK: the stock pipeline.
        CALLED: what a callback is offered of both halves → part of the conditioning.
    """

    STOCK: ClassVar[Any]
    CALLED: ClassVar[Mapping[str, str]] = {"prompt_embeds": "embeds"}
    _optional_components: ClassVar[Any]

    if TYPE_CHECKING:  # what the stock pipeline has

        def __getattr__(self, name: str) -> Any: ...

    @classmethod
    def from_pipe(cls, pipeline: Any, **overrides: Any) -> Any:
        """Share another pipeline's components, as they are.

        Unlike diffusers' own, this leaves their dtype alone: that one casts a half-precision model to
        float32, and since the components are shared, the original pipeline's too.

        Args:
            pipeline: the stock pipeline of the family, or one with the same components.
            overrides: components to take instead, as in ``scheduler=…``.

        Raises:
            ValueError: ``pipeline`` lacks a component.
        """
        names = set(inspect.signature(cls.STOCK.__init__).parameters) - {"self"}
        arguments = {name: part for name, part in pipeline.components.items() if name in names}
        arguments |= cls._switches(pipeline)
        arguments.update(overrides)
        missing = names - set(arguments) - set(cls._optional_components)
        if missing:
            lacking = ", ".join(sorted(missing))
            raise ValueError(f"{type(pipeline).__name__} is no {cls.STOCK.__name__}: it lacks {lacking}")
        for name in cls._optional_components:
            arguments.setdefault(name, None)
        guided = cls(**arguments)
        guided.set_progress_bar_config(**getattr(pipeline, "_progress_bar_config", {}))
        return guided

    @classmethod
    def _switches(cls, pipeline: Any) -> dict[str, Any]:
        """Arguments of the stock pipeline that are no parts."""
        return {"requires_safety_checker": pipeline.config.get("requires_safety_checker", False)}

    def _size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """In pixels; the model's own where one is not given."""
        if height and width:
            return height, width
        size = self.unet.config.sample_size
        rows, columns = (size, size) if isinstance(size, int) else size
        return rows * self.vae_scale_factor, columns * self.vae_scale_factor

    def _run(self, denoiser: Any, batch_size: int) -> Run:
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

    def _noise(
        self, denoiser: Any, cond: Conditioning, size: tuple[int, int], generator: Any, latents: Tensor | None
    ) -> Tensor:
        """``x_T [n, c, h, w]`` of a call, as the stock pipeline draws it or is given it."""
        channels, dtype = denoiser.network.config.in_channels, cond.embeds.dtype
        return self.prepare_latents(len(cond), channels, *size, dtype, self._execution_device, generator, latents)

    def _drawn(
        self,
        denoiser: Any,
        latents: Tensor,
        conditions: tuple[Conditioning | None, Conditioning],
        prompts: Sequence[str] | None,
        steps: tuple[Sequence[Any], int],
        terms: tuple[Sequence[Guidance], bool],
        watch: tuple[Callback | None, Sequence[str]],
        options: Mapping[str, Any] | None = None,
    ) -> tuple[Tensor, list[dict[str, Any]]]:
        """A call from its noise on: ``x_T [n, c, h, w]`` → ``x_0``, and the rows of the trace.

        Args:
            denoiser: the model under the conditions of the call.
            latents: ``x_T``.
            conditions: the negative prompt's, if there is classifier-free guidance, and the prompt's.
            prompts: of each image, where they are known.
            steps: timesteps, and how many steps they make.
            terms: what guides, and whether the trace keeps tensors.
            watch: a callback, and what it asks for.
            options: of the scheduler's step.
        """
        uncond, cond = conditions
        (timesteps, number), (guidance, tensors) = steps, terms
        loop = GuidedLoop(self.scheduler, denoiser, self._run(denoiser, len(cond)), guidance, timesteps[0], tensors)
        latents, prepared = loop.prepare(timesteps[0], latents, uncond, cond, prompts)
        halves = uncond, prepared or cond
        latents = self._denoised(loop, timesteps, number, latents, halves, dict(options or {}), *watch)
        loop.warn_of_broken(prompts)
        return latents, loop.trace.rows()

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
                x_t = torch.cat([latents] * 2) if cfg else latents
                if hasattr(self.scheduler, "scale_model_input"):
                    x_t = self.scheduler.scale_model_input(x_t, t)
                output = self._both(loop, x_t, t, uncond, cond)
                output_uncond, output_cond = output.chunk(2) if cfg else (None, output)
                if output_uncond is not None:
                    output = self._guided(output_uncond, output_cond)
                    output = self._beside(loop, i, t, latents, output, output_cond, cond)
                output = loop.correct(
                    i, t, x_t[: len(latents)], output_uncond, output_cond, output, uncond, cond, self.cfg_scale
                )
                if cfg and getattr(self, "guidance_rescale", 0.0) > 0.0:
                    output = rescale_noise_cfg(output, output_cond, guidance_rescale=self.guidance_rescale)
                latents = self.scheduler.step(output, t, latents, **step_kwargs, return_dict=False)[0]
                if callback is not None:
                    latents, uncond, cond = self._called_back(callback, callback_inputs, i, t, latents, uncond, cond)
                due = i + 1 > num_warmup_steps and (i + 1) % self.scheduler.order == 0
                if i == len(timesteps) - 1 or due:
                    progress_bar.update()
        return latents

    def _both(self, loop: Any, x_t: Tensor, t: Any, uncond: Conditioning | None, cond: Conditioning) -> Tensor:
        """The model's output for both halves, or the one: in one pass, as most stock pipelines do."""
        return loop.denoiser(x_t, t, Conditioning.join([uncond, cond]) if uncond is not None else cond)

    @property
    def cfg_scale(self) -> float:
        """``s`` of ``uncond + s (cond − uncond)``."""
        return self.guidance_scale

    def _guided(self, uncond: Tensor, cond: Tensor) -> Tensor:
        """Classifier-free guidance of the model's outputs."""
        return uncond + self.guidance_scale * (cond - uncond)

    @staticmethod
    def asked(scale: float, negative: list[str] | None) -> dict[str, Any]:
        """Arguments for a guidance scale and negative prompts; None for the model's own unconditional half."""
        return {"guidance_scale": scale, "negative_prompt": negative}

    def _beside(
        self, loop: Any, i: int, t: Any, latents: Tensor, output: Tensor, output_cond: Tensor, cond: Any
    ) -> Tensor:
        """The guided output with a family's own guidance beside the classifier-free one, of which most have none."""
        return output

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
        halves = [one.padded(length) for one in (uncond, cond) if one is not None]
        whole = {name: torch.cat([half.parts[part] for half in halves]) for name, part in self.CALLED.items()}
        offered = {"latents": latents, **whole, "negative_prompt_embeds": halves[0].embeds}
        changed = callback(self, step, t, {name: offered[name] for name in names})
        cfg = self.do_classifier_free_guidance
        new = {name: changed.pop(name, one) for name, one in whole.items()}
        if any(new[name] is not one for name, one in whole.items()) or cfg != (uncond is not None):
            own = {self.CALLED[name]: one.chunk(2) if cfg else [one[-len(latents) :]] for name, one in new.items()}
            base = cond if uncond is None else uncond
            first, last = ({name: parts[at] for name, parts in own.items()} for at in (0, -1))
            uncond = Conditioning({**base.padded(length).parts, **first}) if cfg else None
            cond = Conditioning({**cond.padded(length).parts, **last})
        return changed.pop("latents", latents), uncond, cond


def asked_for(callback: Callback | None, names: Sequence[str]) -> list[str]:
    """The tensors that a callback is to be given."""
    return list(callback.tensor_inputs if isinstance(callback, PipelineCallback | MultiPipelineCallbacks) else names)


def shift_by_size(config: Mapping[str, Any], tokens: int, most: float) -> float:
    """The shift of flow matching's noise levels by an image's patches (``use_dynamic_shifting``).

    Args:
        config: of the scheduler.
        tokens: patches of the image.
        most: shift of the largest image where the config has none.
    """
    names = (("base_image_seq_len", 256), ("max_image_seq_len", 4096), ("base_shift", 0.5), ("max_shift", most))
    return calculate_shift(tokens, *(config.get(name, default) for name, default in names))


def repeated(prompt: str | list[str] | None, times: int) -> list[str] | None:
    """The prompt of each image."""
    if prompt is None:
        return None
    return [text for text in ([prompt] if isinstance(prompt, str) else prompt) for _ in range(times)]
