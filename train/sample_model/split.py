"""Recipe: assign the carried emoji to pretrain, finetune and held_out, twins together.

    python -m train.sample_model.split

Two images whose 16 × 16 pixels correlate above 0.95 are twins; a chain of twins goes to one part. Groups are dealt
out at random (seed 0) within their Unicode category, so that each part has the same mix.
"""

from __future__ import annotations

import json
import random

import numpy as np

from curate.neighbors.components import components
from curate.reading.images import decode_image
from curate.reading.pipeline import ReadShards, shard_list
from curate.sample_set import PARTS, sample_set_dir, sample_shards

SIZES = {"pretrain": 1206, "finetune": 500, "held_out": 200}
TWINS = 0.95


def twin_groups(thumbnails: np.ndarray, threshold: float = TWINS) -> np.ndarray:
    """Connected components of ``correlation > threshold``.

    Args:
        thumbnails: ``[n, d]`` pixels.
        threshold: correlation in [-1, 1] above which two images are twins.

    Returns:
        ``[n]`` int64, the smallest row of each row's group.
    """
    x = thumbnails - thumbnails.mean(axis=1, keepdims=True)
    x /= np.linalg.norm(x, axis=1, keepdims=True) + 1e-8
    return components(*np.nonzero(x @ x.T > threshold), len(x))


def main() -> None:
    samples = list(ReadShards()(shard_list(sample_shards())))
    thumbnails = np.stack(
        [np.asarray(decode_image(s.image).resize((16, 16)), np.float32).ravel() for s in samples]
    )
    group = twin_groups(thumbnails)
    categories = [json.loads(s.members["json"])["category"] for s in samples]
    members: dict[tuple[str, int], list[str]] = {}
    for sample, g in zip(samples, group, strict=True):
        members.setdefault((categories[g], int(g)), []).append(sample.key)

    split: dict[str, list[str]] = {part: [] for part in PARTS}
    rng = random.Random(0)
    for category in sorted(set(categories)):
        groups = [keys for (c, _), keys in sorted(members.items()) if c == category]
        # Large groups first, each to the part that lacks most: sizes come out close to what is wanted.
        rng.shuffle(groups)
        groups.sort(key=len, reverse=True)
        size = sum(map(len, groups))
        wanted = {part: size * SIZES[part] / len(samples) for part in PARTS}
        given = dict.fromkeys(PARTS, 0)
        for keys in groups:
            part = max(PARTS, key=lambda p: (wanted[p] - given[p]) / wanted[p])
            given[part] += len(keys)
            split[part] += keys
    excess = len(split["held_out"]) - SIZES["held_out"]
    if excess < 0:
        raise SystemExit("held_out came out too small: raise its share in SIZES")
    for _ in range(excess):  # exactly 200; what is left over is pretrained on, if it has no twin there or here
        single = next(k for k in reversed(split["held_out"]) if any(v == [k] for v in members.values()))
        split["held_out"].remove(single)
        split["pretrain"].append(single)
    path = sample_set_dir() / "split.json"
    path.write_text(json.dumps({part: sorted(keys) for part, keys in split.items()}, indent=0) + "\n")
    print({part: len(keys) for part, keys in split.items()}, f"{len(members)} groups of twins →", path.name)


if __name__ == "__main__":
    main()

