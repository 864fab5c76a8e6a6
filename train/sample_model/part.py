"""Recipe: write one part of the carried sample set as shards of its own, and some of its captions as prompts.

    python -m train.sample_model.part pretrain runs/sample_model/pretrain_part
    python -m train.sample_model.part pretrain runs/sample_model/pretrain_renditions runs/sample_model/renditions

With a third argument, the other drawings of the part's captions (``train.sample_model.renditions``) in its place, so
that they can be trained on more or less often than those of another part.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from curate.reading.pipeline import ReadShards, shard_list
from curate.reading.samples import Sample
from curate.reading.writing import write_shard
from curate.sample_set import PARTS, load_part, parts


def write_part(name: str, folder: Path, renditions: str | None = None, per_shard: int = 500) -> list[str]:
    """Write the samples of a part, or the other drawings of its captions, untouched; return the shards' paths.

    Args:
        name: of the part.
        folder: to write into.
        renditions: folder of the other drawings; None takes the part itself.
        per_shard: samples a shard.
    """
    samples = load_part(name)
    if renditions is None:
        write_prompts(samples, folder)
        named = [(sample.key, sample.members) for sample in samples]
    else:  # one character has several drawings: the shard that each comes from makes their keys differ
        keys = parts()[name]
        drawings = [sample for sample in ReadShards()(shard_list([renditions])) if sample.key in keys]
        named = [(f"{Path(sample.shard).stem}-{sample.key}", sample.members) for sample in drawings]
    return list(_written(named, folder, per_shard))


def _written(named: Sequence[tuple[str, dict[str, bytes]]], folder: Path, per_shard: int) -> list[str]:
    paths = []
    for number, start in enumerate(range(0, len(named), per_shard)):
        paths.append(str(folder / f"{number:06d}.tar"))
        write_shard(paths[-1], named[start : start + per_shard])
    return paths


def write_prompts(samples: list[Sample], folder: Path, most: int = 96) -> None:
    """``prompts.jsonl``: the captions of evenly spaced samples, with their images beside it."""
    chosen = samples[:: max(1, len(samples) // most)][:most]
    lines = []
    for sample in chosen:
        name = f"originals/{sample.key}.{sample.image_ext}"
        (folder / "originals").mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(sample.image)
        lines.append(json.dumps({"caption": sample.caption, "image": name}, ensure_ascii=False) + "\n")
    (folder / "prompts.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4) or sys.argv[1] not in PARTS:
        sys.exit(f"usage: python -m train.sample_model.part {{{','.join(PARTS)}}} FOLDER [RENDITIONS]")
    write_part(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
