"""Neurons blocked while a model runs: their outputs at 0, in both halves of guidance.

In use::

    with blocked(pipe, {"mid_block.attentions.0.transformer_blocks.0.attn2.to_v": [3, 17]}):
        images = pipe(prompts).images
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from train.denoising.network import network_of, running_device
from train.memorization.neurons.value_neurons import Neurons, to_mask, value_layers, widths

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline


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
        neurons: layer name → numbers of its units, as from :func:`~train.memorization.neurons.files.read_neurons`.

    Raises:
        UserError: the model lacks a layer or a unit.
    """
    network = network_of(pipe)
    layers = value_layers(network, up_blocks=True)
    sizes = widths(layers)
    to_mask(neurons, sizes)
    with gates({name: layers[name] for name in neurons}) as factors:
        for name, units in neurons.items():
            factor = torch.ones(sizes[name], device=running_device(network))
            factor[list(units)] = 0
            factors[name] = factor
        yield

