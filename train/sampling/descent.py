"""AdamW on each image's own loss until it is low enough."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def descend(m: Any, x: Tensor, target: float, steps: int, lr: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """AdamW on each image's own ``m(x)`` until it is at most ``target``.

    AdamW works element by element, so a sum of the images' losses is as many optimizers, one an image.

    Args:
        m: ``x [k, …] → [k]``.
        x: ``[k, …]`` float32 that requires grad.
        target, steps, lr: when to stop, the most steps, the learning rate.

    Returns:
        ``x`` when each image stopped, ``m`` of it before and after, and the steps taken ``[k]`` int64.
    """
    optimizer = torch.optim.AdamW([x], lr=lr)
    taken = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    result, before, after = x.detach().clone(), torch.zeros(len(x)), torch.zeros(len(x))
    active = torch.ones(len(x), dtype=torch.bool, device=x.device)
    for step in range(steps + 1):
        values = m(x)
        now = values.detach()
        if step == 0:
            before, after = now, now.clone()
        # An image whose loss is no number goes back to where it last was one.
        active = active & torch.isfinite(now)
        result[active], after[active], taken[active] = x.detach()[active], now[active], step
        active = active & (now > target)
        if step == steps or not active.any():
            break
        optimizer.zero_grad()
        values[active].sum().backward()
        optimizer.step()
    return result, before, after, taken

