"""Image embedders under a fixed set of edits: how many edited copies are found at one false pair in a million.

    python -m benchmarks.embedders                              the carried embedders on the carried samples
    python -m benchmarks.embedders transformers:clip sscd.pt    others beside them, by name, folder or file
    python -m benchmarks.embedders --photographs FOLDER         and on the images below a folder
    python -m benchmarks.embedders --shards A.tar B.tar         and on those of shards
    python -m benchmarks.embedders --at 0.9 --unseen            at curation's default threshold, see below

Sets: the carried samples (about 1,900 emoji), the photographs of scikit-image and scikit-learn that come with those
packages, where they are installed (their crops, see ``library_crops``), and the images of a folder or of shards. Of
images that look the same, mirrored or not, only one stays (two clocks a minute apart, drawn twice): a mean difference
of less than 8 grey levels.

The threshold is measured, not assumed: over all pairs of different images of the set, it is the least cosine that no
more than one pair in a million exceeds, n (n − 1) / 2 × 10⁻⁶ pairs. Below the number of pairs stands how many pairs
that is: where it is less than one, the threshold is the highest cosine of different images, and the estimate is
coarser than its name. An edited image counts as found where its cosine with the image it comes from is above the
threshold. Each edit has a seed of its own, so every embedder sees the same pixels.

``--at`` takes one threshold for all sets instead: the share of copies found there, the mean over the six edits that are
hard for where light, colour and edges lie (rotation by 3 to 15 degrees is the sixth), and what it costs: the share of
originals that would be dropped though they are nobody's copy, since an earlier one is above the threshold. With
``--unseen`` the images that ``layout``'s constants were chosen on are left out: every other sample, the crops of every
other photograph.
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
HARD = ("crop", "flip", "grayscale", "overlay", "border", "rotate")
MILD = ("jpeg", "resize", "brightness", "contrast", "blur")


# ----------------------------------------------------------------------------------------------------- images


def carried_samples() -> list[Image.Image]:
    """The carried emoji."""
    from curate.sample_set import load_part

    parts = ("pretrain", "finetune", "held_out")
    return [decode_image(sample.image) for part in parts for sample in load_part(part)]


def library_crops(rows: int, seed: int = 0, unseen: bool = False) -> list[Image.Image]:
    """Crops of the photographs that scikit-image and scikit-learn carry; empty where neither is installed.

    Args:
        rows: how many crops at most, spread evenly over the photographs. Each is a square of 64 to 160 pixels with
            something to see (its grey values deviate by 12 of 255 or more), and shares less than a tenth of its area
            with an earlier crop of the same photograph.
        seed: of places and sizes.
        unseen: of every second photograph only.
    """
    pictures = library_photographs()[1::2] if unseen else library_photographs()
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


def shard_images(shards: Sequence[str]) -> list[Image.Image]:
    """The images of tar shards, in their order."""
    from curate.reading.samples import Sample, read_samples

    samples = (sample for shard in shards for sample in read_samples(shard) if isinstance(sample, Sample))
    return [decode_image(sample.image) for sample in samples]


def distinct(images: Sequence[Image.Image]) -> list[Image.Image]:
    """Less those that look like an earlier one or its mirror image: on average less than ``DIFFERENT`` levels apart.

    They are compared at 32 × 32 pixels.
    """
    pixels = stack_images(images, 32) * 255
    mirrored, pixels = (p.reshape(len(images), 3 * 32 * 32) for p in (pixels[..., ::-1], pixels))
    kept: list[int] = []
    for i in range(len(images)):
        apart = [np.abs(pixels[kept] - other[i]).mean(1).min() for other in (pixels, mirrored)] if kept else [DIFFERENT]
        if min(apart) >= DIFFERENT:
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


def table_at(cut: float, title: str, images: Sequence[Image.Image], embedders: Sequence[Embedder]) -> str:
    """A Markdown table of the share of copies above ``cut``, and of different images that are above it too."""
    originals = [embedder.embed(images) for embedder in embedders]
    rows: dict[str, list[float]] = {}
    for number, name in enumerate(HARD + MILD):
        copies = [edits.EDITS[name](image, np.random.default_rng([number, i])) for i, image in enumerate(images)]
        rows[name] = [
            float(((embedder.embed(copies) * vectors).sum(1) > cut).mean())
            for embedder, vectors in zip(embedders, originals, strict=True)
        ]
    rows["*mean of the six hard ones*"] = list(np.mean([rows[name] for name in HARD], axis=0))
    earlier = [np.tril(vectors @ vectors.T, -1).max(1) for vectors in originals]
    rows["*originals dropped*"] = [float((nearest > cut).mean()) for nearest in earlier]
    return "\n".join(
        [
            f"{title}: {len(images):,} images, threshold {cut:g}",
            "",
            f"| edit | {' | '.join(embedder.name for embedder in embedders)} |",
            "|---|" + "---:|" * len(embedders),
            *(f"| {name} | {' | '.join(f'{share:.1%}' for share in shares)} |" for name, shares in rows.items()),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("embedders", nargs="*", help="names, folders or files, beside the carried ones")
    parser.add_argument("--photographs", type=Path, help="a folder of images")
    parser.add_argument("--shards", nargs="+", default=[], help="tar files of images")
    parser.add_argument("--at", type=float, help="one threshold for all, instead of a measured one")
    parser.add_argument("--unseen", action="store_true", help="without what layout's constants were chosen on")
    parser.add_argument("--crops", type=int, default=1500, help="crops of the libraries' photographs")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    import torch

    torch.set_num_threads(arguments.threads)
    embedders = [load_embedder(name) for name in (*EMBEDDERS, *arguments.embedders)]
    sets: dict[str, Callable[[], list[Image.Image]]] = {
        "carried samples": carried_samples,
        "crops of library photographs": lambda: library_crops(arguments.crops, unseen=arguments.unseen),
    }
    if arguments.photographs:
        sets[arguments.photographs.name] = lambda: folder_images(arguments.photographs)
    if arguments.shards:
        sets["shards"] = lambda: shard_images(arguments.shards)
    for title, images in sets.items():
        found = distinct(images())
        if arguments.unseen and title == "carried samples":
            found = found[1::2]
        if len(found) < 2:
            print(f"{title}: left out, there are none here\n", flush=True)
            continue
        text = (
            table(title, found, embedders) if arguments.at is None else table_at(arguments.at, title, found, embedders)
        )
        print(text + "\n", flush=True)


if __name__ == "__main__":
    main()
