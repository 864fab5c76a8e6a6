"""What the trainer sees at each position: order, captions, augmentation, batches."""

from __future__ import annotations

import json

import pytest
import torch

from curate.shards import write_shard
from tests.train.finetune.runs import log_lines, settings
from train.finetune.augment import augment, draw
from train.finetune.config import Augmentation, FinetuneConfig
from train.finetune.data import ShardOrder, batch_positions, generator, sample_captions
from train.finetune.loop import run_finetune
from train.sample_set import load_part, parts


def test_every_epoch_visits_every_sample_once_in_another_order():
    order = ShardOrder([3, 12, 5, 4], window=2, seed=0)
    epochs = [[order.row(epoch * 24 + i)[0] for i in range(24)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(24)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [order.row(i)[0] for i in range(24)] == epochs[0]  # whatever was asked for before
    assert order.locate(3) == (1, 0) and order.locate(2) == (0, 2) and order.locate(23) == (3, 3)


def test_a_window_of_shards_is_read_before_the_next_one_begins():
    order = ShardOrder([4] * 6, window=2, seed=1)
    shards = [order.locate(order.row(i)[0])[0] for i in range(24)]
    assert [len(set(shards[start : start + 8])) for start in (0, 8, 16)] == [2, 2, 2]


def test_processes_share_positions_without_gap_or_overlap():
    config = FinetuneConfig(model="", out="", shards=[], batch_size=3, gradient_accumulation=2)
    positions = [
        p for step in range(2) for micro in range(2) for rank in range(2)
        for p in batch_positions(step, micro, rank, 2, config)
    ]  # fmt: skip
    assert positions == list(range(24))


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


def test_captions_pooled_by_curation_are_trained_on_too():
    sample = load_part("finetune")[0]
    pooled = {"afresh": {"duplicates": 2, "captions": ["another", sample.caption]}}
    members = {**sample.members, "json": json.dumps(pooled).encode()}
    assert sample_captions(type(sample)(sample.shard, sample.key, members)) == (sample.caption, "another")


def test_the_parts_of_the_sample_set_are_disjoint_and_whole():
    sizes = {name: len(load_part(name)) for name in parts()}
    assert sizes == {"pretrain": 1205, "finetune": 501, "held_out": 200}
    assert not parts()["pretrain"] & parts()["finetune"]
    assert not parts()["held_out"] & (parts()["pretrain"] | parts()["finetune"])


def test_cached_and_streamed_latents_train_alike(model, shards, tmp_path):
    how = Augmentation(shift=0.1, flip=0.5, variants=2)
    for name, cached in (("cached", True), ("streamed", False)):
        run_finetune(settings(model, shards, tmp_path / name, augmentation=how, cache_latents=cached, steps=2))
    losses = [[line["loss"] for line in log_lines(tmp_path / name)] for name in ("cached", "streamed")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)  # the cache holds half precision


def test_an_unreadable_image_weighs_nothing_and_stops_nothing(model, tmp_path):
    samples = [(s.key, dict(s.members)) for s in load_part("finetune")[:4]]
    samples[1][1]["webp"] = b"not an image"
    write_shard(str(tmp_path / "bad" / "000000.tar"), samples)
    summary = run_finetune(settings(model, str(tmp_path / "bad"), tmp_path / "run", steps=1))
    assert summary["samples_seen"] == 4
    assert log_lines(tmp_path / "run")[0]["kept"] == 3
