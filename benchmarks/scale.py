"""What curation does after the join, at a million rows: seconds and peak memory of each stage, and the report's size.

    python -m benchmarks.scale                                1,000,000 rows
    python -m benchmarks.scale --rows 100000 --keep DIR       and leave the result there, to look at its report
    python -m benchmarks.scale --profile                      and where the time goes

No million images are read and joined for that: the rows and their near pairs are made up, and the stages work on them
as in ``curate dedup``. The images that the report shows are real, out of shards of a thousand carried images that stand
for all shards. What is made up is what tends to be large: a tenth of the rows are equal copies of one image, another
tenth near copies of one image (a crowd, whose pairs are asked for one by one), 35 in a hundred stand in groups of two
to five near images and three in crowds of two hundred, one in a hundred is unreadable for a long reason; a fifth have
captions that two or three rows share, one in a hundred a caption of many, and a hundred captions have 100,000 letters.

Seconds are those of the stage; CPU seconds hardly depend on what else the machine does. Memory is the most that the
process holds while the stage runs, with all that earlier stages made (Linux).
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import os
import pstats
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from afresh.cores import cpu_count
from afresh.storage import Store
from curate.config import DedupConfig, ReportConfig
from curate.dedup import settings_of
from curate.engines.local import LocalEngine
from curate.neighbors.verify import Crowd, Pairs
from curate.reading.urls import fingerprint
from curate.stages.decide import decide_stage
from curate.stages.join import Joined
from curate.stages.publish import publish_index, publish_ledger, publish_report, summarise
from curate.stages.read import cached_embedder
from curate.stages.rows import READ_COLUMNS, Rows
from curate.stages.write import plan_shards

PER_SHARD = 1000
SHARDS = 4  # that stand for all
LONG = 100_000  # letters


def made_up(rows: int, folder: Path, seed: int = 0) -> tuple[Rows, Joined, list[str]]:
    """Rows, what is near what among them, and the shards; see the head of this file."""
    rng = np.random.default_rng(seed)
    unreadable = rng.random(rows) < 0.01
    readable = np.flatnonzero(~unreadable)
    image_of, vectors, pairs = _images(len(readable), rng)
    caption_of, captions = _captions(len(readable), rng)

    def spread(values: np.ndarray | list[Any]) -> list[Any]:
        column: list[Any] = [None] * rows
        for row, value in zip(readable.tolist(), values if isinstance(values, list) else values.tolist(), strict=True):
            column[row] = value
        return column

    number = np.arange(rows)
    texts = [captions[caption] for caption in caption_of.tolist()]
    columns: dict[str, Any] = {
        "shard": [f"{shard:06d}.tar" for shard in (number // PER_SHARD).tolist()],
        "key": [f"{row:09d}" for row in number.tolist()],
        "reason": [f"image cannot be decoded: {'broken ' * 30}" if bad else None for bad in unreadable.tolist()],
        "left_out": [None] * rows,
        "caption_problem": [None] * rows,
        "caption": spread(texts),
        "captionless": spread([False] * len(readable)),
        "others": spread([[]] * len(readable)),
        "duplicates": spread([0] * len(readable)),
        "sha256": spread([f"{image:064x}" for image in image_of.tolist()]),
        "pixels": spread([f"{image:064x}" for image in image_of.tolist()]),
        "width": spread(rng.integers(200, 2000, len(readable))),
        "height": spread(rng.integers(200, 2000, len(readable))),
        "lossless": spread(rng.random(len(readable)) < 0.1),
        "numbers": [[]] * rows,
    }
    table = pa.table({name: pa.array(columns[name], kind) for name, kind in READ_COLUMNS})
    _, first = np.unique(image_of, return_index=True)
    made = Rows(
        table=table,
        shard_number=(number // PER_SHARD).astype(np.int32),
        ordinal=number % PER_SHARD,
        readable=readable,
        embeddings=vectors[image_of],
        captions=texts,
    )
    near_captions = _chained(len(captions), len(captions) // 5, rng)
    nowhere = (folder / "images.parquet", folder / "captions.parquet")
    joined = Joined(image_of, first, pairs, caption_of, captions, near_captions, 1.0, 1.0, nowhere)
    real = _shards(folder)
    return made, joined, [real[shard % len(real)] for shard in range(-(-rows // PER_SHARD))]


def _images(n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, Pairs]:
    """Which image each row shows, the images' embeddings, and their near pairs."""
    equal, crowd, in_groups, in_crowds = n // 10, n // 10, 35 * n // 100, 3 * n // 100
    images = n - equal
    sizes = rng.integers(2, 6, in_groups)  # as many groups as there is room for
    sizes = sizes[: np.searchsorted(np.cumsum(sizes), in_groups)]
    starts = np.cumsum(sizes) - sizes
    i, j = np.triu_indices(5, 1)
    inside = (j[None] < sizes[:, None]).ravel()
    near_i = (starts[:, None] + i[None]).ravel()[inside]
    near_j = (starts[:, None] + j[None]).ravel()[inside]
    dim = cached_embedder("layout").dim
    vectors = np.empty((images, dim), np.float16)
    for start in range(0, images, 1 << 14):
        x = rng.standard_normal((min(1 << 14, images - start), dim), dtype=np.float32)
        vectors[start : start + len(x)] = x / np.linalg.norm(x, axis=1, keepdims=True)
    # Crowds: one of many, and many of about two hundred.
    sizes_of_crowds = [crowd, *[200] * (in_crowds // 200)]
    crowded = np.arange(images - sum(sizes_of_crowds), images)
    start = crowded[0]
    for size in sizes_of_crowds:
        x = vectors[start].astype(np.float32) + 0.02 * rng.standard_normal((size, dim), dtype=np.float32) / 1.5
        vectors[start : start + size] = x / np.linalg.norm(x, axis=1, keepdims=True)
        start += size
    lowest = 0.85
    order = np.lexsort((near_j, near_i))
    similarity = rng.uniform(lowest, 1, len(order)).astype(np.float32)
    pairs = Pairs(near_i[order], near_j[order], similarity, Crowd(vectors, crowded, crowded, lowest))
    image_of = np.concatenate([np.arange(images), np.full(equal, images // 2)])  # equal copies of a lone image
    return rng.permutation(image_of), vectors, pairs


def _captions(n: int, rng: np.random.Generator) -> tuple[np.ndarray, list[str]]:
    """Which caption each row has, and the captions."""
    shared = rng.integers(0, max(1, n // 12), n // 5)
    popular = n + rng.integers(0, 20, n // 100)
    own = n + 20 + np.arange(n - len(shared) - len(popular))
    _, caption_of = np.unique(rng.permutation(np.concatenate([shared, popular, own])), return_inverse=True)
    words = [f"word{number}" for number in range(500)]
    chosen = rng.integers(0, len(words), (int(caption_of.max()) + 1, 8)).tolist()
    captions = [f"{number} " + " ".join(words[word] for word in some) for number, some in enumerate(chosen)]
    for number in range(0, len(captions), max(1, len(captions) // 100)):
        captions[number] = f"{number} " + "long " * (LONG // 5)
    return caption_of.astype(np.int64), captions


def _chained(n: int, pairs: int, rng: np.random.Generator) -> Pairs:
    i = np.sort(rng.choice(n - 1, pairs, replace=False))
    return Pairs(i, i + 1, rng.uniform(0.9, 1, pairs).astype(np.float32))


def _shards(folder: Path) -> list[str]:
    """Real shards of carried images, some of which are repeated to fill them."""
    from curate.reading.writing import write_shard
    from curate.sample_set import load_part

    images = [sample.image for sample in load_part("pretrain")]
    paths = [folder / f"real-{number}.tar" for number in range(SHARDS)]
    for number, path in enumerate(paths):
        some = [images[(number * PER_SHARD + row) % len(images)] for row in range(PER_SHARD)]
        write_shard(path, ((f"{row:06d}", {"webp": image, "txt": b"x"}) for row, image in enumerate(some)))
    return [str(path) for path in paths]


@contextlib.contextmanager
def stage(name: str, profile: bool = False) -> Iterator[None]:
    """Print the seconds, CPU seconds and peak memory of a block."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
    profiler = cProfile.Profile() if profile else contextlib.nullcontext()
    start, cpu = time.perf_counter(), time.process_time()
    with profiler:
        yield
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    print(f"{name:24} {seconds:8.1f} s {cpu:8.1f} CPU s, peak memory {_resident('VmHWM') / 1e6:8,.0f} MB", flush=True)
    if isinstance(profiler, cProfile.Profile):
        pstats.Stats(profiler).sort_stats("tottime").print_stats(12)


def _resident(what: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(what + ":"))


def run(rows: int, folder: Path, changes: Mapping[str, Any], profile: bool) -> None:
    """Make up rows, and take them through the stages."""
    from curate.report import run_report

    (folder / "work").mkdir(parents=True)
    config = DedupConfig(shards=["made-up"], out=str(folder), **changes)
    out = Store(config.out)
    with tempfile.TemporaryDirectory() as scratch:
        with stage("(making it up)"):
            made, joined, urls = made_up(rows, Path(scratch))
        assert joined.image_pairs.crowd is not None
        print(
            f"{rows:,} rows, {len(joined.first):,} images, {len(joined.image_pairs):,} near pairs and a crowd of "
            f"{len(joined.image_pairs.crowd.rows):,}, {len(joined.captions):,} captions; {changes}",
            flush=True,
        )
        with stage("decide, sweep", profile):
            verdicts, sweep = decide_stage(made, joined, None, None, config)
        with stage("plan", profile):
            marks = [fingerprint(url) for url in urls]
            plan = plan_shards(out, "shards", made, verdicts, urls, marks, config.samples_per_shard, kept=True)
        with stage("ledger", profile):
            ledger = publish_ledger(out, made, verdicts, None)
        with stage("index", profile):
            publish_index(out, made, verdicts, cached_embedder("layout"))
        with stage("summary", profile):
            summary = summarise(ledger, joined, verdicts, settings_of(config), len(plan)) | {"sweep": sweep}
            out.write_json("summary.json", summary)
        with stage("report", profile):
            publish_report(LocalEngine(1), out, ledger, made, joined, summary, urls, config)
        del made, joined, verdicts, plan, ledger
    with stage("curate report", profile):
        size = run_report(ReportConfig(out=config.out))["bytes"]
    print(f"report.html: {size:,} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rule", default="greedy", choices=["greedy", "components"])
    parser.add_argument("--on_caption_differs", default="pool", choices=["pool", "keep"])
    parser.add_argument("--max_per_caption", type=int)
    parser.add_argument("--keep", type=Path, help="a new folder for the result")
    parser.add_argument("--profile", action="store_true", help="where the time goes")
    arguments = parser.parse_args()
    print(f"{cpu_count()} cores, load {os.getloadavg()[0]:.1f} before the start", flush=True)
    changes = {name: getattr(arguments, name) for name in ("rule", "on_caption_differs", "max_per_caption")}
    with tempfile.TemporaryDirectory() as scratch:
        run(arguments.rows, arguments.keep or Path(scratch) / "out", changes, arguments.profile)


if __name__ == "__main__":
    main()
