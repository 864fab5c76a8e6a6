"""How fast the network computes what it computes: TF32, the order of its weights in memory, compilation.

None of these changes what is drawn at random or which samples a step takes; sums come out rounded otherwise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from train.finetune.config import FinetuneConfig


def set_products(tf32: bool) -> None:
    """Let NVIDIA's GPUs (since Ampere) take the products of float32 numbers in TF32, or forbid it; for the process."""
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32


def wants_channels_last(config: FinetuneConfig, device: torch.device) -> bool:
    """Whether the weights of convolutions are kept with their channels last: where tensor cores take them so.

    Args:
        config: of the run; its ``mixed_precision`` is resolved.
        device: that it trains on.
    """
    if config.channels_last is not None:
        return config.channels_last
    return device.type == "cuda" and config.mixed_precision in ("fp16", "bf16")


def of_any_size(x_t: Tensor) -> Tensor:
    """The same ``[n, c, h, w]``, which a compiled network takes as of any height and width: it is compiled once for all
    buckets, and not anew for each.
    """
    for side in (2, 3):
        torch._dynamo.maybe_mark_dynamic(x_t, side)
    return x_t
