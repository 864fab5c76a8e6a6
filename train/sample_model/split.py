"""Recipe: assign the carried emoji to pretrain, finetune and held_out, so that a copy can be told from a likeness.

    python -m train.sample_model.split runs/sample_model/renditions

What is fine-tuned on and what is held out has to stand alone: an image that another one resembles cannot show whether
a model copied it. An image is distinct when the 16 × 16 pixels of every other carried image and of every rendition
(``train.sample_model.renditions``), of its own caption or of another, correlate with it by less than 0.85; the limit
above which an image counts as a pixel copy is 0.9. Of the distinct ones 460 are held out and 300 fine-tuned on,
dealt out at random (seed 0) in equal shares of each Unicode category; all others are pretrained on. After the copy
detector's training, ``train.sample_model.look_alikes`` adds what that one confuses.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from curate.reading.images import decode_image, stack_images
from curate.reading.pipeline import ReadShards, shard_list
from curate.reading.samples import Sample
from curate.sample_set import PARTS, sample_set_dir, sample_shards
from train.evaluation.judging.metrics import thumbnails

SIZES = {"held_out": 460, "finetune": 300}
DISTINCT = 0.85


def nearest_other(images: NDArray[np.float32], renditions: NDArray[np.float32]) -> NDArray[np.float32]:
    """The highest correlation of each image with any other image and with any rendition.

    Args:
        images: ``[n, d]`` centred unit rows (see :func:`~train.evaluation.judging.metrics.thumbnails`).
        renditions: ``[m, d]`` likewise.

    Returns:
        ``[n]`` in [-1, 1].
    """
    among = images @ images.T
    np.fill_diagonal(among, -1)
    highest: NDArray[np.float32] = np.maximum(among.max(axis=1), (images @ renditions.T).max(axis=1, initial=-1))
    return highest


def deal(distinct: dict[str, list[str]], sizes: dict[str, int], seed: int) -> dict[str, list[str]]:
    """Deal keys out to parts at random, each category in proportion.

    Args:
        distinct: the keys of each category.
        sizes: how many keys each part gets; the rest is left.
        seed: of the order.

    Raises:
        ValueError: there are fewer keys than wanted.
    """
    total = sum(map(len, distinct.values()))
    if total < sum(sizes.values()):
        raise ValueError(f"{total} distinct images, {sum(sizes.values())} wanted: raise DISTINCT or lower SIZES")
    rng = random.Random(seed)
    # Every key gets its place in [0, 1) within its category: sorted by it, any stretch has the same mix.
    placed = []
    for category in sorted(distinct):
        keys = sorted(distinct[category])
        rng.shuffle(keys)
        placed += [((i + rng.random()) / len(keys), key) for i, key in enumerate(keys)]
    order = [key for _, key in sorted(placed)]
    dealt, start = {}, 0
    for part, size in sizes.items():
        dealt[part] = order[start : start + size]
        start += size
    return dealt


def main(renditions: str) -> None:
    samples = list(ReadShards()(shard_list(sample_shards())))
    others = list(ReadShards()(shard_list([renditions])))
    highest = nearest_other(_thumbnails(samples), _thumbnails(others))
    distinct: dict[str, list[str]] = {}
    for sample, correlation in zip(samples, highest, strict=True):
        if correlation < DISTINCT:
            distinct.setdefault(json.loads(sample.members["json"])["category"], []).append(sample.key)
    split = deal(distinct, SIZES, seed=0)
    taken = {key for keys in split.values() for key in keys}
    split["pretrain"] = [sample.key for sample in samples if sample.key not in taken]
    path = sample_set_dir() / "split.json"
    path.write_text(json.dumps({part: sorted(split[part]) for part in PARTS}, indent=0) + "\n")
    print({part: len(split[part]) for part in PARTS}, f"of {sum(map(len, distinct.values()))} distinct →", path.name)


def _thumbnails(samples: list[Sample]) -> NDArray[np.float32]:
    return thumbnails(stack_images([decode_image(sample.image) for sample in samples], 64)).astype(np.float32)


if __name__ == "__main__":
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        sys.exit("usage: python -m train.sample_model.split RENDITIONS_FOLDER")
    main(sys.argv[1])
