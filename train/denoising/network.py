"""A network at work: where it runs, wherever its weights are kept, and without gradients of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

FLOAT16_GAIN = 1024.0
"""Factor on what is differentiated through a float16 model, whose gradients would vanish among its small numbers."""


def network_of(pipe: Any) -> Any:
    """A pipeline's denoising network, or the network itself."""
    return getattr(pipe, "unet", None) or getattr(pipe, "transformer", None) or pipe


def running_device(network: Any) -> torch.device:
    """Where a network's inputs are wanted. With CPU offload its weights lie elsewhere, or nowhere (``meta``)."""
    modules = network.modules() if isinstance(network, torch.nn.Module) else ()
    for module in modules:
        device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    return network.device


@contextlib.contextmanager
def gained(network: torch.nn.Module, gain: torch.Tensor) -> Iterator[None]:
    """The network with each token's cross-attention logits multiplied by a factor while the block runs.

    A logit is linear in its token's key, so it is the keys that are multiplied: whatever computes the attention.

    Args:
        network: a UNet of diffusers.
        gain: ``[n, tokens]``, of the images of a forward pass; a smaller pass is one of the last of them.

    Raises:
        ValueError: it has no cross-attention.
    """
    layers = [module for name, module in network.named_modules() if name.endswith("attn2.to_k")]
    if not layers:
        raise ValueError(f"{type(network).__name__} has no cross-attention (attn2), whose logits could be changed")

    def scale(layer: torch.nn.Module, given: Any, keys: torch.Tensor) -> torch.Tensor:
        return keys * gain[-len(keys) :].unsqueeze(-1).to(keys)

    hooks = [layer.register_forward_hook(scale) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def frozen(network: Any, *, checkpointing: bool = False) -> Iterator[None]:
    """The network without gradients of its weights while the block runs, so that those of its inputs cost less memory.

    Args:
        network: left as it was when the block ends.
        checkpointing: compute activations again in the backward pass instead of keeping them: about a third more time
            for a fraction of the memory.
    """
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    switch = checkpointing and not network.is_gradient_checkpointing
    for parameter in parameters:
        parameter.requires_grad_(False)
    if switch:
        network.enable_gradient_checkpointing()
    try:
        yield
    finally:
        if switch:
            network.disable_gradient_checkpointing()
        for parameter in parameters:
            parameter.requires_grad_(True)
