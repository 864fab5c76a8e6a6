"""The captioned emoji set that the project carries, and its fixed split into three disjoint parts.

The four shards lie in ``curate/assets/noto-emoji``; ``split.json`` beside them assigns every key to one part:

- ``pretrain`` (1,146): what the carried models were trained on, beside other drawings of all captions,
- ``finetune`` (300): what the quickstart plants duplicates in and fine-tunes on,
- ``held_out`` (460): never trained on; negatives for detection and reference for quality.

Every image of the last two is distinct: no other image of the set, and none of the other drawings, resembles its
pixels, so that a copy of it can be told from a likeness; the few that the copy detector still takes for another are
its ``look_alikes``. ``python -m train.sample_model.split`` and ``….look_alikes`` made the file.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from curate.reading.samples import Sample


PARTS = ("pretrain", "finetune", "held_out")


def sample_set_dir() -> Path:
    """Folder of the carried shards, their licence note and ``split.json``."""
    return Path(__file__).parent / "assets" / "noto-emoji"


def sample_shards() -> list[str]:
    """Paths of the four carried tar shards, in order."""
    return [str(path) for path in sorted(sample_set_dir().glob("*.tar"))]


@lru_cache(maxsize=1)
def parts() -> dict[str, frozenset[str]]:
    """The keys of each part: ``{"pretrain": {...}, "finetune": {...}, "held_out": {...}}``."""
    split = json.loads((sample_set_dir() / "split.json").read_text())
    return {name: frozenset(split[name]) for name in PARTS}


@lru_cache(maxsize=1)
def look_alikes() -> frozenset[str]:
    """The keys of fine-tuning and held-out images that the copy detector takes for another image."""
    return frozenset(json.loads((sample_set_dir() / "split.json").read_text())["look_alikes"])


def load_part(name: str) -> list[Sample]:
    """All samples of one part, in the order of the shards.

    Raises:
        ValueError: ``name`` is not one of ``pretrain``, ``finetune``, ``held_out``.
    """
    from curate.reading.samples import Sample, read_samples

    if name not in PARTS:
        raise ValueError(f"unknown part {name!r} of the sample set: choose one of {', '.join(PARTS)}")
    keys = parts()[name]
    return [
        sample
        for shard in sample_shards()
        for sample in read_samples(shard)
        if isinstance(sample, Sample) and sample.key in keys
    ]

