"""The value neurons of cross-attention: which there are, how active a caption makes them, and how they are blocked.

Source: Hintersdorf et al., "Finding NeMo: Localizing Neurons Responsible For Memorization in Diffusion Models"
(NeurIPS 2024), §3. A neuron is an output unit of a value projection ``attn2.to_v``; a blocked one gives 0.

    with blocked(pipe, {"mid_block.attentions.0.transformer_blocks.0.attn2.to_v": [3, 17]}):
        images = pipe(prompts).images

Layers go by name, so any UNet of diffusers with cross-attention will do. A set of neurons is a mapping from a layer's
name to the numbers of its units; where sets are computed with, it is a row of booleans over all units of all layers, in
the layers' order.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from curate.console import UserError, write_atomic
from train.components import encode_captions

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

Neurons = Mapping[str, Sequence[int]]
Mask = NDArray[np.bool_]
SUFFIX = "attn2.to_v"


def value_layers(unet: nn.Module, *, up_blocks: bool = False) -> dict[str, nn.Module]:
    """The value projections of a UNet's cross-attention, by name, in the order of the forward pass.

    Args:
        unet: any of diffusers', perhaps with adapters (peft).
        up_blocks: also those of the up blocks. NeMo leaves them out, since it found the memorizing neurons of Stable
            Diffusion 1.4 in the others.

    Raises:
        UserError: there are none, or they are fused with the keys' projections.
    """
    modules = dict(unet.named_modules())
    found = {}
    for stage in ("down_blocks.", "mid_block.", "up_blocks."):
        for name, module in modules.items():
            if not name.startswith(stage) or not (name == SUFFIX or name.endswith(f".{SUFFIX}")):
                continue
            attention = modules[name.removesuffix(".to_v")]
            if not getattr(attention, "is_cross_attention", True):
                continue
            if getattr(attention, "fused_projections", False):
                raise UserError(f"{name}: fused with the keys' projection; call unfuse_qkv_projections() first")
            if up_blocks or stage != "up_blocks.":
                found[name] = module
    if not found:
        raise UserError(f"the model has no cross-attention: no layer is called …{SUFFIX}")
    return found


def widths(layers: Mapping[str, nn.Module]) -> dict[str, int]:
    """How many neurons each layer has."""
    return {name: int(layer.out_features) for name, layer in layers.items()}  # type: ignore[arg-type]


def to_mask(neurons: Neurons, sizes: Mapping[str, int]) -> Mask:
    """A set as ``[units of all layers]`` booleans, in the order of ``sizes``.

    Raises:
        UserError: a layer or a unit does not exist in this model.
    """
    unknown = [name for name in neurons if name not in sizes]
    if unknown:
        raise UserError(f"the model has no value layer {unknown[0]}: were the neurons found in another model?")
    parts = []
    for name, size in sizes.items():
        part = np.zeros(size, bool)
        units = np.asarray(neurons.get(name, ()), np.int64)
        if units.size and (units.min() < 0 or units.max() >= size):
            raise UserError(f"{name}: has {size} neurons, no number {units.max()}: were they found in another model?")
        part[units] = True
        parts.append(part)
    return np.concatenate(parts)


def to_neurons(mask: Mask, sizes: Mapping[str, int]) -> dict[str, list[int]]:
    """The reverse of :func:`to_mask`; layers without a neuron are left out."""
    parts = np.split(mask, np.cumsum(list(sizes.values()))[:-1])
    units = {name: np.flatnonzero(part).tolist() for name, part in zip(sizes, parts, strict=True)}
    return {name: numbers for name, numbers in units.items() if numbers}


def union(sets: Iterable[Neurons]) -> dict[str, list[int]]:
    """All neurons of several sets."""
    together: dict[str, set[int]] = {}
    for neurons in sets:
        for name, units in neurons.items():
            together.setdefault(name, set()).update(units)
    return {name: sorted(units) for name, units in together.items()}


def count(neurons: Neurons) -> int:
    """How many neurons a set has."""
    return sum(len(set(units)) for units in neurons.values())


def random_neurons(neurons: Neurons, sizes: Mapping[str, int], seed: int) -> dict[str, list[int]]:
    """As many neurons of each layer, drawn from those that are not in the set while there are enough: the control."""
    rng = np.random.default_rng(seed)
    drawn = {}
    for name, units in neurons.items():
        own = np.unique(np.asarray(units, np.int64))
        chosen = rng.permutation(np.setdiff1d(np.arange(sizes[name]), own))
        if len(chosen) < len(own):
            chosen = np.concatenate([chosen, rng.permutation(own)])
        drawn[name] = sorted(chosen[: len(own)].tolist())
    return drawn


# ------------------------------------------------------------------------------------------------- activations


@torch.no_grad()
def activations(
    pipe: StableDiffusionPipeline, captions: Sequence[str], layers: Mapping[str, nn.Module], *, batch_size: int = 64
) -> NDArray[np.float32]:
    """How active each caption makes each neuron: the mean over all tokens of ``|W_V e|`` (NeMo, §3.2).

    It depends on the text embedding ``e`` alone, so no pass through the UNet is needed.

    Returns:
        ``[captions, units of all layers]``.
    """
    rows = []
    for start in range(0, len(captions), batch_size):
        e = encode_captions(pipe, captions[start : start + batch_size])
        parts = [layer(e.to(pipe.unet.dtype)).float().abs().mean(dim=1) for layer in layers.values()]
        rows.append(torch.cat(parts, dim=1).cpu().numpy())
    return np.concatenate(rows)


@dataclass(frozen=True)
class Statistics:
    """Mean and standard deviation of every neuron's activation over captions that are not memorized."""

    mean: NDArray[np.float32]
    std: NDArray[np.float32]

    @classmethod
    def of(cls, values: NDArray[np.float32]) -> Statistics:
        """Of ``[captions, units]``, two captions at least."""
        if len(values) < 2:
            raise UserError("statistics of activations need at least two clean captions; tens or more tell something")
        return cls(values.mean(axis=0), values.std(axis=0, ddof=1))

    def z(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """``|a − μ| / σ`` of ``[…, units]``: how far out of the ordinary."""
        return np.abs(values - self.mean) / np.maximum(self.std, np.finfo(np.float32).tiny ** 0.5)


# ---------------------------------------------------------------------------------------------------- blocking


@contextmanager
def gates(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Multiply the outputs of value layers by what the yielded mapping holds for them while the block lasts.

    A factor is ``[units]``, or ``[batch, 1, units]`` for another one in each row of a batch; it may carry gradients.
    Layers that the mapping lacks are left alone.
    """
    factors: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def scale(module: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
            factor = factors.get(name)
            return None if factor is None else output * factor.to(output)

        return scale

    handles = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    try:
        yield factors
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def blocked(pipe: StableDiffusionPipeline | nn.Module, neurons: Neurons) -> Iterator[None]:
    """The model with these neurons' outputs at 0, in both halves of guidance, while the block lasts.

    Blocks nest: neurons of an outer one stay blocked in an inner one. Weights are not touched, and everything is as
    before when the block ends, however it ends. With adapters (peft) on ``to_v`` it is the adapted output that is
    blocked. A UNet compiled with ``torch.compile`` has to be compiled inside the block to see it.

    Args:
        pipe: a pipeline with a ``unet``, or the UNet itself.
        neurons: layer name → numbers of its units, as from :func:`read_neurons`.

    Raises:
        UserError: the model lacks a layer or a unit.
    """
    unet: Any = getattr(pipe, "unet", pipe)
    layers = value_layers(unet, up_blocks=True)
    sizes = widths(layers)
    to_mask(neurons, sizes)
    with gates({name: layers[name] for name in neurons}) as factors:
        for name, units in neurons.items():
            factor = torch.ones(sizes[name], device=unet.device)
            factor[list(units)] = 0
            factors[name] = factor
        yield


# ----------------------------------------------------------------------------------- blocking in the weights


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
    layers = value_layers(getattr(pipe, "unet", pipe), up_blocks=True)
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


# -------------------------------------------------------------------------------------------------------- file


def read_neurons(path: str | Path) -> tuple[dict[str, list[int]], dict[str, dict[str, list[int]]]]:
    """The neurons in a file of ``train localize``, or in one made by hand.

    The latter is ``{"neurons": {"<name of an attn2.to_v>": [units]}}``.

    Returns:
        All of them together, and each caption's own, which a file by hand need not have.

    Raises:
        UserError: the file is missing, or holds no neurons.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; train localize writes one") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    try:
        if content.get("unfinished"):
            raise UserError(f"{path}: train localize was stopped; run it again, it goes on")
        own = {row["caption"]: _checked(row["neurons"]) for row in content.get("prompts", ())}
        return _checked(content["neurons"]), own
    except (KeyError, TypeError, AttributeError, ValueError):
        raise UserError(f"{path}: not a file of neurons, as train localize writes it") from None


def _checked(neurons: Any) -> dict[str, list[int]]:
    return {str(name): [int(unit) for unit in units] for name, units in neurons.items()}
