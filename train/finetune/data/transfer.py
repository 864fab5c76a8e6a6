"""Copies from the processor to where the model is, which neither waits for."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device.

    To a GPU it goes from pinned memory, and the processor runs on: a copy from any other memory waits for all that the
    GPU was asked for before.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
