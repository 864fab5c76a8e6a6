"""Recipe: write one part of the carried sample set as shards of its own, and some of its captions as prompts.

python -m train.sample_model.part pretrain runs/sample_model/pretrain_part
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from curate.reading.samples import Sample
from curate.reading.writing import write_shard
from curate.sample_set import PARTS, load_part


def write_part(name: str, folder: Path, per_shard: int = 500) -> list[str]:
    """Write the samples of a part, untouched, into ``folder``; return the shards' paths."""
    samples = load_part(name)
    paths = []
    for number, start in enumerate(range(0, len(samples), per_shard)):
        path = folder / f"{number:06d}.tar"
        write_shard(str(path), [(sample.key, sample.members) for sample in samples[start : start + per_shard]])
        paths.append(str(path))
    write_prompts(samples, folder)
    return paths


def write_prompts(samples: list[Sample], folder: Path, most: int = 96) -> None:
    """``prompts.jsonl``: the captions of evenly spaced samples, with their images beside it."""
    chosen = samples[:: max(1, len(samples) // most)][:most]
    lines = []
    for sample in chosen:
        name = f"originals/{sample.key}.{sample.image_ext}"
        (folder / "originals").mkdir(exist_ok=True)
        (folder / name).write_bytes(sample.image)
        lines.append(json.dumps({"caption": sample.caption, "image": name}, ensure_ascii=False) + "\n")
    (folder / "prompts.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in PARTS:
        sys.exit(f"usage: python -m train.sample_model.part {{{','.join(PARTS)}}} FOLDER")
    write_part(sys.argv[1], Path(sys.argv[2]))

