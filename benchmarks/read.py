"""The read stage of ``curate dedup``: images a second, the share of decoding, and memory against the number of images.

    python -m benchmarks.read                                 4,000 images, 1 worker and 2, both kinds of hash
    python -m benchmarks.read --images 20000 --workers 2
    python -m benchmarks.read --embedder copy-detector        with a network, and what each device did
    python -m benchmarks.read --memory                        peak memory over 1,000 to 16,000 images in one shard
    python -m benchmarks.read --write                         the carried samples written by us and by webdataset

The images are JPEGs of 512 pixels a side, quality 85: carried sample images, two by two, enlarged, shaded and given
grain at several scales, so that they are about as large as photographs of that size. They are made once, and stand in
one shard or several. A run is a process of its own; its seconds are those of the stage, without the start of the
interpreter and the imports (but with those of worker processes, which several shards have). Its CPU seconds, of all
its threads and workers, hardly depend on what else the machine does. The share of decoding is measured apart, on one
thread: CPU seconds in which the images are decoded, at the scale that the stage asks for, over those of the stage with
one worker. Peak memory is what the process and its workers gain over its state before the stage (Linux).
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from afresh.cores import cpu_count
from benchmarks.photographs import grain
from curate.config import DedupConfig

SIDE = 512


def photographs(count: int, seed: int = 0) -> Iterator[bytes]:
    """Encoded images; see the head of this file."""
    from curate.reading.images import decode_image
    from curate.sample_set import load_part

    images = [decode_image(sample.image) for sample in load_part("pretrain")]
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE
    noise = [grain(SIDE, rng, ((1, 4), (2, 6), (4, 8), (8, 12))) for _ in range(16)]  # drawn once: it takes long
    for _ in range(count):
        canvas = Image.new("RGB", (SIDE, SIDE))
        for quarter in range(4):
            part = images[rng.integers(len(images))].resize((SIDE // 2, SIDE // 2), Image.Resampling.BICUBIC)
            canvas.paste(part, (SIDE // 2 * (quarter % 2), SIDE // 2 * (quarter // 2)))
        light = 50 * np.sin(rng.uniform(2, 9) * x + rng.uniform(0, 6)) * np.cos(rng.uniform(2, 9) * y)
        texture = np.roll(noise[rng.integers(16)], tuple(rng.integers(0, SIDE, 2)), (0, 1))
        pixels = np.asarray(canvas, np.float32) * 0.6 + (60 + light + texture)[..., None]
        buffer = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=85)
        yield buffer.getvalue()


def write_shards(folder: Path, images: int, shards: int, distinct: int | None = None) -> float:
    """``shards`` files in ``folder`` with ``images`` samples together; gives the mean size of an image in bytes.

    With ``distinct`` only so many are made, and come again under other names and captions.
    """
    from curate.reading.writing import write_shard

    made = photographs(images) if distinct is None else itertools.cycle(list(photographs(distinct)))
    total = 0

    def samples(start: int, stop: int) -> Iterator[tuple[str, dict[str, bytes]]]:
        nonlocal total
        for number in range(start, stop):
            data = next(made)
            total += len(data)
            yield f"{number:06d}", {"jpg": data, "txt": b"photograph %d" % number}

    for shard in range(shards):
        borders = (shard * images // shards, (shard + 1) * images // shards)
        write_shard(folder / f"{shard:06d}.tar", samples(*borders))
    return total / images


def _stage(folder: str, changes: dict[str, object], answer: str) -> None:
    """In a process of its own: run the stage and leave its figures in ``answer``."""
    from curate.engines.local import LocalEngine
    from curate.reading.urls import expand_shards, shard_names
    from curate.stages.read import cached_embedder, read_stage

    config = DedupConfig(shards=[folder], **changes)  # type: ignore[arg-type]
    urls = expand_shards(config.shards)
    cached_embedder(config.image_embedder).embed([Image.new("RGB", (SIDE, SIDE))])  # imports and constants
    with tempfile.TemporaryDirectory() as out:
        (Path(out) / "read").mkdir()
        keys = [f"{number}" for number in range(len(urls))]
        engine = LocalEngine(config.workers)
        with PeakMemory() as memory:
            start, cpu = time.perf_counter(), cpu_seconds()
            read_stage(engine, Path(out), urls, shard_names(urls), keys, config)
            seconds, cpu = time.perf_counter() - start, cpu_seconds() - cpu
    Path(answer).write_text(json.dumps({"seconds": seconds, "cpu": cpu, "bytes": memory.gained}))


def cpu_seconds() -> float:
    """CPU seconds of this process and the child processes that have ended."""
    return sum(os.times()[:4])


class PeakMemory:
    """Samples the resident memory of this process and its children; ``gained`` over the start at most."""

    def __enter__(self) -> PeakMemory:
        self.before = self.peak = resident()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.05):
            self.peak = max(self.peak, resident())

    @property
    def gained(self) -> int:
        """Bytes."""
        return self.peak - self.before


def resident() -> int:
    """Resident memory of this process and its child processes, in bytes."""
    tasks = [Path("/proc/self"), *(Path(f"/proc/{child.pid}") for child in multiprocessing.active_children())]
    total = 0
    for task in tasks:
        try:
            lines = (task / "status").read_text().splitlines()
        except OSError:  # it has just ended
            continue
        total += 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))
    return total


def measure(folder: Path, **changes: object) -> dict[str, float]:
    """Seconds and bytes of one run."""
    with tempfile.TemporaryDirectory() as scratch:
        answer = Path(scratch) / "answer.json"
        process = multiprocessing.get_context("spawn").Process(target=_stage, args=(str(folder), changes, str(answer)))
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit("the stage failed")
        return json.loads(answer.read_text())


def decoding(folder: Path, pixel_hash: bool, embedder: str) -> float:
    """CPU seconds in which all images are decoded on this thread, at the stage's scale for an embedder."""
    from curate.embed.registry import load_embedder
    from curate.reading.images import decode_scaled
    from curate.reading.samples import Sample, read_samples
    from curate.reading.urls import expand_shards
    from curate.stages.read import SCALE_TO_SPARE

    at_least = None if pixel_hash else SCALE_TO_SPARE * load_embedder(embedder).size
    seconds = 0.0
    for url in expand_shards(str(folder)):
        for sample in read_samples(url):
            assert isinstance(sample, Sample)
            start = time.thread_time()
            decode_scaled(sample.image, at_least)
            seconds += time.thread_time() - start
    return seconds


def speed(images: int, shards: int, workers: list[int], embedder: str, gpu_share: float) -> None:
    """Print images a second for each kind of hash and number of workers."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        size = write_shards(folder, images, shards)
        print(
            f"{images:,} JPEGs of {SIDE} × {SIDE}, {size / 1000:.0f} kB each, in {shards} shards; embedder {embedder}; "
            f"{cpu_count()} cores, load {os.getloadavg()[0]:.1f} before the start",
            flush=True,
        )
        for pixel_hash in (True, False):
            scale = "whole, pixel_hash: true " if pixel_hash else "reduced, pixel_hash: false"
            share = decoding(folder, pixel_hash, embedder)
            for number in workers:
                settings = {"image_embedder": embedder, "gpu_share": gpu_share, "pixel_hash": pixel_hash}
                figures = measure(folder, workers=number, **settings)
                seconds, cpu = figures["seconds"], figures["cpu"]
                decoded = f", decoding {share / cpu:.0%} of them" if number == 1 else ""
                print(
                    f"decoded {scale}, {number} workers: {images / seconds:,.0f} images/s ({seconds:.1f} s, "
                    f"{cpu:.1f} CPU s{decoded}), peak memory +{figures['bytes'] / 1e6:.0f} MB",
                    flush=True,
                )


def memory(workers: list[int]) -> None:
    """Print the peak memory over a growing number of images in one shard."""
    for images in (1000, 4000, 16_000):
        with tempfile.TemporaryDirectory() as scratch:
            size = write_shards(Path(scratch), images, 1, distinct=500)
            for number in workers:
                gained = measure(Path(scratch), workers=number)["bytes"]
                print(
                    f"{images:,} images in one shard of {images * size / 1e6:,.0f} MB, {number} workers: "
                    f"peak memory +{gained / 1e6:.0f} MB",
                    flush=True,
                )


def writers(rounds: int = 7) -> None:
    """Print what writing the carried samples takes with ``write_shard`` and with webdataset's writer, in turn.

    webdataset sorts a sample's members by extension, so it is given one member at a time, which keeps their order. The
    seconds are the least of all rounds; those of the import are of a fresh interpreter each.
    """
    from curate.reading.samples import Sample, read_samples
    from curate.reading.writing import write_shard
    from curate.sample_set import sample_shards

    start = time.perf_counter()
    from webdataset import TarWriter

    importing = time.perf_counter() - start
    samples = [item for url in sample_shards() for item in read_samples(url) if isinstance(item, Sample)]

    def ours(path: Path) -> None:
        write_shard(path, ((sample.key, sample.members) for sample in samples))

    def theirs(path: Path) -> None:
        fixed = {"user": "", "group": "", "mode": 0o644, "mtime": 0, "encoder": False, "keep_meta": True}
        with open(path, "wb", buffering=1 << 20) as file, TarWriter(file, **fixed) as writer:
            for sample in samples:
                for ext, data in sample.members.items():
                    writer.write({"__key__": sample.key, ext: data})

    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        paths = {write.__name__: Path(scratch) / write.__name__ for write in (ours, theirs)}
        for _ in range(rounds):
            for write in (ours, theirs):
                start = time.perf_counter()
                write(paths[write.__name__])
                took = time.perf_counter() - start
                seconds[write.__name__] = min(took, seconds.get(write.__name__, took))
        equal = paths["ours"].read_bytes() == paths["theirs"].read_bytes()
    print(
        f"{len(samples):,} samples of {sum(len(sample.members) for sample in samples) / len(samples):.1f} members: "
        f"write_shard {seconds['ours']:.3f} s, webdataset.TarWriter {seconds['theirs']:.3f} s "
        f"({seconds['theirs'] / seconds['ours']:.1f} times), and {importing:.2f} s to import it with torch; "
        f"{'equal' if equal else 'other'} bytes"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--embedder", default="layout", help="as curate dedup's image_embedder")
    parser.add_argument("--gpu_share", type=float, default=1.0, help="as curate dedup's")
    parser.add_argument("--memory", action="store_true", help="peak memory against the number of images")
    parser.add_argument("--write", action="store_true", help="writing shards, by us and by webdataset")
    arguments = parser.parse_args()
    if arguments.write:
        writers()
    elif arguments.memory:
        memory(arguments.workers)
    else:
        speed(
            arguments.images, arguments.shards, arguments.workers, arguments.embedder, arguments.gpu_share
        )


if __name__ == "__main__":
    main()
