"""Noise schedules: the signal and noise coefficients at t, and DDIM's step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def alpha_bar_at(scheduler: Any, t: Tensor | float) -> float | None:
    """``ᾱ_t`` at the step that ``scheduler`` is about to take; None for flow-matching schedulers, which have
    none.

    Schedulers that work in ``σ`` know it better than ``t`` does (Karras spacing rounds ``t``): ``ᾱ =
    1/(1+σ²)``. Call it after ``scale_model_input``.
    """
    if getattr(scheduler.config, "use_flow_sigmas", False) or not hasattr(scheduler, "alphas_cumprod"):
        return None
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is not None:
        index = scheduler.step_index
        if index is None:
            index = scheduler.index_for_timestep(t)
        if not getattr(scheduler, "state_in_first_order", True) and hasattr(scheduler, "sigmas_interpol"):
            sigmas = scheduler.sigmas_interpol
        return 1.0 / (1.0 + float(sigmas[int(index)]) ** 2)
    table = scheduler.alphas_cumprod
    position = min(max(float(t), 0.0), len(table) - 1.0)
    low = int(position)
    if low == position:
        return float(table[low])
    return float(torch.lerp(table[low], table[low + 1], position - low))

