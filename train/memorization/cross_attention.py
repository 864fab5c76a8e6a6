"""Cross-attention maps of a UNet while it runs, without changing what it computes.

Layers are found by the name that diffusers gives the second attention of every transformer block, ``attn2``: whatever
the blocks, their number and their widths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from afresh.errors import UserError

if TYPE_CHECKING:
    from diffusers.models.attention_processor import Attention


def cross_attention_layers(unet: torch.nn.Module) -> dict[str, Attention]:
    """Name → layer, as in ``down_blocks.1.attentions.0.transformer_blocks.0.attn2``, in the order of the modules.

    Raises:
        UserError: there is none.
    """
    layers: dict[str, Any] = {
        name: module for name, module in unet.named_modules() if name.rpartition(".")[2] == "attn2"
    }
    if not layers:
        raise UserError(f"{type(unet).__name__} has no cross-attention layer (attn2): its attention cannot be seen")
    return layers


def finest_down_layers(layers: Mapping[str, Tensor]) -> Tensor:
    """The mean of the maps ``[n, latents, tokens]`` of those layers of the down blocks that have the most latents.

    Args:
        layers: name → map.

    Raises:
        UserError: there is none.
    """
    down = [maps for name, maps in layers.items() if name.startswith("down_blocks.")]
    if not down:
        raise UserError("the UNet has no cross-attention in its down blocks, from which the mask is taken")
    latents = max(maps.shape[1] for maps in down)
    return torch.stack([maps for maps in down if maps.shape[1] == latents]).mean(dim=0)


def end_share(end: Tensor) -> Callable[[Tensor], Tensor]:
    """A ``reduce`` of :func:`recorded_attention`: the attention to the end token, ``[n, latents, 1]``.

    Args:
        end: ``[n]`` where each prompt's end token stands.
    """
    return lambda maps: maps.mean(1).gather(2, end.to(maps.device).view(-1, 1, 1).expand(-1, maps.shape[2], 1))


def as_map(attention: Tensor, sides: Sequence[int]) -> Tensor:
    """A layer's attention to one token, ``[n, latents, 1]``, as ``[n, h, w]``.

    Args:
        attention: of the layer.
        sides: height and width of the latents that the UNet is given; a layer's are a share of them.
    """
    shrunk = (sides[0] * sides[1] / attention.shape[1]) ** 0.5
    return attention.squeeze(2).unflatten(1, (round(sides[0] / shrunk), round(sides[1] / shrunk)))


@dataclass
class AttentionMaps:
    """What :func:`recorded_attention` fills."""

    on: bool
    """Whether forward passes are recorded."""
    layers: dict[str, Tensor] = field(default_factory=dict)
    """Layer → its reduced maps in the newest forward pass."""


@torch.no_grad()
def attention_probabilities(attn: Attention, hidden: Tensor, text: Tensor) -> Tensor:
    """``softmax(q kᵀ / √d)`` of a cross-attention layer.

    Args:
        attn: the layer.
        hidden: ``[n, latents, channels]`` what it is given.
        text: ``[n, tokens, width]`` prompt embeddings.

    Returns:
        ``[n, heads, latents, tokens]`` float32.
    """
    if attn.norm_cross:
        text = attn.norm_encoder_hidden_states(text)
    query = attn.to_q(hidden).unflatten(-1, (attn.heads, -1)).transpose(1, 2).float()
    key = attn.to_k(text).unflatten(-1, (attn.heads, -1)).transpose(1, 2).float()
    return (query @ key.transpose(-1, -2) * attn.scale).softmax(dim=-1)


@contextmanager
def recorded_attention(
    unet: torch.nn.Module, images: int, reduce: Callable[[Tensor], Tensor], *, on: bool = True
) -> Iterator[AttentionMaps]:
    """Record the cross-attention of forward passes inside the block.

    Hooks look at what each layer is given and compute the maps beside it, so the layers' own processors stay: the
    output keeps every bit, and those that never form the maps (xFormers, fused kernels) can be looked at too.

    Args:
        unet: any UNet of diffusers with cross-attention.
        images: rows of a batch to look at, from its end: with classifier-free guidance the second half is that of the
            prompts.
        reduce: ``[images, heads, latents, tokens]`` → what is kept of a layer.
        on: record from the beginning; otherwise from when ``.on`` is set.

    Raises:
        UserError: the UNet has no cross-attention.
    """
    layers = cross_attention_layers(unet)
    maps = AttentionMaps(on)

    def look(name: str) -> Callable[..., None]:
        def hook(layer: Attention, args: tuple[Any, ...], given: dict[str, Any]) -> None:
            if maps.on:
                hidden, text = args[0] if args else given["hidden_states"], given["encoder_hidden_states"]
                maps.layers[name] = reduce(attention_probabilities(layer, hidden[-images:], text[-images:]))

        return hook

    hooks = [layer.register_forward_pre_hook(look(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        yield maps
    finally:
        for hook in hooks:
            hook.remove()

