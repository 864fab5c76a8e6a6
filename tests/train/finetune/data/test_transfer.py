"""Copies to a device."""

from __future__ import annotations

import torch

from train.finetune.data.transfer import to_device


class Watched(torch.Tensor):
    """A tensor that says how it is copied, as there is no GPU to copy it to."""

    pinned = False

    def pin_memory(self):
        self.pinned = True
        return self

    def to(self, device, non_blocking=False):
        return str(device), self.pinned, non_blocking


def test_copies_to_a_gpu_come_from_pinned_memory_and_are_not_waited_for_others_are_plain():
    assert to_device(torch.ones(2).as_subclass(Watched), torch.device("cuda", 1)) == ("cuda:1", True, True)
    assert to_device(torch.ones(2).as_subclass(Watched), torch.device("cpu")) == ("cpu", False, False)
    x = torch.ones(2)
    assert to_device(x, torch.device("cpu")) is x
