"""``curate dedup`` from tar shards to its report beside imagededup: images a second, what is found, and peak memory.

    python -m benchmarks.curation                             20,000 photographs, all sides
    python -m benchmarks.curation --images 4000 --sides curate phash --rounds 3
    python -m benchmarks.curation --curve                     ours alone: peak memory over 2,500 to 20,000 photographs

The images are made once and stay in ``--folder``: JPEGs with a shorter side of 512 pixels, random crops in other
colours of the photographs that scikit-image and scikit-learn carry (``benchmarks/photographs.py``), a tenth of them
planted copies of earlier ones, with captions; as shards, and as the folder of files that imagededup reads. All of
them are read once before the clock starts.

Sides, each a process of its own, one after the other, with the same number of workers:

- ``curate``: the command line with its default settings; all of its time counts, the interpreter's start included.
- ``phash``: imagededup's ``PHash().encode_images`` and ``find_duplicates`` with their default settings, without the
  time of imports.
- ``cnn``: imagededup's ``CNN().encode_images`` on the first ``--cnn_images``. Where its weights are not in torch's
  cache the same network has random ones, which take the same time and find nothing of worth: ``find_duplicates`` is
  left out.

A planted copy counts as found where imagededup lists it with its original, and where ours has put both into one
group and does not keep both. Decoding is measured apart in the same run: the CPU seconds in which as many processes
decode all images at the scale that curation asks for; shared out among them, they are the least that the job could
take. Memory is resident memory summed over the process and its children, so that libraries that they share count
once for each.

imagededup is no part of the project: ``pip install imagededup scikit-image``. Its CNN needs a torchvision of torch's
own build.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray
from PIL import Image

from afresh.cores import cpu_count
from benchmarks.embedders import BENCHMARK_EDITS
from benchmarks.photographs import SHORTER_SIDE, grain, library_photographs, photograph
from benchmarks.read import cpu_seconds, decoding
from curate.embed.ngrams import NgramEmbedder
from curate.engines.local import LocalEngine
from curate.reading.writing import write_shard
from curate.results.ledger import KEPT, read_ledger

FORMAT = 1  # of the images: those of another one are made again
PER_SHARD = 500
COPIES = 0.1
SAME_BYTES = "same bytes"
KINDS = (SAME_BYTES, "JPEG 60", "JPEG 30", "resize 50 %", "brightness", "contrast", "text", "crop 10 %")
CURVE = (2500, 5000, 10_000, 20_000)
WORDS = ("amber", "birch", "cedar", "dune", "ember", "fjord", "grove", "harbour", "iris", "juniper", "kelp", "lagoon",
         "maple", "nettle", "orchard", "pine")  # fmt: skip

Copies = list[tuple[int, int, str]]


# -------------------------------------------------------------------------------------------------- images


def planted(images: int, seed: int) -> Copies:
    """``(copy, original, kind)``: which images are copies of which earlier ones; those of fewer images come first."""
    originals: list[int] = []
    copies: Copies = []
    for number, (whether, which, how) in enumerate(np.random.default_rng(seed).random((images, 3)).tolist()):
        if originals and whether < COPIES:
            copies.append((number, originals[int(which * len(originals))], KINDS[int(how * len(KINDS))]))
        else:
            originals.append(number)
    return copies


def encoded(number: int, seed: int, copy_of: tuple[int, str] | None = None) -> bytes:
    """The JPEG of an image, or of a copy: ``copy_of`` is its original and the kind."""
    rng = np.random.default_rng([seed, number])
    if copy_of is None:
        image = photograph(*_sources(seed), rng)
        return _jpeg(image, quality=int(rng.integers(75, 96)))
    original, kind = encoded(copy_of[0], seed), copy_of[1]
    if kind == SAME_BYTES:
        return original
    return _jpeg(BENCHMARK_EDITS[kind](Image.open(io.BytesIO(original)).convert("RGB"), rng), quality=90)


@lru_cache(maxsize=1)
def _sources(seed: int) -> tuple[list[Image.Image], NDArray[np.int16]]:
    noise = grain(1024, np.random.default_rng(seed), ((1, 3.0), (2, 3.0)))
    return library_photographs(), noise.astype(np.int16)


def _jpeg(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def make(folder: Path, images: int, seed: int, workers: int) -> Path:
    """The folder with ``images/``, ``shards/`` and, last, ``made``; filled where it is not whole yet."""
    folder = folder / f"photographs-{FORMAT}-{images}-{seed}"
    if (folder / "made").is_file():
        return folder
    if not library_photographs():
        raise SystemExit("there are no photographs to start from: pip install scikit-image scikit-learn")
    print(f"making {images:,} photographs in {folder}", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    for name in ("images", "shards"):
        (folder / name).mkdir(parents=True)
    write = partial(_write, folder, images, seed)
    LocalEngine(workers).map(write, range(-(-images // PER_SHARD)), desc="making")
    (folder / "made").touch()
    return folder


def _write(folder: Path, images: int, seed: int, shard: int) -> None:
    """One shard, and the same images as files."""
    copies = {copy: (original, kind) for copy, original, kind in planted(images, seed)}

    def samples() -> Iterator[tuple[str, dict[str, bytes]]]:
        for number in range(shard * PER_SHARD, min(images, (shard + 1) * PER_SHARD)):
            data = encoded(number, seed, copies.get(number))
            (folder / "images" / f"{number:06d}.jpg").write_bytes(data)
            words = np.random.default_rng([seed, 1, number]).choice(WORDS, 4)
            yield f"{number:06d}", {"jpg": data, "txt": f"{' '.join(words)}, photograph {number}".encode()}

    write_shard(folder / "shards" / f"{shard:06d}.tar", samples())


# --------------------------------------------------------------------------------------------------- sides


def watched(command: Sequence[str], workers: int) -> tuple[dict[str, Any], dict[str, float]]:
    """Run a command that prints JSON.

    Returns:
        What it printed on its last line; and ``seconds``, ``cpu`` seconds and ``peak`` bytes of all its processes.
    """
    threads = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    environment = {**os.environ, **dict.fromkeys(threads, str(workers))}
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        start, cpu, peak = time.perf_counter(), cpu_seconds(), 0
        process = psutil.Popen(command, stdout=stdout, stderr=stderr, env=environment)
        while process.poll() is None:
            peak = max(peak, _resident(process))
            time.sleep(0.02)
        figures = {"seconds": time.perf_counter() - start, "cpu": cpu_seconds() - cpu, "peak": peak}
        stdout.seek(0)
        stderr.seek(0)
        if process.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{stderr.read().decode()}")
        return json.loads(stdout.read().splitlines()[-1]), figures


def _resident(process: psutil.Process) -> int:
    """Bytes of a process and its children."""
    total = 0
    with contextlib.suppress(psutil.NoSuchProcess):
        for one in (process, *process.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
                total += one.memory_info().rss
    return total


def run_curate(folder: Path, workers: int, images: int) -> dict[str, Any]:
    """``curate dedup`` on the first ``images``, whole shards.

    Returns:
        Its summary; figures of the whole process, as of ``watched``; ``held``, the bytes of the embeddings of images
        and captions and of the ledger; and ``found``, a function ``(copy, original) → bool``.
    """
    shards = [str(folder / "shards" / f"{shard:06d}.tar") for shard in range(-(-images // PER_SHARD))]
    with tempfile.TemporaryDirectory(dir=folder) as out:
        command = [sys.executable, "-m", "curate", "dedup", *shards, out, "--workers", str(workers), "--json"]
        summary, figures = watched(command, workers)
        ledger = read_ledger(out)
        of_images = (Path(out) / "index" / "embeddings.npy").stat().st_size
    held = ledger.nbytes + of_images + 2 * NgramEmbedder.dim * len(set(ledger["caption"].to_pylist()))
    group, status = ledger["group"].to_pylist(), ledger["status"].to_pylist()

    def found(copy: int, original: int) -> bool:
        return group[copy] == group[original] and {status[copy], status[original]} != {KEPT}

    return {**summary, **figures, "held": held, "found": found}


def run_imagededup(method: str, folder: Path, workers: int) -> dict[str, Any]:
    """``phash`` or ``cnn`` on the images of a folder: what it prints, and ``peak`` of the whole process."""
    code = f"import benchmarks.curation as b; b.{method}({str(folder)!r}, {workers})"
    answer, figures = watched([sys.executable, "-c", code], workers)
    return {"peak": figures["peak"], **answer}


def phash(folder: str, workers: int) -> None:
    """In a process of its own: print ``seconds``, ``encoding`` of them, ``cpu`` seconds, pairs, and images to drop."""
    from imagededup.methods import PHash
    from imagededup.utils.general_utils import get_files_to_remove

    start, cpu = time.perf_counter(), cpu_seconds()
    hasher = PHash(verbose=False)
    codes = hasher.encode_images(folder, num_enc_workers=workers)
    encoding = time.perf_counter() - start
    duplicates = hasher.find_duplicates(encoding_map=codes, num_dist_workers=workers)
    seconds, cpu = time.perf_counter() - start, cpu_seconds() - cpu
    pairs = [[int(Path(one).stem), int(Path(other).stem)] for one, near in duplicates.items() for other in near]
    dropped = len(get_files_to_remove(duplicates))
    print(json.dumps({"seconds": seconds, "encoding": encoding, "cpu": cpu, "pairs": pairs, "dropped": dropped}))


def cnn(folder: str, workers: int) -> None:
    """In a process of its own: print ``seconds`` of ``encode_images``, ``images``, and whether it is ``trained``."""
    import torch
    from imagededup.methods import CNN
    from imagededup.utils.models import CustomModel, MobilenetV3
    from torchvision import models

    weights = models.MobileNet_V3_Small_Weights.IMAGENET1K_V1
    trained = (Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name).is_file()
    config = None
    if not trained:
        network = models.mobilenet_v3_small(weights=None).eval()
        model = torch.nn.Sequential(network.features, network.avgpool, torch.nn.Flatten())
        config = CustomModel(name=MobilenetV3.name, model=model, transform=MobilenetV3.transform)
    encoder = CNN(verbose=False, model_config=config)
    start = time.perf_counter()
    codes = encoder.encode_images(folder, num_enc_workers=workers)
    print(json.dumps({"seconds": time.perf_counter() - start, "images": len(codes), "trained": trained}))


def decoding_seconds(folder: Path, workers: int) -> float:
    """CPU seconds in which ``workers`` processes decode all images at curation's scale."""
    shards = sorted((folder / "shards").glob("*.tar"))
    return sum(LocalEngine(workers).map(partial(decoding, pixel_hash=False), shards, desc="decoding"))


# ------------------------------------------------------------------------------------------------- printing


def tell_curate(folder: Path, images: int, copies: Copies, workers: int) -> float:
    """Run ours and print its figures; gives images a second."""
    figures = run_curate(folder, workers, images)
    seconds, cpu, decoded = figures["seconds"], figures["cpu"], decoding_seconds(folder, workers)
    stages = ", ".join(f"{name} {lap:.1f}" for name, lap in figures["stages"].items())
    outside = seconds - sum(figures["stages"].values())
    print(
        f"curate dedup: {seconds:.1f} s, {images / seconds:,.0f} images/s ({stages}, before and after {outside:.1f}); "
        f"{cpu:.1f} CPU s, of them decoding {decoded:.1f} s, {decoded / cpu:.0%}; decoding alone would take "
        f"{decoded / workers:.1f} s, {decoded / workers / seconds:.0%}"
    )
    print(f"  peak memory {figures['peak'] / 1e6:,.0f} MB; kept {figures['kept']:,}, dropped {figures['dropped']:,}")
    print(found_by_kind(copies, figures["found"]), flush=True)
    return images / seconds


def tell_phash(folder: Path, images: int, copies: Copies, workers: int) -> float:
    """Run imagededup's PHash and print its figures; gives images a second."""
    figures = run_imagededup("phash", folder / "images", workers)
    seconds, pairs, dropped = figures["seconds"], set(map(tuple, figures["pairs"])), figures["dropped"]
    print(
        f"imagededup PHash: {seconds:.1f} s, {images / seconds:,.0f} images/s (encode_images "
        f"{figures['encoding']:.1f}, find_duplicates {seconds - figures['encoding']:.1f}); {figures['cpu']:.1f} CPU s"
    )
    print(f"  peak memory {figures['peak'] / 1e6:,.0f} MB; kept {images - dropped:,}, dropped {dropped:,}")
    print(found_by_kind(copies, lambda copy, original: (copy, original) in pairs), flush=True)
    return images / seconds


def tell_cnn(folder: Path, images: int, workers: int) -> float:
    """Run imagededup's CNN on the first ``images`` and print its figures; gives images a second."""
    with tempfile.TemporaryDirectory(dir=folder) as some:
        for file in sorted((folder / "images").iterdir())[:images]:
            os.link(file, Path(some) / file.name)
        figures = run_imagededup("cnn", Path(some), workers)
    rate = figures["images"] / figures["seconds"]
    weights = "its weights" if figures["trained"] else "random weights"
    print(
        f"imagededup CNN, encode_images alone, {weights}: {figures['seconds']:.1f} s for {figures['images']:,} images, "
        f"{rate:,.0f} images/s, peak memory {figures['peak'] / 1e6:,.0f} MB",
        flush=True,
    )
    return rate


def found_by_kind(copies: Copies, found: Callable[[int, int], bool]) -> str:
    """The share of the planted copies that are found, of all and by kind."""
    all_of = Counter(kind for _, _, kind in copies)
    hits = Counter(kind for copy, original, kind in copies if found(copy, original))
    kinds = ", ".join(f"{kind} {hits[kind] / all_of[kind]:.1%}" for kind in KINDS if all_of[kind])
    return f"  planted copies found: {hits.total() / all_of.total():.1%} ({kinds})"


def curve(folder: Path, workers: int, sizes: Sequence[int]) -> None:
    """Print the peak memory of ours on more and more of the images, and what each image adds to it."""
    before: dict[str, Any] = {}
    for images in sizes:
        figures = run_curate(folder, workers, images)
        line = (
            f"{images:,} images, {workers} workers: peak memory {figures['peak'] / 1e6:,.1f} MB; embeddings and ledger "
            f"are {figures['held'] / 1e6:,.1f} MB"
        )
        if before:
            more = images - before["samples"]
            gained, held = ((figures[name] - before[name]) / more for name in ("peak", "held"))
            line += f"; since {before['samples']:,} images {gained:,.0f} and {held:,.0f} bytes an image"
        print(line, flush=True)
        before = before or figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmarks"), help="where the images stay")
    parser.add_argument("--workers", type=int, default=cpu_count())
    parser.add_argument("--sides", nargs="+", choices=["curate", "phash", "cnn"], default=["curate", "phash", "cnn"])
    parser.add_argument("--cnn_images", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=1, help="how often all sides run; medians are compared")
    parser.add_argument("--curve", action="store_true", help="peak memory against the number of images, ours alone")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    images, workers = arguments.images, arguments.workers
    if not arguments.curve and arguments.sides != ["curate"] and not importlib.util.find_spec("imagededup"):
        raise SystemExit("imagededup is not installed: pip install imagededup, or --sides curate")
    folder = make(arguments.folder, images, arguments.seed, workers)
    size = sum(len(file.read_bytes()) for kind in ("shards", "images") for file in (folder / kind).iterdir()) / 2
    copies = planted(images, arguments.seed)
    print(
        f"{images:,} JPEGs, shorter side {SHORTER_SIDE} pixels, {size / images / 1000:.0f} kB each, {len(copies):,} of "
        f"them planted copies; {workers} workers on {cpu_count()} cores ({processor()}), load {os.getloadavg()[0]:.1f} "
        "before the start",
        flush=True,
    )
    if arguments.curve:
        curve(folder, workers, [number for number in CURVE if number < images] + [images])
        return
    tell: dict[str, Callable[[], float]] = {
        "curate": lambda: tell_curate(folder, images, copies, workers),
        "phash": lambda: tell_phash(folder, images, copies, workers),
        "cnn": lambda: tell_cnn(folder, min(images, arguments.cnn_images), workers),
    }
    rates: dict[str, list[float]] = {side: [] for side in arguments.sides}
    for _ in range(arguments.rounds):
        for side in arguments.sides:
            rates[side].append(tell[side]())
    for side in set(arguments.sides) - {"curate"} if "curate" in rates else ():
        ratio = statistics.median(rates["curate"]) / statistics.median(rates[side])
        print(f"images/s of curate dedup over those of imagededup's {side}: {ratio:.2f}")


def processor() -> str:
    """Its name, as the system has it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
