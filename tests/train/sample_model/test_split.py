"""The split: what stands apart, and how it is dealt out."""

from __future__ import annotations

import json

import numpy as np
import pytest

from curate.embed.copy_detector import CopyDetector
from curate.reading.images import decode_image, stack_images
from curate.sample_set import PARTS, load_part, look_alikes, parts
from train.evaluation.judging.metrics import thumbnails
from train.sample_model.look_alikes import look_alikes_of
from train.sample_model.split import DISTINCT, SIZES, deal, nearest_other


def test_the_nearest_other_is_looked_for_among_images_and_renditions():
    rng = np.random.default_rng(0)
    rows = thumbnails(rng.random((4, 3, 16, 16)))
    other = thumbnails(rng.random((2, 3, 16, 16)))
    twin = rows[3:].copy()
    assert nearest_other(rows, np.concatenate([other, twin]))[3] == pytest.approx(1, abs=1e-5)
    assert (nearest_other(rows, other)[:3] < 0.5).all()
    assert nearest_other(np.concatenate([rows, rows[:1]]), other)[[0, 4]] == pytest.approx([1, 1], abs=1e-5)


def test_each_part_gets_its_share_of_every_category():
    distinct = {"a": [f"a{i}" for i in range(60)], "b": [f"b{i}" for i in range(30)]}
    dealt = deal(distinct, {"one": 30, "two": 15}, seed=0)
    assert {part: len(keys) for part, keys in dealt.items()} == {"one": 30, "two": 15}
    assert not set(dealt["one"]) & set(dealt["two"])
    assert abs(sum(key[0] == "a" for key in dealt["one"]) - 20) <= 2
    assert dealt == deal(distinct, {"one": 30, "two": 15}, seed=0) != deal(distinct, {"one": 30, "two": 15}, seed=1)
    with pytest.raises(ValueError, match="90 distinct images, 91 wanted"):
        deal(distinct, {"one": 91}, seed=0)


def test_what_is_fine_tuned_on_and_held_out_stands_alone_in_the_carried_set():
    samples = [sample for part in PARTS for sample in load_part(part)]
    images = thumbnails(stack_images([decode_image(sample.image) for sample in samples], 64))
    highest = nearest_other(images, np.empty((0, images.shape[1]), np.float32))
    pretrained = len(load_part("pretrain"))
    assert (highest[pretrained:] < DISTINCT).all()
    assert (highest[:pretrained] > DISTINCT).sum() > 500
    categories = {part: [json.loads(s.members["json"])["category"] for s in load_part(part)] for part in SIZES}
    for category in set(categories["finetune"]):
        shares = [categories[part].count(category) / len(categories[part]) for part in SIZES]
        assert abs(shares[0] - shares[1]) < 0.02


def test_what_the_copy_detector_takes_for_another_image_is_listed():
    samples = {part: load_part(part) for part in PARTS}
    found = set(look_alikes_of(CopyDetector.load().eval(), samples, drawings=samples["pretrain"][:1]))
    assert len(found) > 20 and found <= look_alikes()
    assert not look_alikes() & {sample.key for sample in samples["pretrain"]}
    left = {part: len(keys - look_alikes()) for part, keys in parts().items()}
    assert left["finetune"] >= 10 * 24 and left["held_out"] >= 400
