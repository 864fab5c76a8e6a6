"""Leaving the attraction basin: no classifier-free guidance, or that of the opposite sign, until a transition point.

Source: Jain et al., "Classifier-Free Guidance inside the Attraction Basin May Cause Memorization" (CVPR 2025, arXiv
2411.16738). With ``m_i = ‖ε(x_t, e_p) − ε(x_t, e_∅)‖₂`` at step i, the *dynamic transition point* is the first local
minimum of ``m`` over the steps; it shows one step later, and from there on guidance is as usual. The *static* one is a
timestep. An evaluation that refines a step (of Heun's method, say) or repeats a timestep is no step: its magnitude is
compared with none, and it is guided as its step is.

Before it the guidance scale is ``before``: 0 draws without the prompt, 1 with the prompt but without guidance (what the
released script of the dynamic point does), a negative one is *opposite guidance*. The released script of opposite
guidance looks for the minimum in a pass of its own; here it is found along the way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from train.memorization.signals.magnitude import magnitude
from train.sampling.config import BasinConfig, configured, number
from train.sampling.guidance import Correction, Part, Run, State, StepFunction


class AttractionBasin:
    """A guidance term; see the module. Each image has its own transition point.

    The trace gets ``inside``: whether the image was still held to be inside the basin.

    Args:
        config: settings.
        overrides: fields of :class:`BasinConfig` to set otherwise.
    """

    name = "basin"

    def __init__(self, config: BasinConfig | None = None, **overrides: Any) -> None:
        self.config = configured(BasinConfig, config, overrides)

    def start(self, run: Run) -> StepFunction:
        """Begin one run; see :class:`~train.sampling.guidance.Guidance`."""
        c = self.config
        least = number("basin.least", c.least)
        seen: list[Tensor] = []
        outside = torch.zeros(run.batch_size, dtype=torch.bool)

        def step(state: State) -> Correction:
            nonlocal outside
            if state.eps_uncond is None:
                raise ValueError("the attraction basin is one of classifier-free guidance: raise the scale above 1")
            outside = outside.to(state.x_t.device)
            if state.refines:
                pass  # as its step began
            elif c.until is not None:
                outside = torch.full_like(outside, state.t * 1000 / run.train_timesteps < c.until)
            else:
                seen.append(magnitude(state.eps_cond, state.eps_uncond))
                if len(seen) == 1:  # a prompt of little weight is in no basin
                    outside = outside | (magnitude(state.eps_cond, state.eps_uncond, form=c.form) < least)
                outside = outside | local_minimum(seen[-3:])
            rows = (~outside).nonzero().flatten()
            change = c.before - state.scale[rows]  # to that scale, whatever terms before this one left
            delta = change.view(-1, 1, 1, 1) * (state.eps_cond[rows] - state.eps_uncond[rows])
            return Correction({"basin": Part(rows, delta, change)}, {"inside": ~outside})

        return step


def local_minimum(values: list[Tensor]) -> Tensor:
    """``[n]`` bool: whether the last but one of three values is less than both its neighbours; False of fewer."""
    if len(values) < 3:
        return torch.zeros_like(values[-1], dtype=torch.bool)
    before, here, after = values
    return (here < before) & (here < after)

