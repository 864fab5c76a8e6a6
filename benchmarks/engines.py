"""``curate dedup`` on Ray beside this machine's processes: seconds in turn, their ratio, and whether the bytes agree.

    python -m benchmarks.engines                              4,000 photographs, three rounds
    python -m benchmarks.engines --images 20000 --rounds 1

The photographs are made up: JPEGs of 512 pixels of coloured fields of noise at several scales, a tenth of them coded
anew from others. Each run is a process of its own with the same number of workers; all of its time counts, and the
start of the interpreter and of Ray with it. Engines take turns, so that what else the machine does befalls both alike.
Needs the extra ``ray``.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from afresh.cores import cpu_count
from benchmarks.photographs import grain
from curate.engines.local import LocalEngine
from curate.reading.writing import write_shard

PER_SHARD = 500
SIDE = 512
SCALES = ((256, 60.0), (64, 30.0), (8, 12.0), (1, 3.0))
ENGINES = ("local", "ray")


def photograph(number: int, seed: int) -> bytes:
    """A JPEG; every tenth is another quality of the one before."""
    copy = number % 10 == 9
    rng = np.random.default_rng([seed, number - copy])
    fields = [128 + grain(SIDE, rng, SCALES) for _ in range(3)]
    buffer = io.BytesIO()
    pixels = np.stack(fields, axis=-1).clip(0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG", quality=70 if copy else 92)
    return buffer.getvalue()


def write(folder: Path, images: int, seed: int, shard: int) -> None:
    """One shard of photographs with captions."""

    def samples() -> Iterator[tuple[str, dict[str, bytes]]]:
        for number in range(shard * PER_SHARD, min(images, (shard + 1) * PER_SHARD)):
            yield f"{number:06d}", {"jpg": photograph(number, seed), "txt": f"photograph {number} of {seed}".encode()}

    write_shard(folder / f"{shard:06d}.tar", samples())


def curate(shards: Path, out: Path, engine: str, workers: int) -> tuple[float, dict[str, float]]:
    """Seconds of the whole process, and of each stage."""
    command = [sys.executable, "-m", "curate", "dedup", str(shards), str(out), "--engine", engine, "--json"]
    start = time.perf_counter()
    done = subprocess.run([*command, "--workers", str(workers)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{engine} failed:\n{done.stderr}")
    seconds = time.perf_counter() - start
    return seconds, json.loads(done.stdout)["stages"]


def digest(out: Path) -> str:
    """Of all files that a curation promises to write alike."""
    whole = hashlib.sha256()
    for path in sorted(out.rglob("*")):
        if path.is_file() and path.relative_to(out).parts[0] != "work":
            whole.update(f"{path.relative_to(out)}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return whole.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=cpu_count())
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(f"{cpu_count()} cores, load {os.getloadavg()[0]:.1f} before the start", flush=True)
    seconds: dict[str, list[float]] = {engine: [] for engine in ENGINES}
    digests = set()
    with tempfile.TemporaryDirectory() as scratch:
        shards = Path(scratch) / "shards"
        shards.mkdir()
        some = range(-(-arguments.images // PER_SHARD))
        LocalEngine(0).map(partial(write, shards, arguments.images, arguments.seed), some, desc="making")
        for number in range(arguments.rounds):
            for engine in ENGINES[:: 1 if number % 2 == 0 else -1]:
                out = Path(scratch) / f"{engine}-{number}"
                whole, stages = curate(shards, out, engine, arguments.workers)
                seconds[engine].append(whole)
                digests.add(digest(out))
                told = ", ".join(f"{name} {took:.1f}" for name, took in stages.items())
                print(f"{arguments.images:,} photographs, {engine}: {whole:.1f} s ({told})", flush=True)
    local, ray = (statistics.median(seconds[engine]) for engine in ENGINES)
    print(f"ray {ray:.1f} s, local {local:.1f} s: {ray / local:.2f} times; the same bytes: {len(digests) == 1}")


if __name__ == "__main__":
    main()
