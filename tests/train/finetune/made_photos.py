"""Shards of images of many shapes, and batches of their pixels as the loop gets them."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

from curate.reading.writing import write_shard
from tests.train.finetune.runs import settings
from train.finetune.batches.batches import DecodedBatches, StreamedBatches
from train.finetune.batches.layout import lay_out
from train.finetune.data.buckets import bucket_sizes
from train.finetune.data.scan import scan

SIZES = bucket_sizes(64, 16)


class Pixels:
    """Stands where the VAE does, so that batches show the pixels they were made of."""

    device, dtype = torch.device("cpu"), torch.float32

    def encode(self, values: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(latent_dist=SimpleNamespace(parameters=values))


def photos(folder: Path, *, shards: int = 4, each: int = 6) -> str:
    """Shards of images of many shapes, each of its own colour and with a gradient, uneven in number."""
    rng = np.random.default_rng(0)
    for shard in range(shards):
        samples = []
        for number in range(each + 2 * (shard % 2)):
            width, height = rng.integers(30, 120, 2).tolist()
            pixels = np.zeros((height, width, 3), dtype=np.uint8)
            pixels[:] = rng.integers(0, 255, 3)
            pixels[:, :, 1] = np.linspace(0, 255, width)
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "PNG")
            samples.append((f"{number:03d}", {"png": file.getvalue(), "txt": f"photo {shard} {number}".encode()}))
        write_shard(folder / f"{shard:06d}.tar", samples)
    return str(folder)


def batches(shards: str, tmp_path: Path, *, workers: int = 0, start: int = 0, count: int = 12, **changes):
    config = settings("", shards, tmp_path, crop="random", seed=5, shuffle_shards=2, **changes)
    loader, order = lay_out(scan(config.shards, tmp_path / "samples.arrow"), SIZES, config, 4)
    positions = [range(4 * batch, 4 * batch + 4) for batch in range(start, count)]
    return StreamedBatches(DecodedBatches(order, loader), positions, workers, Pixels(), torch.device("cpu"))


def children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]
