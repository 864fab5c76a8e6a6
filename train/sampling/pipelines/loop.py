"""What the guided pipelines share: one call's guidance, between the model's parametrisation and ε-space."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from afresh.progress import get_logger
from train.denoising.coefficients import Coefficients
from train.denoising.conditioning import Conditioning
from train.denoising.predictions import output_per_eps, to_eps
from train.denoising.schedules import coefficients_at, is_flow, refines_a_step, schedule_of
from train.sampling.guidance import MIN_ALPHA_BAR, Guidance, Part, Run, Start, State, guide
from train.sampling.trace import Trace

log = get_logger(__name__)
Denoise = Callable[[Tensor, Tensor, Any], Tensor]
"""``(x_t, t, conditioning)`` → the model's output: a denoiser of ``train.denoising``."""


class GuidedLoop:
    """The guidance terms of one call of a pipeline, and their trace.

    Args:
        scheduler: with its timesteps set.
        denoiser: the model under the conditions of this call.
        run: what terms see of the call.
        guidance: the terms, in order.
        t: the first timestep.
        trace_tensors: also keep tensors in the trace.

    Raises:
        ValueError: terms were given, and the scheduler has no ``ᾱ_t``.
    """

    def __init__(
        self,
        scheduler: Any,
        denoiser: Denoise,
        run: Run,
        guidance: Sequence[Guidance],
        t: Tensor,
        trace_tensors: bool = False,
    ) -> None:
        at = coefficients_at(scheduler, t)
        if guidance and at is None:
            raise ValueError(f"guidance needs ᾱ_t, which {type(scheduler).__name__} does not have")
        self.scheduler, self.denoiser, self.run = scheduler, denoiser, run
        self.terms = list(guidance)
        self.steps = [(term.name, term.start(run)) for term in guidance]
        self.trace = Trace()
        self._tensors = trace_tensors
        self._columns: dict[str, Any] = {}
        self._refined, self._last = 0, (math.inf, at)  # evaluations that began no step, and where the last step began
        self._finite: list[tuple[float, Tensor, Tensor]] = []  # t, and of each image the model's output and the guided

    def prepare(
        self,
        t: Tensor,
        latents: Tensor,
        uncond: Conditioning | None,
        cond: Conditioning | None,
        prompts: Sequence[str] | None = None,
    ) -> tuple[Tensor, Conditioning | None]:
        """``latents`` and ``cond`` as the terms' ``prepare`` leaves them, one after the other.

        Args:
            t: the first timestep.
            latents: ``[n, c, h, w]`` as the scheduler keeps them.
            uncond, cond: of each image.
            prompts: of each image, where they are known.

        Raises:
            ValueError: a term that encodes other words comes after one that has changed the embeddings.
        """
        terms = [term for term in self.terms if hasattr(term, "prepare")]
        if not terms:
            return latents, cond
        scale = 1.0
        if hasattr(self.scheduler, "scale_model_input"):
            scale = float(self.scheduler.scale_model_input(torch.ones(1), t))
        at = coefficients_at(self.scheduler, t)
        assert at is not None  # the constructor saw to it
        noise = latents.float() * scale
        schedule = schedule_of(self.scheduler)
        start = Start(
            run=self.run,
            t=float(t),
            at=at,
            noise=noise,
            x_t=noise,
            uncond=uncond,
            cond=cond,
            prompts=prompts,
            denoise=self._in_eps(t, latents.dtype, at, cond),
            denoise_at=lambda s: self._in_eps(torch.tensor(s, device=t.device), latents.dtype, schedule.at(s), cond),
        )
        embedded = ""  # the term that changed embeddings last
        for term in terms:
            change = term.prepare(start)
            if change is None:
                continue
            for name, values in change.columns.items():
                self._columns[name if name not in self._columns else f"{term.name}.{name}"] = values
            if change.x_t is not None:
                latents = latents.index_put((change.rows,), (change.x_t / scale).to(latents.dtype))
                start = replace(start, x_t=start.x_t.index_put((change.rows,), change.x_t))
            if change.cond is not None:
                assert cond is not None
                cond = cond.put(change.rows, change.cond)
                if change.prompts is None:
                    embedded = term.name
                elif embedded:
                    raise ValueError(
                        f"{term.name} would put other words in the place of those that {embedded} has worked on: "
                        f"let {term.name} act first"
                    )
                start = replace(start, cond=cond, prompts=change.prompts or start.prompts)
        return latents, cond

    def correct(
        self,
        step: int,
        t: Tensor,
        x_t: Tensor,
        output_uncond: Tensor | None,
        output_cond: Tensor,
        output: Tensor,
        uncond: Conditioning | None,
        cond: Conditioning | None,
        guidance_scale: float,
    ) -> Tensor:
        """The model's output with the terms' corrections of ``ε̂``; images without one keep every bit.

        Args:
            step: of the evaluation, from 0.
            t: timestep.
            x_t: ``[n, c, h, w]``, as the model was given it.
            output_uncond, output_cond: the model's outputs; ``output_uncond`` is None without classifier-free guidance.
            output: of both, ``[n, c, h, w]``, or ``[n, 2c, h, w]`` from a model that also predicts variances.
            uncond, cond: of each image.
            guidance_scale: ``s_0``.
        """
        at = coefficients_at(self.scheduler, t)
        refines = refines_a_step(self.scheduler) or (float(t), at) == self._last
        self._refined, self._last = self._refined + refines, self._last if refines else (float(t), at)
        if at is None or (at.alpha_bar < MIN_ALPHA_BAR and not self._flow):
            return self._watched(t, output, output)
        dtype, channels, x_t = x_t.dtype, x_t.shape[1], x_t.float()

        def eps(output: Tensor) -> Tensor:
            return self._compared(output[:, :channels].float(), x_t, at)

        state = State(
            run=self.run,
            step=step,
            t=float(t),
            at=at,
            guidance_scale=guidance_scale,
            x_t=x_t,
            eps_uncond=None if output_uncond is None else eps(output_uncond),
            eps_cond=eps(output_cond),
            eps_hat=eps(output),
            uncond=uncond,
            cond=cond,
            denoise=self._in_eps(t, dtype, at, cond),
            refines=refines,
            refined=self._refined,
            space="velocity" if self._flow else "epsilon",
        )
        eps_hat, parts, columns = guide(self.steps, state)
        if self._columns:  # of the preparation: beside the first step's own
            columns, self._columns = {**self._columns, **columns}, {}
        self.trace.add(state, eps_hat, parts, columns, tensors=self._tensors)
        factor = 1.0 if self._flow else output_per_eps(self.scheduler.config.prediction_type, at)
        guided = _add(output, parts, factor, channels)
        return self._watched(t, output, guided)

    def warn_of_broken(self, prompts: Sequence[str] | None = None) -> None:
        """Name the images whose prediction was no number at some step: they come out black, and the others as ever.

        Args:
            prompts: of each image, where they are known.
        """
        if not self._finite:
            return
        times = [t for t, _, _ in self._finite]
        own, guided = (torch.stack(flags).cpu() for flags in list(zip(*self._finite, strict=True))[1:])
        for image in (~guided.all(0)).nonzero().flatten().tolist():
            first = int((~guided[:, image]).nonzero()[0])
            log.warning(
                "image %d of the batch%s: %s is not finite at t = %g, and the image is lost. Half precision overflows "
                "in some models: try bfloat16 or float32",
                image + 1,
                f" ({prompts[image]!r})" if prompts is not None else "",
                "the guided prediction" if own[first, image] else "the model's output",
                times[first],
            )

    def _watched(self, t: Tensor, output: Tensor, guided: Tensor) -> Tensor:
        """``guided``; remembers which images are numbers, before guidance and after it."""
        self._finite.append((float(t), _finite(output), _finite(guided)))
        return guided

    def _in_eps(
        self, t: Tensor, dtype: torch.dtype, at: Coefficients, own: Conditioning | None
    ) -> Callable[[Tensor, Conditioning | None, Tensor], Tensor]:
        def denoise(x_t: Tensor, conditioning: Conditioning | None, rows: Tensor) -> Tensor:
            if at.alpha_bar < MIN_ALPHA_BAR and not self._flow:
                raise ValueError("the first step of a schedule of zero terminal SNR says nothing of ε: skip it")
            if conditioning is not None and own is not None:
                conditioning = conditioning.beside(own[rows])
            output = self.denoiser(x_t.to(dtype), t, conditioning)[:, : x_t.shape[1]]
            return self._compared(output.float(), x_t, at)

        return denoise

    @property
    def _flow(self) -> bool:
        return is_flow(self.scheduler)

    def _compared(self, output: Tensor, x_t: Tensor, at: Coefficients) -> Tensor:
        """A model's output as terms see it: ``ε̂``, of flow-matching models the velocity that it is."""
        return output if self._flow else to_eps(output, x_t, at, self.scheduler.config.prediction_type)


def _finite(output: Tensor) -> Tensor:
    """``[n]`` bool: whether all of an image's numbers are."""
    return torch.isfinite(output).flatten(1).all(1)


def _add(output: Tensor, parts: dict[str, Part], factor: float, channels: int) -> Tensor:
    for part in parts.values():
        changed = output[part.rows]
        noise = (changed[:, :channels].float() + factor * part.delta).to(output.dtype)
        output = output.index_put((part.rows,), torch.cat([noise, changed[:, channels:]], 1))
    return output

