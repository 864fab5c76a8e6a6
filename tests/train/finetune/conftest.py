"""A tiny model and small shards for the tests of this folder."""

from __future__ import annotations

import pytest
import torch

from curate.reading.writing import write_shard
from curate.sample_set import load_part
from train.sample_model.small import tiny_pipeline


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny_pipeline().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("shards")
    samples = load_part("finetune")[:20]
    for number, part in enumerate((samples[:3], samples[3:15], samples[15:])):
        write_shard(str(folder / f"{number:06d}.tar"), [(s.key, dict(s.members)) for s in part])
    return str(folder)


@pytest.fixture(autouse=True)
def _one_thread(_quiet_machine: None) -> None:
    """As the launched processes have: sums are bit for bit the same only with equally many threads."""
    torch.set_num_threads(1)
