"""How a run's data are laid out: the sizes of its images, their order, and where caches lie."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from afresh.errors import UsageError
from train.finetune.config import FinetuneConfig
from train.finetune.data.buckets import Size, bucket_sizes, sizes_without_enlarging
from train.finetune.data.images import ImageLoader
from train.finetune.data.order import SampleOrder
from train.finetune.data.scan import ShardSet


def image_sizes(config: FinetuneConfig, default: int, multiple: int) -> list[Size]:
    """The sizes that images are brought to: one, or those of the buckets.

    Args:
        config: ``resolution`` and ``buckets``.
        default: the model's own side, in pixels.
        multiple: pixels of a latent's side, which sides must be multiples of.

    Raises:
        UsageError: sides that the model cannot take, or no bucket within the limits.
    """
    resolution, buckets = config.resolution or default, config.buckets
    for name, value in (("resolution", resolution), ("buckets.step", buckets.step)):
        if value < 0 or value % multiple:
            raise UsageError(f"{name} must be a multiple of {multiple} for this model, not {value}")
    if not buckets.step or buckets.step >= resolution:  # a small model's sides leave no room for others
        return [(resolution, resolution)]
    if not buckets.enlarge:
        return sizes_without_enlarging(resolution, buckets.step, buckets.max_side)
    sizes = bucket_sizes(resolution, buckets.step, buckets.min_side, buckets.max_side)
    if not sizes:
        raise UsageError(
            f"buckets: no sides from {buckets.min_side or resolution // 2} to {buckets.max_side or 2 * resolution} are "
            f"multiples of {buckets.step} with an area of at most {resolution}²"
        )
    return sizes


def lay_out(
    shard_set: ShardSet, sizes: Sequence[Size], config: FinetuneConfig, together: int
) -> tuple[ImageLoader, SampleOrder]:
    """How the images of a run are loaded, and their order.

    Args:
        shard_set: the samples.
        sizes: from :func:`image_sizes`.
        config: of the run.
        together: samples in a row that are of one bucket: the batch size that the run was begun with, which smaller
            batches divide, so that they leave the order as it is.
    """
    loader = ImageLoader(
        shard_set,
        sizes,
        config.crop,
        config.augmentation,
        config.seed,
        keep=config.shuffle_shards,
        enlarge=config.buckets.enlarge,
        masked=config.masked_loss,
    )
    order = SampleOrder(
        shard_set.counts,
        config.shuffle_shards,
        config.seed,
        repeats=shard_set.repeats,
        batch_size=together,
        buckets=len(sizes),
        bucket_of=loader.buckets if len(sizes) > 1 else None,
    )
    return loader, order


def cache_folder(config: FinetuneConfig) -> Path:
    """Where latents and embeddings are kept on disk."""
    return Path(config.cache) if config.cache else Path(config.out) / "cache"

