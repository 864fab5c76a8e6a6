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
process holds beside mapped files while the stage runs, with all that earlier stages made (Linux); captions, keys and
embeddings lie in such files. What is freed goes back to the system after each stage, as in ``curate dedup``.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import functools
import os
import pstats
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from afresh.cores import cpu_count
from afresh.storage import Store
from curate.columns import BLOCK, array_on_disk, numbered, on_disk, table_on_disk
from curate.config import DedupConfig, ReportConfig
from curate.dedup import settings_of
from curate.engines.local import LocalEngine
from curate.neighbors.verify import Crowd, Pairs
from curate.reading.captions import normalise_caption
from curate.reading.urls import fingerprint
from curate.stages.decide import decide_stage
from curate.stages.join import Joined, pairs_on_disk
from curate.stages.memory import hand_back
from curate.stages.publish import publish_index, publish_ledger, publish_report, summarise
from curate.stages.read import cached_embedder
from curate.stages.rows import READ_COLUMNS, Rows
from curate.stages.write import Plan

PER_SHARD = 1000
SHARDS = 4  # that stand for all
LONG = 100_000  # letters


def made_up(rows: int, folder: Path, dim: int, seed: int = 0) -> tuple[Rows, Joined, list[str]]:
    """Rows, what is near what among them, and the shards; see the head of this file."""
    rng = np.random.default_rng(seed)
    unreadable = rng.random(rows) < 0.01
    readable = np.flatnonzero(~unreadable)
    image_of, images, pairs = _images(len(readable), folder, dim, rng)
    caption_of, text = _captions(len(readable), rng)
    sizes = rng.integers(200, 2000, (2, rows), dtype=np.int32)
    lossless = rng.random(rows) < 0.1

    def batches() -> Iterator[pa.RecordBatch]:
        schema = pa.schema(READ_COLUMNS)
        for start in range(0, rows, PER_SHARD):
            numbers = range(start, min(start + PER_SHARD, rows))
            bad = unreadable[start : start + PER_SHARD].tolist()
            place = int(np.searchsorted(readable, start))
            some = iter(range(place, len(readable)))
            of = [None if broken else next(some) for broken in bad]
            image = [None if row is None else f"{image_of[row]:064x}" for row in of]
            columns: dict[str, Any] = {
                "shard": [f"{start // PER_SHARD:06d}.tar"] * len(bad),
                "key": [f"{row:09d}" for row in numbers],
                "reason": [f"image cannot be decoded: {'broken ' * 30}" if broken else None for broken in bad],
                "caption": [None if row is None else text(int(caption_of[row])) for row in of],
                "captionless": [None if broken else False for broken in bad],
                "others": [None if broken else [] for broken in bad],
                "duplicates": [None if broken else 0 for broken in bad],
                "sha256": image,
                "pixels": image,
                "numbers": [[]] * len(bad),
            }
            none = [None] * len(bad)
            for name, values in (("width", sizes[0]), ("height", sizes[1]), ("lossless", lossless)):
                columns[name] = values[start : start + PER_SHARD]
            arrays = [pa.array(columns.get(name, none), kind) for name, kind in READ_COLUMNS]
            yield pa.record_batch(arrays, schema=schema)

    of_rows = (images[image_of[start : start + BLOCK]] for start in range(0, len(readable), BLOCK))
    starts = np.minimum(np.arange(0, rows + PER_SHARD, PER_SHARD), rows)
    table = table_on_disk(folder, batches(), pa.schema(READ_COLUMNS))
    made = Rows(table, starts, on_disk(folder, readable), array_on_disk(folder, of_rows, dim))
    _, first = np.unique(image_of, return_index=True)
    captions = int(caption_of.max()) + 1
    near_captions = _chained(captions, captions // 5, rng)
    nowhere = (folder / "images.parquet", folder / "captions.parquet")
    image_of, first, caption_of = (on_disk(folder, numbers) for numbers in (image_of, first, caption_of))
    pairs, near_captions = (pairs_on_disk(folder, near) for near in (pairs, near_captions))
    joined = Joined(image_of, first, images, pairs, caption_of, near_captions, 1.0, 1.0, nowhere)
    real = _shards(folder)
    return made, joined, [real[shard % len(real)] for shard in range(-(-rows // PER_SHARD))]


def _images(n: int, folder: Path, dim: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, Pairs]:
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
    # Crowds: one of many, and many of about two hundred.
    sizes_of_crowds = [crowd, *[200] * (in_crowds // 200)]
    crowded = np.arange(images - sum(sizes_of_crowds), images)

    def unit(x: np.ndarray) -> np.ndarray:
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    def blocks() -> Iterator[np.ndarray]:
        for start in range(0, images - len(crowded), BLOCK):
            size = min(BLOCK, images - len(crowded) - start)
            yield unit(rng.standard_normal((size, dim), dtype=np.float32))
        for size in sizes_of_crowds:
            middle = unit(rng.standard_normal((1, dim), dtype=np.float32))
            for start in range(0, size, BLOCK):
                noise = rng.standard_normal((min(BLOCK, size - start), dim), dtype=np.float32)
                yield unit(middle + 0.2 / dim**0.5 * noise)

    vectors = array_on_disk(folder, blocks(), dim)
    lowest = 0.85
    order = np.lexsort((near_j, near_i))
    similarity = rng.uniform(lowest, 1, len(order)).astype(np.float32)
    pairs = Pairs(near_i[order], near_j[order], similarity, Crowd(vectors, crowded, crowded, lowest))
    image_of = np.concatenate([np.arange(images), np.full(equal, images // 2)])  # equal copies of a lone image
    return rng.permutation(image_of), vectors, pairs


def _captions(n: int, rng: np.random.Generator) -> tuple[np.ndarray, Callable[[int], str]]:
    """Which caption each row has, and the captions by number."""
    shared = rng.integers(0, max(1, n // 12), n // 5)
    popular = n + rng.integers(0, 20, n // 100)
    own = n + 20 + np.arange(n - len(shared) - len(popular))
    _, caption_of = np.unique(rng.permutation(np.concatenate([shared, popular, own])), return_inverse=True)
    number = int(caption_of.max()) + 1

    def text(caption: int) -> str:
        if caption % max(1, number // 100) == 0:
            return f"{caption} " + "long " * (LONG // 5)
        return f"{caption} " + " ".join(f"word{(caption * 7919 + place * 104_729) % 500}" for place in range(8))

    return caption_of.astype(np.int64), text


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


class Anonymous:
    """The most memory beside mapped files that this process held, looked at fifty times a second."""

    def __init__(self) -> None:
        self.most, self._ends = 0, threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Anonymous:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._ends.wait(0.02):
            self.most = max(self.most, _resident("RssAnon"))
        self.most = max(self.most, _resident("RssAnon"))


@contextlib.contextmanager
def stage(name: str, rows: int, before: int = 0, profile: bool = False) -> Iterator[None]:
    """Print the seconds, CPU seconds and peak memory of a block, memory also a row beyond what was held ``before``."""
    profiler = cProfile.Profile() if profile else contextlib.nullcontext()
    start, cpu = time.perf_counter(), time.process_time()
    with profiler, Anonymous() as memory:
        yield
    hand_back()
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    print(
        f"{name:24} {seconds:8.1f} s {cpu:8.1f} CPU s, peak memory {memory.most / 1e6:8,.0f} MB, "
        f"{(memory.most - before) / rows:6.0f} bytes a row",
        flush=True,
    )
    if isinstance(profiler, cProfile.Profile):
        pstats.Stats(profiler).sort_stats("tottime").print_stats(12)


def _resident(what: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(what + ":"))


def run(rows: int, dim: int, folder: Path, scratch: Path, changes: Mapping[str, Any], profile: bool) -> None:
    """Make up rows, and take them through the stages."""
    import torch  # noqa: F401  which a search needs, and which has memory of its own

    from curate.index.training_index import TrainingIndex
    from curate.report import run_report

    (folder / "work").mkdir(parents=True)
    config = DedupConfig(shards=["made-up"], out=str(folder), **changes)
    out, embedder = Store(config.out), cached_embedder("layout")
    before = _resident("RssAnon")  # of the interpreter and what is imported
    show = functools.partial(stage, rows=rows, before=before, profile=profile)
    with stage("(making it up)", rows, before):
        made, joined, urls = made_up(rows, scratch, dim)
    assert joined.image_pairs.crowd is not None
    print(
        f"{rows:,} rows, {len(joined.first):,} images, {len(joined.image_pairs):,} near pairs and a crowd of "
        f"{len(joined.image_pairs.crowd.rows):,}, {int(joined.caption_of.max()) + 1:,} captions; {changes}",
        flush=True,
    )
    with show("number"):
        numbered(made.of_readable("pixels", ""), len(made.readable))
        numbered(map(normalise_caption, made.captions), len(made.readable))
    with show("decide, sweep"):
        verdicts, sweep = decide_stage(made, joined, None, None, config)
    with show("plan"):
        marks = [fingerprint(url) for url in urls]
        plan = Plan(out, "shards", made, verdicts, urls, marks, config.samples_per_shard, kept=True)
    with show("ledger"):
        ledger = publish_ledger(out, made, verdicts, None)
    with show("index"):
        publish_index(out, made, verdicts, embedder, config.threshold)
    with show("summary"):
        summary = summarise(ledger, joined, verdicts, settings_of(config), len(plan)) | {"sweep": sweep}
        out.write_json("summary.json", summary)
    with show("report"):
        publish_report(LocalEngine(1), out, ledger, made, joined, summary, urls, config)
    del made, joined, verdicts, plan, ledger
    hand_back()
    before = _resident("RssAnon")
    with stage("TrainingIndex.load", rows, before, profile):
        index = TrainingIndex.load(folder)
        assert index.captions[rows // 2] != index.keys[rows // 2]
    with stage("search", rows, before, profile):
        index.search(np.array(index.embeddings[:2]), 3)
    with stage("counts", rows, before, profile):
        assert len(index.counts) == len(index.group_counts) == len(index)
    with stage("curate report", rows, before, profile):
        size = run_report(ReportConfig(out=config.out))["bytes"]
    print(f"report.html: {size:,} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rule", default="greedy", choices=["greedy", "components"])
    parser.add_argument("--on_caption_differs", default="pool", choices=["pool", "keep"])
    parser.add_argument("--max_per_caption", type=int)
    parser.add_argument("--sweep", type=float, default=0.05, help="0 decides by one threshold")
    parser.add_argument("--keep", type=Path, help="a new folder for the result")
    parser.add_argument("--dim", type=int, default=64, help="of the embeddings, which lie on disk")
    parser.add_argument("--profile", action="store_true", help="where the time goes")
    arguments = parser.parse_args()
    print(f"{cpu_count()} cores, load {os.getloadavg()[0]:.1f} before the start", flush=True)
    changes = {name: getattr(arguments, name) for name in ("rule", "on_caption_differs", "max_per_caption", "sweep")}
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.keep or Path(scratch) / "out"
        run(arguments.rows, arguments.dim, folder, Path(scratch), changes, arguments.profile)


if __name__ == "__main__":
    main()
