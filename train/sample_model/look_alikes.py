"""Recipe: list the fine-tuning and held-out images that the copy detector takes for another image.

    python -m train.sample_model.look_alikes runs/sample_model/renditions

The split goes by pixels, because the detector is trained after it. What the detector then finds above ``LIMIT`` like
another carried image or another drawing is no evidence of copying, nor of its absence: the quickstart and the
benchmarks neither repeat such images nor take them as negatives. One distinct held-out image in a hundred lies above
0.89 (``threshold`` in ``curate/assets/copy_detector.json``). The list goes into ``split.json``, beside the parts.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from curate.embed.copy_detector import CopyDetector
from curate.reading.images import decode_image, stack_images
from curate.reading.pipeline import ReadShards, shard_list
from curate.reading.samples import Sample
from curate.sample_set import PARTS, load_part, sample_set_dir
from train.sample_model.split import nearest_other

LIMIT = 0.87


def look_alikes_of(detector: CopyDetector, samples: dict[str, list[Sample]], drawings: list[Sample]) -> list[str]:
    """The keys of the fine-tuning and held-out samples whose nearest other image lies at ``LIMIT`` or above.

    Args:
        detector: in evaluation mode.
        samples: all carried samples, by part.
        drawings: the renditions.
    """

    def embedded(some: list[Sample]) -> torch.Tensor:
        pixels = torch.from_numpy(stack_images([decode_image(sample.image) for sample in some], detector.size))
        with torch.inference_mode():
            return torch.cat([detector(batch) for batch in pixels.split(256)]).float()

    everything = [sample for part in PARTS for sample in samples[part]]
    highest = nearest_other(embedded(everything).numpy(), embedded(drawings).numpy())
    pretrained = {sample.key for sample in samples["pretrain"]}
    return sorted(
        sample.key
        for sample, similarity in zip(everything, highest, strict=True)
        if similarity >= LIMIT and sample.key not in pretrained
    )


def main(renditions: str) -> None:
    samples = {part: load_part(part) for part in PARTS}
    drawings = list(ReadShards()(shard_list([renditions])))
    found = look_alikes_of(CopyDetector.load().eval(), samples, drawings)
    path = sample_set_dir() / "split.json"
    split = json.loads(path.read_text(encoding="utf-8")) | {"look_alikes": found}
    path.write_text(json.dumps(split, indent=0) + "\n", encoding="utf-8")
    left = {part: sum(s.key not in found for s in samples[part]) for part in PARTS if part != "pretrain"}
    print(f"{len(found)} look like another; left: {left} → {path.name}")


if __name__ == "__main__":
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        sys.exit("usage: python -m train.sample_model.look_alikes RENDITIONS_FOLDER")
    main(sys.argv[1])
