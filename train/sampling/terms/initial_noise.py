"""Initial-noise adjustment: change the noise that an image starts from, and not its prompt.

Source: Han et al., "Adjusting Initial Noise to Mitigate Memorization in Text-to-Image Diffusion Models" (NeurIPS 2025,
arXiv 2510.08625). With ``ε̃(x) = ε(x, e_p) − ε(x, e_∅)`` at the first timestep:

- *batch-wise*, without gradients, ``iterations`` times: ``δ = ρ ε̃(x)/‖ε̃(x)‖₂; x ← x − γ (ε̃(x + δ) − ε̃(x))``, a
  sharpness-aware step; then no classifier-free guidance for the first steps;
- *per sample*: ``‖ε̃(x)‖₂`` is minimised by AdamW until it is at most a target.

In the released code both work on one image at a time; "batch-wise" is the paper's word for how ``ρ``, ``γ`` and the
delay are chosen, for all images alike.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from train.memorization.signals.magnitude import magnitude
from train.sampling.config import NoiseConfig, configured, number
from train.sampling.descent import descend
from train.sampling.guidance import Change, Correction, Part, Run, Start, State, StepFunction


class NoiseAdjustment:
    """A guidance term; see the module.

    The trace of the first step gets ``noise_magnitude`` and ``noise_magnitude_after``. In the per-sample form images at
    or below the target keep every bit.

    Args:
        config: settings.
        overrides: fields of :class:`NoiseConfig` to set otherwise.
    """

    name = "noise"

    def __init__(self, config: NoiseConfig | None = None, **overrides: Any) -> None:
        self.config = configured(NoiseConfig, config, overrides)

    def start(self, run: Run) -> StepFunction:
        """After the batch-wise form, the first ``delay`` steps go without the prompt."""
        delay = self.config.delay if self.config.method == "batch" else 0

        def step(state: State) -> Correction | None:
            if state.number >= delay or state.eps_uncond is None:
                return None
            rows = torch.arange(run.batch_size, device=state.x_t.device)
            delta = -state.scale.view(-1, 1, 1, 1) * (state.eps_cond - state.eps_uncond)
            return Correction({"delay": Part(rows, delta, -state.scale)})

        return step

    def prepare(self, start: Start) -> Change | None:
        """New noise.

        Raises:
            ValueError: there is no classifier-free guidance.
        """
        c = self.config
        if start.uncond is None or start.cond is None:
            raise ValueError("noise adjustment needs a prompt and classifier-free guidance")
        adjust = adjusted_without_gradients if c.method == "batch" else adjusted
        rows = torch.arange(start.run.batch_size, device=start.x_t.device)
        found = [adjust(start, chunk, c) for chunk in rows.split(c.slice)]
        x_t, before, after = (torch.cat(columns) for columns in zip(*found, strict=True))
        acts = (x_t != start.x_t).flatten(1).any(1)
        columns = {"noise_magnitude": before, "noise_magnitude_after": after}
        return Change(rows[acts], x_t=x_t[acts], columns=columns)


def text_direction(start: Start, x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """``ε(x, e_p)`` and ``ε(x, e_∅)`` of the images ``rows``."""
    assert start.uncond is not None and start.cond is not None
    cond, uncond = start.cond[rows].clone(), start.uncond[rows].clone()
    return start.denoise(x, cond, rows), start.denoise(x, uncond, rows)


def adjusted_without_gradients(start: Start, rows: Tensor, c: NoiseConfig) -> tuple[Tensor, Tensor, Tensor]:
    """The batch-wise form: ``x_T`` of the images ``rows``, ``m`` before and after."""
    x = start.x_t[rows]
    before = None
    for _ in range(c.iterations):
        cond, uncond = text_direction(start, x, rows)
        m = magnitude(cond, uncond)
        before = magnitude(cond, uncond, form=c.form) if before is None else before
        delta = c.rho * (cond - uncond) / m.clamp_min(1e-12).view(-1, 1, 1, 1)
        cond_there, uncond_there = text_direction(start, x + delta, rows)
        x = x - c.gamma * ((cond_there - uncond_there) - (cond - uncond))
    after = magnitude(*text_direction(start, x, rows), form=c.form)
    return x, after if before is None else before, after


def adjusted(start: Start, rows: Tensor, c: NoiseConfig) -> tuple[Tensor, Tensor, Tensor]:
    """The per-sample form: ``x_T`` of the images ``rows``, ``m`` before and after."""
    with torch.inference_mode(False), torch.enable_grad():
        x = start.x_t[rows].clone().requires_grad_()

        def m(x: Tensor) -> Tensor:
            return magnitude(*text_direction(start, x, rows), form=c.form)

        x, before, after, _ = descend(m, x, number("noise.target", c.target), c.steps, c.lr)
    return x, before, after

