"""The GPUs at hand: how many, what they are called, and one of them for each of several processes."""

from __future__ import annotations

import os
from collections.abc import MutableMapping

VISIBLE = "CUDA_VISIBLE_DEVICES"


def gpu_ids() -> list[str]:
    """What ``CUDA_VISIBLE_DEVICES`` calls each GPU that this process may use; none where torch can use none."""
    import torch

    if not torch.cuda.is_available():
        return []
    named = [one.strip() for one in os.environ.get(VISIBLE, "").split(",") if one.strip()]
    return named or [str(number) for number in range(torch.cuda.device_count())]


def take(ids: list[str], number: int, environment: MutableMapping[str, str] = os.environ) -> None:
    """Leave process ``number`` of several one GPU of ``ids``, in turn; before torch has looked for them."""
    if ids:
        environment[VISIBLE] = ids[number % len(ids)]


def on_gpus(gpus: int, share: float) -> int:
    """How many tasks that take ``share`` of a GPU, in (0, 1], run at a time."""
    return gpus * int(1 / share)


def device_name(accelerated: bool) -> str:
    """What a network of this process runs on: ``GPU 3 (its name)``, or ``CPU``.

    Args:
        accelerated: it runs on a GPU where there is one.
    """
    if accelerated:
        import torch

        if torch.cuda.is_available():
            number = os.environ.get(VISIBLE, "").split(",")[0] or "0"
            return f"GPU {number} ({torch.cuda.get_device_name(0)})"
    return "CPU"
