"""The trace: what happened to each image at each step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from train.memorization.signals.magnitude import magnitude
from train.sampling.guidance import Part, State


class Trace:
    """Collects what happened, step by step, without waiting for the accelerator until it is read."""

    def __init__(self) -> None:
        self._steps: list[tuple[dict[str, Any], dict[str, Any], dict[str, Tensor]]] = []

    def add(
        self,
        state: State,
        eps_hat: Tensor,
        parts: Mapping[str, Part],
        columns: Mapping[str, Sequence[Any] | Tensor],
        *,
        tensors: bool = False,
    ) -> None:
        """Record one step.

        Args:
            state: what the first term saw.
            eps_hat: what the last term left.
            parts: the addends of ``ε̂``.
            columns: the terms' columns.
            tensors: also keep the tensors from which ``ε̂`` can be recomputed.
        """
        m: Sequence[None] | Tensor = [None] * state.run.batch_size
        if state.eps_uncond is not None:
            m = magnitude(state.eps_cond, state.eps_uncond)
            columns = {"scale": state.scale, **columns}
        kept: dict[str, Any] = {"magnitude": m, **columns}
        if tensors:
            kept.update(x_t=state.x_t.cpu(), eps_cond=state.eps_cond.cpu(), eps_hat=eps_hat.cpu())
            if state.eps_uncond is not None:
                kept["eps_uncond"] = state.eps_uncond.cpu()
            for name, part in parts.items():
                kept[f"delta.{name}"] = torch.zeros_like(state.x_t).index_put((part.rows,), part.delta).cpu()
        common = {"step": state.step, "number": state.number, "t": state.t, "alpha_bar": state.alpha_bar}
        self._steps.append((common, kept, {name: part.rows for name, part in parts.items()}))

    def rows(self) -> list[dict[str, Any]]:
        """One dict a step and image, in that order, of plain Python values (and tensors, if asked for)."""
        out = []
        for common, columns, fired in self._steps:
            lists = {
                name: values.tolist() if isinstance(values, Tensor) and values.ndim == 1 else values
                for name, values in columns.items()
            }
            acted = {name: set(rows.tolist()) for name, rows in fired.items()}
            for image in range(len(lists["magnitude"])):
                row = {"image": image, **common}
                row.update((name, values[image]) for name, values in lists.items())
                row["fired"] = [name for name, images in acted.items() if image in images]
                out.append(row)
        return out

