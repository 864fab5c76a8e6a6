"""Noise schedules: the signal and noise coefficients at t, noising, targets, and DDIM's step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from train.denoising.coefficients import Coefficients
from train.denoising.predictions import Prediction, check_space


class NoiseSchedule:
    """The forward process of a model that is defined by betas, whatever sampler it comes with, and DDIM's way back.

    Args:
        scheduler: of the pipeline; its betas, rescaling and prediction type count, its kind does not.
        device: of :attr:`alpha_bar`.

    Attributes:
        timesteps: how many the model was trained with.
        space: what the model predicts: epsilon, v_prediction or sample.
        alpha_bar: ``[timesteps]`` float32, ``ᾱ``.
        init_sigma: what the first noise is multiplied by.
    """

    def __init__(self, scheduler: Any, device: torch.device | str = "cpu") -> None:
        from diffusers import DDIMScheduler

        # DDIM's reading of the config: others' tables may be in other units, or missing.
        self._ddim: Any = DDIMScheduler.from_config(scheduler.config)
        self.timesteps = int(self._ddim.config.num_train_timesteps)
        self.space: str = check_space(self._ddim.config.prediction_type)
        self.init_sigma = float(self._ddim.init_noise_sigma)
        self.alpha_bar: Tensor = self._ddim.alphas_cumprod.to(device)
        self._numbers: list[float] = self._ddim.alphas_cumprod.tolist()

    def steps(self, num_inference_steps: int) -> list[int]:
        """The timesteps of a DDIM trajectory, from noise to image."""
        self._ddim.set_timesteps(num_inference_steps)
        return self._ddim.timesteps.tolist()

    def at(self, t: int | Tensor) -> Coefficients:
        """The coefficients at a timestep, as numbers; of timesteps ``[n]``, as ``[n, 1, 1, 1]``."""
        if isinstance(t, Tensor) and t.ndim:
            return Coefficients.of_alpha_bar(self._table(t.device)[t].view(-1, 1, 1, 1))
        return Coefficients.of_alpha_bar(self._numbers[int(t)])

    def snr(self, t: Tensor) -> Tensor:
        """Signal to noise, ``ᾱ_t / (1−ᾱ_t)``, of timesteps ``[n]``."""
        alpha_bar = self._table(t.device)[t]
        return alpha_bar / (1 - alpha_bar)

    def _table(self, device: torch.device) -> Tensor:
        """``ᾱ`` where the timesteps are."""
        if self.alpha_bar.device != device:
            self.alpha_bar = self.alpha_bar.to(device)
        return self.alpha_bar

    def noised(self, x_0: Tensor, eps: Tensor, t: int | Tensor) -> Tensor:
        """``x_t`` of ``x_0`` and ``ε``, ``[n, c, h, w]`` each."""
        at = self.at(t)
        return at.signal * x_0 + at.noise * eps

    def target(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What the model's output is compared with in training: ``ε``, or ``v = √ᾱ_t ε − √(1−ᾱ_t) x_0``, or ``x_0``."""
        if self.space == "epsilon":
            return eps
        if self.space == "sample":
            return x_0
        at = self.at(t)
        return at.signal * eps - at.noise * x_0

    def prediction(self, output: Tensor, x_t: Tensor, t: int | Tensor) -> Prediction:
        """The model's output ``[n, c, h, w]`` for ``x_t`` at ``t``, in every space."""
        return Prediction(output, x_t, self.at(t), self.space)

    def step(self, prediction: Prediction, following: int) -> Tensor:
        """DDIM (Song et al., 2021, eq. 12 with σ = 0): ``x_s = √ᾱ_s x̂_0 + √(1−ᾱ_s) ε̂``, not clipped.

        Args:
            prediction: at the step before, of the guided output.
            following: the timestep ``s``.
        """
        at = self.at(following)
        return at.signal * prediction.x0 + at.noise * prediction.eps


class FlowSchedule(NoiseSchedule):
    """The forward process of flow matching, ``x_t = (1−σ) x_0 + σ ε`` (Lipman et al., ICLR 2023; Esser et al., ICML
    2024).

    A timestep is its share of noise in thousandths, ``t = 1000 σ``, as the networks take it, and need not be whole.
    Where samplers and training crowd the noise levels (the schedule's *shift*) is a matter of which timesteps are
    taken.

    Args:
        scheduler: of the pipeline; its shift counts, its kind does not.
        device: of nothing: kept for the same call.
        tokens: patches of an image, which a shift by resolution (``use_dynamic_shifting``) follows.
        evenly: σ before the shift falls evenly from 1 to 1/steps (FLUX's pipeline) rather than to 1/1000.
    """

    def __init__(
        self, scheduler: Any, device: torch.device | str = "cpu", *, tokens: int = 4096, evenly: bool = False
    ) -> None:
        from diffusers import FlowMatchEulerDiscreteScheduler

        self._euler: Any = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)
        self.timesteps = int(self._euler.config.num_train_timesteps)
        self.space, self.init_sigma = "velocity", 1.0
        self.sigmas: Tensor = self._euler.sigmas[: self.timesteps].clone()
        """``[timesteps]`` float32, the noise levels that training draws from, from 1 down."""
        self._tokens, self._evenly = tokens, evenly

    def steps(self, num_inference_steps: int) -> list[Any]:
        """The timesteps of an Euler trajectory, from noise to image."""
        how: dict[str, Any] = {"num_inference_steps": num_inference_steps}
        if self._evenly:
            how = {"sigmas": torch.linspace(1.0, 1 / num_inference_steps, num_inference_steps).tolist()}
        if (config := self._euler.config).use_dynamic_shifting:
            slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
            how["mu"] = config.base_shift + slope * (self._tokens - config.base_image_seq_len)
        self._euler.set_timesteps(**how)
        return self._euler.timesteps.tolist()

    def at(self, t: Any) -> Coefficients:
        """``1−σ`` and ``σ``; of timesteps ``[n]``, as ``[n, 1, 1, 1]``."""
        sigma = t.view(-1, 1, 1, 1) / self.timesteps if isinstance(t, Tensor) and t.ndim else float(t) / self.timesteps
        return Coefficients(1 - sigma, sigma)

    def snr(self, t: Tensor) -> Tensor:
        """``((1−σ) / σ)²`` of timesteps ``[n]``."""
        sigma = t / self.timesteps
        return ((1 - sigma) / sigma) ** 2

    def target(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """``u = ε − x_0``."""
        return eps - x_0


def is_flow(scheduler: Any) -> bool:
    """Whether a sampler is one of flow matching."""
    return "FlowMatch" in type(scheduler).__name__ or bool(getattr(scheduler.config, "use_flow_sigmas", False))


def schedule_of(scheduler: Any, device: torch.device | str = "cpu", **flow: Any) -> NoiseSchedule:
    """The forward process that a pipeline's scheduler is for; ``flow`` are options of :class:`FlowSchedule`."""
    return FlowSchedule(scheduler, device, **flow) if is_flow(scheduler) else NoiseSchedule(scheduler, device)


def refines_a_step(scheduler: Any) -> bool:
    """Whether the evaluation that a sampler is about to use refines a step that an earlier one began, rather than
    beginning its own: the second of Heun's and of DPM-Solver-2's, PNDM's repetition of its first step, the inner three
    of its Runge–Kutta steps. Its ``x_t`` is no point of the trajectory.
    """
    if hasattr(scheduler, "prk_timesteps"):  # PNDM
        if not scheduler.config.skip_prk_steps and scheduler.counter < len(scheduler.prk_timesteps):
            return scheduler.counter % 4 != 0
        return bool(scheduler.config.skip_prk_steps) and scheduler.counter == 1
    return not getattr(scheduler, "state_in_first_order", True)


def coefficients_at(scheduler: Any, t: Tensor | float) -> Coefficients | None:
    """The coefficients at the step that a sampler is about to take, of the ``x_t`` that the model is given: variance
    preserving, or flow matching's; None for schedulers that are neither.

    Schedulers that work in ``σ`` know it better than ``t`` does (Karras spacing rounds ``t``): ``ᾱ =
    1/(1+σ²)``. Call it after ``scale_model_input``.
    """
    flow = is_flow(scheduler)
    if not flow and not hasattr(scheduler, "alphas_cumprod"):
        return None
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is not None:
        index = scheduler.step_index
        if index is None:
            index = scheduler.index_for_timestep(t)
        if flow:
            sigma = float(sigmas[int(index)])
            return Coefficients(1 - sigma, sigma)
        if not getattr(scheduler, "state_in_first_order", True) and hasattr(scheduler, "sigmas_interpol"):
            sigmas = scheduler.sigmas_interpol
        return Coefficients.of_alpha_bar(1.0 / (1.0 + float(sigmas[int(index)]) ** 2))
    table = scheduler.alphas_cumprod
    position = min(max(float(t), 0.0), len(table) - 1.0)
    low = int(position)
    if low == position:
        return Coefficients.of_alpha_bar(float(table[low]))
    return Coefficients.of_alpha_bar(float(torch.lerp(table[low], table[low + 1], position - low)))
