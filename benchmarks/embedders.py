"""Image embedders under a fixed set of edits: how many edited copies are found at one false pair in a million.

    python -m benchmarks.embedders                              the carried embedders on the carried samples
    python -m benchmarks.embedders transformers:clip sscd.pt    others beside them, by name, folder or file
    python -m benchmarks.embedders --photographs FOLDER         and on the images below a folder

Sets: the carried samples (about 1,900 emoji), the photographs of scikit-image and scikit-learn that come with those
packages, where they are installed (their crops, see ``library_crops``), and a folder's images. Of images that
look the same only one stays (two clocks a minute apart, drawn twice): a mean difference of less than 8 grey levels.

The threshold is measured, not assumed: over all pairs of different images of the set, it is the least cosine that no
more than one pair in a million exceeds, n (n − 1) / 2 × 10⁻⁶ pairs. Below the number of pairs stands how many pairs
that is: where it is less than one, the threshold is the highest cosine of different images, and the estimate is
coarser than its name. An edited image counts as found where its cosine with the image it comes from is above the
threshold. Each edit has a seed of its own, so every embedder sees the same pixels.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.photographs import library_photographs
from curate.embed import edits
from curate.embed.protocol import Embedder
from curate.embed.registry import EMBEDDERS, load_embedder
from curate.reading.images import ImageError, decode_image, stack_images

FALSE_PAIRS = 1e-6
DIFFERENT = 8  # grey levels of 255
BENCHMARK_EDITS: dict[str, edits.Edit] = {
    "JPEG 90": partial(edits.jpeg, quality=90),
    "JPEG 60": partial(edits.jpeg, quality=60),
    "JPEG 30": partial(edits.jpeg, quality=30),
    "resize 50 %": partial(edits.resize, factor=0.5),
    "resize 25 %": partial(edits.resize, factor=0.25),
    "brightness": edits.brightness,
    "contrast": edits.contrast,
    "blur": edits.blur,
    "grayscale": edits.grayscale,
    "colour shift": edits.colour_shift,
    "text": edits.text,
    "border": edits.border,
    "crop 10 %": partial(edits.crop, share=0.10),
    "crop 25 %": partial(edits.crop, share=0.25),
    "crop 50 %": partial(edits.crop, share=0.50),
    "rotate 5°": partial(edits.rotate, angle=5),
    "rotate 15°": partial(edits.rotate, angle=15),
    "rotate 90°": partial(edits.rotate, angle=90),
    "flip": edits.flip,
}


# ----------------------------------------------------------------------------------------------------- images


def carried_samples() -> list[Image.Image]:
    """The carried emoji."""
    from curate.sample_set import load_part

    parts = ("pretrain", "finetune", "held_out")
    return [decode_image(sample.image) for part in parts for sample in load_part(part)]


def library_crops(rows: int, seed: int = 0) -> list[Image.Image]:
    """Crops of the photographs that scikit-image and scikit-learn carry; empty where neither is installed.

    Args:
        rows: how many crops at most, spread evenly over the photographs. Each is a square of 64 to 160 pixels with
            something to see (its grey values deviate by 12 of 255 or more), and shares less than a tenth of its area
            with an earlier crop of the same photograph.
        seed: of places and sizes.
    """
    pictures = library_photographs()
    rng, result = np.random.default_rng(seed), []
    for picture in pictures:
        taken: list[tuple[int, int, int]] = []
        for _ in range(40 * rows // max(1, len(pictures))):
            if len(taken) * len(pictures) >= rows:
                break
            side = int(rng.integers(64, 161))
            if side > min(picture.size):
                continue
            left, top = int(rng.integers(picture.width - side + 1)), int(rng.integers(picture.height - side + 1))
            crop = picture.crop((left, top, left + side, top + side))
            plain = np.asarray(crop.convert("L"), np.float32).std() < 12
            if not plain and all(_shared((left, top, side), other) < 0.1 for other in taken):
                taken.append((left, top, side))
                result.append(crop)
    return result


def _shared(a: tuple[int, int, int], b: tuple[int, int, int]) -> float:
    """Area that two squares (left, top, side) share, as a part of the smaller one."""
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[2], b[1] + b[2]) - max(a[1], b[1])
    return max(0, width) * max(0, height) / min(a[2], b[2]) ** 2


def folder_images(folder: Path) -> list[Image.Image]:
    """The images below a folder, in the order of their paths."""
    found = []
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp"):
            try:
                found.append(decode_image(path.read_bytes()))
            except ImageError as error:
                print(f"{path}: {error}: left out")
    return found


def distinct(images: Sequence[Image.Image]) -> list[Image.Image]:
    """Less those that look like an earlier one: less than ``DIFFERENT`` grey levels apart, on average, at 32 × 32."""
    pixels = stack_images(images, 32).reshape(len(images), 3 * 32 * 32) * 255
    kept: list[int] = []
    for i in range(len(images)):
        if not kept or np.abs(pixels[kept] - pixels[i]).mean(1).min() >= DIFFERENT:
            kept.append(i)
    return [images[i] for i in kept]


# ------------------------------------------------------------------------------------------------ measurement


def threshold(vectors: NDArray[np.float32], rate: float = FALSE_PAIRS) -> float:
    """The least cosine that at most ``rate`` of the pairs of different rows exceed.

    Args:
        vectors: ``[n, d]`` unit rows, n ≥ 2.
        rate: in [0, 1].
    """
    n = len(vectors)
    allowed = int(rate * (n * (n - 1) // 2))
    highest = np.empty(0, np.float32)
    for start in range(0, n, 1024):
        cosine = vectors[start : start + 1024] @ vectors.T
        later = np.arange(n)[None] > np.arange(start, min(start + 1024, n))[:, None]
        highest = np.sort(np.concatenate([highest, cosine[later]]))[-allowed - 1 :]
    return float(highest[0])


def table(title: str, images: Sequence[Image.Image], embedders: Sequence[Embedder]) -> str:
    """A Markdown table: edits down, embedders across."""
    n = len(images)
    pairs = n * (n - 1) // 2
    originals, rates = [], []
    for embedder in embedders:
        start = time.perf_counter()
        originals.append(embedder.embed(images))
        rates.append(n / (time.perf_counter() - start))
    cuts = [threshold(vectors) for vectors in originals]
    recalls: dict[str, list[float]] = {}
    for number, (name, edit) in enumerate(BENCHMARK_EDITS.items()):
        copies = [edit(image, np.random.default_rng([number, i])) for i, image in enumerate(images)]
        recalls[name] = [
            float(((embedder.embed(copies) * vectors).sum(1) > cut).mean())
            for embedder, vectors, cut in zip(embedders, originals, cuts, strict=True)
        ]

    def line(name: str, cells: Sequence[str]) -> str:
        return f"| {name} | {' | '.join(cells)} |"

    return "\n".join(
        [
            f"{title}: {n:,} images, {pairs:,} pairs of different ones, {int(FALSE_PAIRS * pairs)} above the threshold",
            "",
            line("edit", [embedder.name for embedder in embedders]),
            "|---|" + "---:|" * len(embedders),
            *(line(name, [f"{recall:.1%}" for recall in found]) for name, found in recalls.items()),
            line("*mean*", [f"{mean:.1%}" for mean in np.mean(list(recalls.values()), axis=0)]),
            line("*threshold*", [f"{cut:.3f}" for cut in cuts]),
            line("*images/s*", [f"{rate:,.0f}" for rate in rates]),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("embedders", nargs="*", help="names, folders or files, beside the carried ones")
    parser.add_argument("--photographs", type=Path, help="a folder of images")
    parser.add_argument("--crops", type=int, default=1500, help="crops of the libraries' photographs")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    import torch

    torch.set_num_threads(arguments.threads)
    embedders = [load_embedder(name) for name in (*EMBEDDERS, *arguments.embedders)]
    sets: dict[str, Callable[[], list[Image.Image]]] = {
        "carried samples": carried_samples,
        "crops of library photographs": lambda: library_crops(arguments.crops),
    }
    if arguments.photographs:
        sets[arguments.photographs.name] = lambda: folder_images(arguments.photographs)
    for title, images in sets.items():
        found = distinct(images())
        if len(found) < 2:
            print(f"{title}: left out, there are none here\n", flush=True)
            continue
        print(table(title, found, embedders) + "\n", flush=True)


if __name__ == "__main__":
    main()
