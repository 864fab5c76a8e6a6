"""Sizes of buckets, the bucket of an image, and how an image is brought to its size."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from afresh.errors import UsageError
from train.finetune.batches.layout import image_sizes
from train.finetune.config import Buckets, FinetuneConfig
from train.finetune.data.buckets import bring_to, bucket_sizes, crop_box, nearest_bucket


def config(**changes) -> FinetuneConfig:
    return FinetuneConfig(model="", out="", shards=[], **changes)


def test_sizes_are_multiples_of_the_step_within_area_and_sides_and_come_in_both_orientations():
    sizes = bucket_sizes(512, 64)
    assert (512, 512) in sizes and (384, 640) in sizes and (256, 1024) in sizes
    for width, height in sizes:
        assert width % 64 == height % 64 == 0 and width * height <= 512**2
        assert min(width, height) >= 256 and max(width, height) <= 1024
        assert (height, width) in sizes
    ratios = [w / h for w, h in sizes]
    assert ratios == sorted(set(ratios))
    assert max(max(size) for size in bucket_sizes(512, 64, max_side=768)) == 768
    assert bucket_sizes(512, 64, min_side=500) == [(512, 512)]


def test_an_image_goes_to_the_bucket_whose_aspect_ratio_differs_by_the_smallest_factor():
    sizes = bucket_sizes(512, 64)
    rng = np.random.default_rng(0)
    width, height = rng.integers(1, 5000, (2, 500)).astype(np.int32)
    chosen = nearest_bucket(width, height, sizes)
    ratios = np.array([w / h for w, h in sizes])
    factors = np.abs(np.log((width / height)[:, None] / ratios))
    np.testing.assert_allclose(factors[np.arange(500), chosen], factors.min(axis=1), atol=1e-12)
    assert sizes[nearest_bucket(np.array([3000]), np.array([3000]), sizes)[0]] == (512, 512)


def test_a_crop_has_the_targets_shape_and_lies_where_it_is_told():
    assert crop_box((200, 100), (64, 64), "none") == (0, 0, 200, 100)
    assert crop_box((200, 100), (64, 64), "center") == (50, 0, 150, 100)
    assert crop_box((200, 100), (64, 64), "random", (0.0, 0.7)) == (0, 0, 100, 100)
    assert crop_box((200, 100), (64, 64), "random", (1.0, 0.2)) == (100, 0, 200, 100)
    left, top, right, bottom = crop_box((301, 777), (448, 576), "center")
    assert (right - left) / (bottom - top) == pytest.approx(448 / 576)
    assert left == 0 and right == 301 and top > 0


def test_a_part_of_an_image_fills_the_target_and_the_whole_is_squashed():
    image = Image.new("RGB", (80, 40), (255, 0, 0))
    image.paste((0, 0, 255), (40, 0, 80, 40))
    left = bring_to(image, (16, 16), crop_box(image.size, (16, 16), "random", (0.0, 0.0)))
    assert left.shape == (3, 16, 16) and left.dtype == np.uint8
    inside = left[:, :, :15]  # the filter sees a pixel beyond the border
    assert (inside[0] == 255).all() and (inside[2] == 0).all()
    whole = bring_to(image, (16, 8), crop_box(image.size, (16, 8), "none"))
    assert whole.shape == (3, 8, 16) and whole[0, 0, 0] == 255 and whole[2, 0, 15] == 255


def test_shapes_are_the_default_one_square_where_asked_for_or_small_and_sides_it_cannot_take_are_refused():
    assert image_sizes(config(buckets=Buckets(step=0)), 512, 8) == [(512, 512)]
    assert image_sizes(config(resolution=768, buckets=Buckets(step=0)), 512, 8) == [(768, 768)]
    assert image_sizes(config(), 512, 8) == bucket_sizes(512, 64)
    assert image_sizes(config(), 64, 8) == [(64, 64)] and image_sizes(config(), 32, 8) == [(32, 32)]
    with pytest.raises(UsageError, match="resolution must be a multiple of 8"):
        image_sizes(config(resolution=500), 512, 8)
    with pytest.raises(UsageError, match=r"buckets.step must be a multiple of 8"):
        image_sizes(config(buckets=Buckets(step=20)), 512, 8)
    with pytest.raises(UsageError, match="no sides from 600 to 1024"):
        image_sizes(config(buckets=Buckets(step=64, min_side=600)), 512, 8)
