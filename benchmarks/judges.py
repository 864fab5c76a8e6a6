"""How many edited copies each judge of copies finds, at the threshold that 1 % of images never trained on pass.

    python -m benchmarks.judges             a minute
    python -m benchmarks.judges --images 100

The training set is the fine-tuning part of the carried set; some of its images are edited as copies on the web are
(``curate.embed.edits``), the held-out part sets the thresholds. Printed as Markdown: a row a judge, the share found of
each edit and of all, and milliseconds an image. *ImageNet, with texture* is the network without the second judge's
coarse look.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image

from curate.embed.edits import EDITS
from curate.reading.images import decode_image
from curate.sample_set import load_part
from train.evaluation.judging.dual_encoder import DualEncoder
from train.evaluation.judging.metrics import PIXEL_COPY, thumbnails
from train.evaluation.metrics.copies import Copies
from train.evaluation.metrics.imagenet import ImageNetFeatures
from train.evaluation.metrics.pixels import stacked

Look = Callable[[Sequence[Image]], NDArray[np.float32]]


def unit(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Unit rows."""
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def looks() -> dict[str, Look]:
    """The judges' feature spaces, by name."""
    encoder, network = DualEncoder.load(), ImageNetFeatures()
    return {
        "dual encoder": encoder.copy_features,
        "ImageNet": lambda images: unit(network(images, coarse=True)),
        "ImageNet, with texture": lambda images: unit(network(images)),
        "pixels": lambda images: thumbnails(stacked(images)),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--images", type=int, default=50, help="training images that are edited")
    args = parser.parse_args()
    training = [decode_image(sample.image) for sample in load_part("finetune")]
    held_out = [decode_image(sample.image) for sample in load_part("held_out")]
    rng = np.random.default_rng(0)
    chosen = rng.choice(len(training), args.images, replace=False)
    edited = {name: [edit(training[i], rng) for i in chosen] for name, edit in EDITS.items()}

    rows: list[list[Any]] = []
    for name, look in looks().items():
        began = time.perf_counter()
        of_training = look(training)
        milliseconds = 1000 * (time.perf_counter() - began) / len(training)
        copies = Copies(of_training, look(held_out))
        threshold = PIXEL_COPY if name == "pixels" else copies.threshold
        found = [float((copies.nearest(look(images))[0] > threshold).mean()) for images in edited.values()]
        passing = float((copies.held_out_nearest > threshold).mean())
        shares = [f"{share:.0%}" for share in [*found, float(np.mean(found)), passing]]
        rows.append([name, *shares, f"{milliseconds:.1f}"])
    head = ["judge", *(name.replace("_", " ") for name in edited), "all", "held out", "ms"]
    print("\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows]))


if __name__ == "__main__":
    main()
