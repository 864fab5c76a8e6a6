"""The join in pieces and the decisions over what it finds: unit costs, and what follows from them for more rows.

    python -m benchmarks.scale_join                              unit costs, from 500,000 rows
    python -m benchmarks.scale_join --run 4000000                and a run of more rows, beside its prediction

Rows are Gaussian of a falling spectrum (:mod:`benchmarks.join`), a tenth of them near copies, and lie on disk. What
runs is curation's own code, the tasks one after the other in this process: CPU seconds are those of one core and hardly
depend on what else the machine does, and no stage but the centroids has threads of its own. Each stage's cost is CPU
seconds divided by the operations that it consists of; where these are of two kinds, a second run with larger cells
tells them apart:

- centroids: rows (written as a file, and sampled), and rows of the sample times cells, in eight iterations;
- assigning: rows (sorted, and written three times), and rows times cells;
- comparing: rows of all cells, and pairs of rows within a cell;
- merging: rows, which pairs grow with;
- recall: rows, held against the sampled ones;
- deciding: rows. (Embedding captions, by the default embedder, is measured beside them.)

From these follows what any number of rows takes, with cells of 1,024 rows up to 65,536 cells, and larger ones beyond.
Memory is the most that the process held beside mapped files, with all that is in it already (Linux).
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from afresh.cores import cpu_count
from benchmarks.scale import Anonymous, _resident
from curate.columns import BLOCK, array_on_disk
from curate.decisions.rules import decide
from curate.neighbors.cells import CELL_ROWS, PROBES, number_of_cells
from curate.neighbors.coarse import pays
from curate.neighbors.recall import recall
from curate.neighbors.verify import Pairs
from curate.stages import cells
from curate.stages.join import CROWD

THRESHOLD = 0.9
SAMPLE = 1000  # rows by which recall is measured
WIDER = 16  # times larger are the cells of the second run
MEMORY = 2 * 10**9
SIZES = (10**6, 10**7, 10**8, 5 * 10**9)


def gaussian_on_disk(rows: int, dim: int, folder: Path, seed: int = 0) -> np.ndarray:
    """``[rows, dim]`` float16, memory-mapped: the i-th number of standard deviation i^-½, a tenth near copies."""
    rng = np.random.default_rng(seed)
    deviation = np.arange(1, dim + 1, dtype=np.float32) ** -0.5

    def blocks() -> Any:
        for start in range(0, rows, BLOCK):
            x = rng.standard_normal((min(BLOCK, rows - start), dim), dtype=np.float32) * deviation
            x /= np.linalg.norm(x, axis=1, keepdims=True)
            copies = np.flatnonzero(rng.random(len(x)) < 0.1)
            x[copies] = x[rng.integers(0, len(x), len(copies))]
            x[copies] += 0.2 / dim**0.5 * rng.standard_normal((len(copies), dim), dtype=np.float32)
            yield x / np.linalg.norm(x, axis=1, keepdims=True)

    return array_on_disk(folder, blocks(), dim)


class Here:
    """An engine that runs tasks here, one after the other, and notes how many they were and what they took."""

    def __init__(self) -> None:
        self.cpu: dict[str, float] = {}
        self.tasks: dict[str, int] = {}
        self.ended = 0.0

    def map(self, function: Any, tasks: Sequence[Any], *, desc: str, unit: str = "shards") -> list[Any]:
        start = time.process_time()
        done = [function(task) for task in tasks]
        self.ended = time.process_time()
        name = desc.rpartition(" ")[2]
        self.cpu[name], self.tasks[name] = self.ended - start, len(tasks)
        return done


class Numbered(Sequence[str]):
    """A caption for each row, made when it is asked for."""

    def __init__(self, n: int) -> None:
        self._n = n

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, row: Any) -> Any:
        return f"caption {row}"


def operations(n: int, wider: int = 1) -> dict[str, tuple[float, ...]]:
    """What each stage consists of, for n rows; cells are as full as they are on average."""
    held = number_of_cells(n, max(1, n // (CELL_ROWS * wider)))
    of_cells = float(n * min(PROBES, held))
    return {
        "centroids": (float(n), 8.0 * min(n, 48 * held) * held),
        "assigning": (float(n), float(n) * held),
        "comparing": (of_cells, of_cells**2 / held / 2),
        "merging": (float(n),),
        "recall": (float(n),),
        "deciding": (float(n),),
    }


def measured(n: int, dim: int, wider: int = 1) -> dict[str, float]:
    """CPU seconds of each stage; ``peak``, bytes beyond what was held before; ``pairs`` of rows within cells."""
    with tempfile.TemporaryDirectory() as scratch:
        rows = gaussian_on_disk(n, dim, Path(scratch))
        engine, before, began = Here(), _resident("RssAnon"), time.process_time()
        with Anonymous() as memory:
            held = number_of_cells(n, max(1, n // (CELL_ROWS * wider)))
            pairs = cells.pairs_by_tasks(engine, Path(scratch), rows, THRESHOLD, CROWD, MEMORY, "joining", cells=held)
            took = dict(engine.cpu)
            took["merging"] = time.process_time() - engine.ended
            took["centroids"] = time.process_time() - began - sum(took.values())
            files = [path.stat().st_size for path in Path(scratch).iterdir()]
            sizes = _cell_sizes(Path(scratch), n, dim, held)
            took["pairs"] = float((sizes * (sizes - 1) / 2).sum())
            if wider == 1:
                start = time.process_time()
                found = recall(rows, pairs, THRESHOLD, sample=SAMPLE)
                took["recall"], start = time.process_time() - start, time.process_time()
                near = SimpleNamespace(
                    image_of=np.arange(n), caption_of=np.arange(n), image_pairs=pairs, caption_pairs=Pairs.empty()
                )
                verdicts = decide(near, Numbered(n))
                took["deciding"] = time.process_time() - start
                print(
                    f"{n:,} × {dim}: {held:,} cells, {engine.tasks} tasks, {sum(files) / 1e9:.2f} GB in {len(files):,} "
                    f"files, {len(pairs):,} pairs, recall {found:.4f}, {int(verdicts.kept.sum()):,} rows kept",
                    flush=True,
                )
        took["peak"] = float(memory.most - before)
    return took


def _cell_sizes(folder: Path, n: int, dim: int, held: int) -> np.ndarray:
    of = cells.Cells(folder, n, dim, "<f2", THRESHOLD, CROWD, held, PROBES, 0)
    return np.sum([np.diff(file.bounds(0, held)) for file in of.sorted_rows()], axis=0).astype(np.float64)


def of_a_caption(number: int = 1 << 14) -> float:
    """CPU seconds that the default embedding of a caption takes."""
    from benchmarks.captions import make_captions
    from curate.embed.ngrams import NgramEmbedder

    texts, embedder = make_captions(number, 0)[0], NgramEmbedder()
    start = time.process_time()
    embedder.embed(texts)
    return (time.process_time() - start) / number


def unit_costs(n: int, dim: int) -> dict[str, tuple[float, ...]]:
    """CPU seconds an operation, of each kind of each stage as :func:`operations` has them."""
    took, wide = measured(n, dim), measured(n, dim, WIDER)
    count, count_wide = operations(n), operations(n, WIDER)
    unit: dict[str, tuple[float, ...]] = {}
    for name, numbers in count.items():
        if len(numbers) == 1:
            unit[name] = (took[name] / numbers[0],)
            continue
        fewer, more = numbers[1], count_wide[name][1]
        if name == "comparing":  # some cells are larger than others: there are more pairs than on average
            fewer, more = took["pairs"], wide["pairs"]
        second = max(0.0, (wide[name] - took[name]) / (more - fewer))
        unit[name] = (took[name] - second * fewer) / numbers[0], second * fewer / numbers[1]
    return unit


def predicted(n: int, unit: dict[str, tuple[float, ...]]) -> dict[str, float]:
    """CPU seconds of each stage for n rows."""
    return {name: float(np.dot(unit[name], numbers)) for name, numbers in operations(n).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=500_000, help="that unit costs are measured with")
    parser.add_argument("--run", type=int, help="rows of a run beside its prediction")
    parser.add_argument("--dim", type=int, default=64)
    arguments = parser.parse_args()
    print(f"{cpu_count()} cores, load {os.getloadavg()[0]:.1f} before the start", flush=True)
    measured(10 * CELL_ROWS, arguments.dim)  # loads the libraries
    pays(arguments.rows)  # and torch
    print(f"captions' embeddings {of_a_caption() * 1e6:.1f} µs of one core each", flush=True)
    unit = unit_costs(arguments.rows, arguments.dim)
    for name, costs in unit.items():
        told = " and ".join(f"{seconds * 1e9:.3f} ns" for seconds in costs)
        print(f"{name:10} {told} of one core an operation, {arguments.dim} dimensions")
    for n in SIZES:
        took = predicted(n, unit)
        stages = ", ".join(f"{name} {seconds / 3600:.3g}" for name, seconds in took.items())
        print(f"{n:,} rows, core hours: {stages}; all {sum(took.values()) / 3600:.3g}", flush=True)
    if arguments.run:
        expected, found = predicted(arguments.run, unit), measured(arguments.run, arguments.dim)
        for name, seconds in expected.items():
            print(f"{name:16} predicted {seconds:8.1f} s, took {found[name]:8.1f}: {found[name] / seconds:.2f} times")
        both = sum(found[name] for name in expected), sum(expected.values())
        print(f"{'all':16} predicted {both[1]:8.1f} s, took {both[0]:8.1f}: {both[0] / both[1]:.2f} times")
        print(f"peak memory {found['peak'] / 1e6:,.0f} MB, {found['peak'] / arguments.run:.0f} bytes a row")


if __name__ == "__main__":
    main()
