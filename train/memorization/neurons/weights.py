"""Neurons blocked in the weights: rows of value projections at zero, and put back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from afresh.errors import UserError
from afresh.files import write_atomic
from train.denoising.network import network_of
from train.memorization.neurons.value_neurons import Neurons, to_mask, value_layers, widths

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline


@torch.no_grad()
def zero_rows(pipe: StableDiffusionPipeline | nn.Module, neurons: Neurons) -> dict[str, Tensor]:
    """Block neurons for good: set their rows of ``to_v`` to 0, in place. The pipeline stays an ordinary one.

    Returns:
        What :func:`restore_rows` takes to undo it: by layer ``NAME.units [n]`` int64 and the rows that stood there,
        ``NAME.weight [n, width]`` and, where the layer has one, ``NAME.bias [n]``, on the CPU.

    Raises:
        UserError: the model lacks a layer or a unit, or a layer has adapters, which would add to the zero rows.
    """
    layers = _editable(pipe, neurons)
    rows: dict[str, Tensor] = {}
    for name, units in neurons.items():
        index = torch.tensor(sorted(set(units)), dtype=torch.int64)
        rows[f"{name}.units"] = index
        for part in ("weight", "bias"):
            parameter = getattr(layers[name], part, None)
            if parameter is not None:
                rows[f"{name}.{part}"] = parameter[index].cpu().clone()
                parameter[index] = 0
    return rows


@torch.no_grad()
def restore_rows(pipe: StableDiffusionPipeline | nn.Module, rows: Mapping[str, Tensor]) -> None:
    """Undo :func:`zero_rows`, in place: bit for bit the weights from before.

    Raises:
        UserError: the rows are not zero, so it is not the model they were taken from, or it was trained since.
    """
    neurons = {name.removesuffix(".units"): units.tolist() for name, units in rows.items() if name.endswith(".units")}
    layers = _editable(pipe, neurons)
    for name, units in neurons.items():
        for part in ("weight", "bias"):
            if f"{name}.{part}" in rows and getattr(layers[name], part)[units].any():
                raise UserError(f"{name}: the rows to restore are not zero: this is another model, or was trained on")
    for name, units in neurons.items():
        for part in ("weight", "bias"):
            if f"{name}.{part}" in rows:
                parameter = getattr(layers[name], part)
                parameter[units] = rows[f"{name}.{part}"].to(parameter)


def _editable(pipe: StableDiffusionPipeline | nn.Module, neurons: Neurons) -> dict[str, nn.Module]:
    layers = value_layers(network_of(pipe), up_blocks=True)
    to_mask(neurons, widths(layers))
    for name in neurons:
        if hasattr(layers[name], "base_layer"):
            raise UserError(f"{name}: has adapters (LoRA), which a zero row does not block: fuse them first")
    return layers


def save_rows(path: str | Path, rows: Mapping[str, Tensor]) -> None:
    """Write what :func:`zero_rows` returned, as safetensors."""
    from safetensors.torch import save_file

    with write_atomic(path) as temporary:
        save_file(dict(rows), temporary)


def load_rows(path: str | Path) -> dict[str, Tensor]:
    """Read what :func:`save_rows` wrote.

    Raises:
        UserError: the file is missing or not whole.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not a readable file of rows: {error}") from None

