"""One GPU for each of several processes, by the names that CUDA knows them by."""

from __future__ import annotations

import pytest
import torch

from curate.engines.gpus import device_name, gpu_ids, take


@pytest.fixture
def four(monkeypatch):
    """As if this machine had four GPUs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: "NVIDIA X")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return monkeypatch


def test_processes_take_the_gpus_in_turn(four):
    seen = []
    for number in range(6):
        environment: dict[str, str] = {}
        take(gpu_ids(), number, environment)
        seen.append(environment["CUDA_VISIBLE_DEVICES"])
    assert seen == ["0", "1", "2", "3", "0", "1"]


def test_gpus_that_the_user_has_named_go_by_those_names(four):
    four.setenv("CUDA_VISIBLE_DEVICES", "2, GPU-5f")
    assert gpu_ids() == ["2", "GPU-5f"]
    assert device_name(True) == "GPU 2 (NVIDIA X)" and device_name(False) == "CPU"


def test_without_gpus_nothing_is_set():
    environment: dict[str, str] = {}
    take(gpu_ids() if not torch.cuda.is_available() else [], 1, environment)
    assert environment == {}
