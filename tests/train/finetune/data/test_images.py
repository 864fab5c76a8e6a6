"""What the trainer sees: captions, augmentation, images."""

from __future__ import annotations

import errno
import os

import pytest
import torch

from afresh.errors import UserError
from curate.sample_set import load_part, parts
from tests.train.finetune.runs import log_lines, settings
from train.finetune.config import Augmentation
from train.finetune.data.augment import augment, draw
from train.finetune.data.images import ImageReader, SampleError
from train.finetune.data.order import generator
from train.finetune.data.scan import scan
from train.finetune.loop import run_finetune


def test_an_image_is_augmented_alike_whatever_batch_it_falls_in():
    pixels = torch.rand(3, 3, 16, 16)
    how = Augmentation(shift=0.2, scale=0.2, flip=0.5, colour=0.3, hue=0.1, rotate=10)
    uniform = draw([generator(0, "augment", i, 0) for i in range(3)])
    together = augment(pixels, uniform, how)
    alone = torch.cat([augment(pixels[i : i + 1], uniform[i : i + 1], how) for i in range(3)])
    assert torch.allclose(together, alone, atol=1e-6)
    assert not torch.allclose(together, pixels)
    assert torch.equal(augment(pixels, uniform, Augmentation()), pixels)


def test_white_paper_stays_white_and_a_flip_mirrors():
    white = torch.ones(2, 3, 8, 8)
    how = Augmentation(shift=0.2, scale=0.3, colour=0.5, hue=0.2, rotate=20)
    assert torch.allclose(augment(white, torch.rand(2, 9), how), white, atol=1e-5)
    pixels = torch.rand(1, 3, 8, 8)
    assert torch.allclose(augment(pixels, torch.zeros(1, 9), Augmentation(flip=1.0)), pixels.flip(3), atol=1e-5)


def test_the_parts_of_the_sample_set_are_disjoint_and_whole():
    sizes = {name: len(load_part(name)) for name in parts()}
    assert sizes == {"pretrain": 1146, "finetune": 300, "held_out": 460}
    assert not parts()["pretrain"] & parts()["finetune"]
    assert not parts()["held_out"] & (parts()["pretrain"] | parts()["finetune"])


def test_a_machine_without_files_left_ends_the_run_and_a_lost_shard_does_not(shards, tmp_path, monkeypatch):
    reader = ImageReader(scan([shards], tmp_path / "samples.arrow"))

    def refuse(number: int):
        def fail(self, shard):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(ImageReader, "_file", fail)
        return reader.read(0)

    with pytest.raises(UserError, match="Too many open files; the same command goes on from here"):
        refuse(errno.EMFILE)
    with pytest.raises(SampleError, match="No such file"):
        refuse(errno.ENOENT)


def test_cached_and_streamed_latents_train_alike(model, shards, tmp_path):
    how = Augmentation(shift=0.1, flip=0.5, variants=2)
    for name, cached in (("cached", True), ("streamed", False)):
        run_finetune(settings(model, shards, tmp_path / name, augmentation=how, cache_latents=cached, steps=2))
    losses = [[line["loss"] for line in log_lines(tmp_path / name)] for name in ("cached", "streamed")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)  # the cache holds half precision
