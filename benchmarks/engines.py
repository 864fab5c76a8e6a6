"""``curate dedup`` on Ray, or of an older commit, beside this machine's processes: seconds in turn, and their ratios.

    python -m benchmarks.engines                              4,000 photographs, three rounds
    python -m benchmarks.engines --images 20000 --sides local ray cluster --folder runs/benchmarks/engines
    git worktree add ../former COMMIT && python -m benchmarks.engines --sides local former --former ../former

The photographs are made up: JPEGs of 512 pixels of coloured fields of noise at several scales, a tenth of them coded
anew from others. Each run is a process of its own with the same number of workers; all of its time counts, and the
start of the interpreter and of Ray with it; the side ``cluster`` goes to a Ray that runs already. Sides take turns, so
that what else the machine does befalls all alike. CPU seconds are those of a side's process and of all that it waited
for: Ray's workers are not among them. Ray is an extra.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
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
SIDES = ("local", "ray", "cluster", "former")


def photograph(number: int, seed: int) -> bytes:
    """A JPEG; every tenth is another quality of the one before."""
    copy = number % 10 == 9
    rng = np.random.default_rng([seed, number - copy])
    fields = [128 + grain(SIDE, rng, SCALES) for _ in range(3)]
    buffer = io.BytesIO()
    pixels = np.stack(fields, axis=-1).clip(0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG", quality=70 if copy else 92)
    return buffer.getvalue()


def write(folder: Path, seed: int, shard: int) -> None:
    """One shard of photographs with captions."""

    def samples() -> Iterator[tuple[str, dict[str, bytes]]]:
        for number in range(shard * PER_SHARD, (shard + 1) * PER_SHARD):
            yield f"{number:06d}", {"jpg": photograph(number, seed), "txt": f"photograph {number} of {seed}".encode()}

    write_shard(folder / f"{shard:06d}.tar", samples())


def curate(shards: Sequence[Path], out: Path, side: str, workers: int, former: Path | None) -> tuple[float, str]:
    """Seconds of the whole process; and in words those of each stage, and its CPU seconds."""
    engine = {"former": "local", "cluster": "ray:auto"}.get(side, side)
    root = former if side == "former" else Path.cwd()
    command = [sys.executable, "-m", "curate", "dedup", *map(str, shards), str(out), "--engine", engine, "--json"]
    environment = os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [*command, "--workers", str(workers)], capture_output=True, text=True, cwd=root, env=environment
    )
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{done.stderr}")
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    stages = ", ".join(f"{name} {took:.1f}" for name, took in json.loads(done.stdout)["stages"].items())
    return seconds, f"{stages}; {cpu:.1f} CPU s"


@contextlib.contextmanager
def running_cluster(workers: int) -> Iterator[None]:
    """Ray on this machine, started by hand as a cluster's is, with as many processors as there are workers."""
    ray = [sys.executable, "-m", "ray.scripts.scripts"]
    start = [*ray, "start", "--head", f"--num-cpus={workers}", "--include-dashboard=false"]
    path = f"{Path.cwd()}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    environment = os.environ | {"PYTHONPATH": path, "RAY_worker_niceness": "0"}  # else it gives way to all others
    subprocess.run(start, check=True, capture_output=True, env=environment)
    try:
        yield
    finally:
        subprocess.run([*ray, "stop"], check=True, capture_output=True)


def digest(out: Path) -> str:
    """Of all files that a curation promises to write alike."""
    whole = hashlib.sha256()
    for path in sorted(out.rglob("*")):
        if path.is_file() and path.relative_to(out).parts[0] != "work":
            whole.update(f"{path.relative_to(out)}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return whole.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=4000, help=f"a multiple of {PER_SHARD}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=["local", "ray"], help="others beside the first")
    parser.add_argument("--former", type=Path, help="a checkout of an older commit, for the side former")
    parser.add_argument("--workers", type=int, default=cpu_count())
    parser.add_argument("--folder", type=Path, help="where the photographs stay for another time")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.images < 1 or arguments.images % PER_SHARD:
        parser.error(f"--images is a multiple of {PER_SHARD}")
    if "former" in arguments.sides and arguments.former is None:
        parser.error("the side former needs --former")
    former = arguments.former and arguments.former.resolve()
    print(f"{cpu_count()} cores, load {os.getloadavg()[0]:.1f} before the start", flush=True)
    seconds: dict[str, list[float]] = {side: [] for side in arguments.sides}
    digests: dict[str, set[str]] = {side: set() for side in arguments.sides}
    with tempfile.TemporaryDirectory() as scratch:
        folder = (arguments.folder or Path(scratch) / "shards").resolve() / f"seed-{arguments.seed}"
        folder.mkdir(parents=True, exist_ok=True)
        names = {shard: folder / f"{shard:06d}.tar" for shard in range(arguments.images // PER_SHARD)}
        missing = [shard for shard, path in names.items() if not path.is_file()]
        LocalEngine(0).map(partial(write, folder, arguments.seed), missing, desc="making")
        shards = list(names.values())
        for number in range(arguments.rounds):
            for side in arguments.sides[:: 1 if number % 2 == 0 else -1]:
                out = Path(scratch) / f"{side}-{number}"
                with running_cluster(arguments.workers) if side == "cluster" else contextlib.nullcontext():
                    whole, told = curate(shards, out, side, arguments.workers, former)
                seconds[side].append(whole)
                digests[side].add(digest(out))
                shutil.rmtree(out)
                print(f"{arguments.images:,} photographs, {side}: {whole:.1f} s ({told})", flush=True)
    first, *others = ((side, statistics.median(seconds[side])) for side in arguments.sides)
    for side, median in others:
        same = len(digests[first[0]] | digests[side]) == 1
        print(
            f"{side} {median:.1f} s, {first[0]} {first[1]:.1f} s: {median / first[1]:.2f} times; the same bytes: {same}"
        )


if __name__ == "__main__":
    main()
