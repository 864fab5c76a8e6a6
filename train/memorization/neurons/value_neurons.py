"""The value neurons of cross-attention: which there are, and how active a caption makes them.

Source: Hintersdorf et al., "Finding NeMo: Localizing Neurons Responsible For Memorization in Diffusion Models"
(NeurIPS 2024), §3. A neuron is an output unit of a value projection ``attn2.to_v``; a blocked one gives 0.

Joint attention has no cross-attention. What text gives to the image there is the value projection of the text's stream,
``add_v_proj``, and its output units are the neurons: this is ours, not the paper's. What such a layer is given has been
through the blocks before, so activations are those of a pass from one noise at the first step.

Layers go by name, so any UNet of diffusers with cross-attention will do. A set of neurons is a mapping from a layer's
name to the numbers of its units; where sets are computed with, it is a row of booleans over all units of all layers, in
the layers' order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from afresh.errors import UserError
from train.denoising.families.registry import denoiser_of

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

    from train.denoising.conditioning import Conditioning
    from train.denoising.protocol import Denoiser


Neurons = Mapping[str, Sequence[int]]
Mask = NDArray[np.bool_]
SUFFIX, JOINT = "attn2.to_v", "add_v_proj"


def value_layers(unet: nn.Module, *, up_blocks: bool = False) -> dict[str, nn.Module]:
    """The value projections of a UNet's cross-attention, or of the text's stream of a transformer with joint attention,
    by name, in the order of the forward pass.

    Args:
        unet: any of diffusers', or a transformer, perhaps with adapters (peft).
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
    found = found or {name: module for name, module in modules.items() if name.endswith(f".{JOINT}")}
    if not found:
        raise UserError(f"the model has no cross-attention: no layer is called …{SUFFIX}, nor …{JOINT}")
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


@torch.no_grad()
def activations(
    pipe: StableDiffusionPipeline, captions: Sequence[str], layers: Mapping[str, nn.Module], *, batch_size: int = 64
) -> NDArray[np.float32]:
    """How active each caption makes each neuron: the mean over all tokens of ``|W_V e|`` (NeMo, §3.2).

    It depends on the text embedding ``e`` alone, so no pass through a UNet is needed. Of joint attention ``e`` is what
    the layer is given at the first step, from the noise of seed 0.

    Returns:
        ``[captions, units of all layers]``.
    """
    rows, denoiser = [], denoiser_of(pipe)
    for start in range(0, len(captions), batch_size):
        cond = denoiser.encode(captions[start : start + batch_size]).to(dtype=denoiser.dtype)
        if all(name.endswith(SUFFIX) for name in layers):
            parts = [layer(cond.embeds).float().abs().mean(dim=1) for layer in layers.values()]
        else:
            parts = _in_a_pass(denoiser, cond, layers)
        rows.append(torch.cat(parts, dim=1).cpu().numpy())
    return np.concatenate(rows)


def _in_a_pass(denoiser: Denoiser, cond: Conditioning, layers: Mapping[str, nn.Module]) -> list[Tensor]:
    """The same of joint attention: ``[captions, units]`` of each layer, at the first step from one noise."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            seen[name] = output.float().abs().mean(dim=1)

        return hook

    hooks = [layer.register_forward_hook(keep(name)) for name, layer in layers.items()]
    try:
        x_T = denoiser.noise([0]).expand(len(cond), -1, -1, -1)
        denoiser(x_T, denoiser.schedule.steps(50)[0], cond)
    finally:
        for handle in hooks:
            handle.remove()
    return [seen[name] for name in layers]


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

