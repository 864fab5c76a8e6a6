"""The near-duplicate join beside faiss's brute force, and within cells beside SemDeDup's: time, pairs and memory.

    python -m benchmarks.join                                 200,000 rows, both kinds of embeddings
    python -m benchmarks.join --curve                         25,000 to 400,000 rows, ours alone, and the exponent
    python -m benchmarks.join --rows 1000000 --no_faiss --kinds gaussian
    python -m benchmarks.join --cells                         the join within cells, on threads and in tasks, and recall
                                                              against the exact one
    python -m benchmarks.join --kinds crowd                   half of the rows are near copies of one, ours alone
    python -m benchmarks.join --kinds gaussian --decay 0.25 --rows 50000 --threads 1
    python -m benchmarks.join --torch                         where torch is loaded already, as by an embedder

Each side runs in a process of its own on the same memory-mapped embeddings (float32, or as ``--dtype`` says) and the
same number of threads.
Its peak memory is what the process gains over its state before the join; the embeddings' own pages count. faiss
answers queries in blocks of 4,096 rows; its pairs are kept where i < j. Which kernels each library's BLAS has chosen is
said first (``OPENBLAS_CORETYPE`` names others): a library may know a processor that another takes for an old one.

SemDeDup's side stands each row in its one nearest cell and compares there, as its method has it, with the k-means,
the cell size and the comparison of ours: what differs is where pairs are looked for.

Kinds:

- ``gaussian``: unit rows of 256 dimensions, the i-th of standard deviation i^-½ (or as ``--decay`` says), of which a
  tenth are groups of near copies;
- ``mosaics``: the layout descriptor of 2 × 2 mosaics of randomly cropped, mirrored and tinted sample images, a tenth
  of which are copies at other JPEG qualities;
- ``captions``: the hashed n-grams of made-up captions of real words, a tenth of them with a small edit;
- ``crowd``: as ``gaussian``, but half of the rows are encodings of one placeholder. All pairs would be a quarter of the
  square of the rows; ours leaves out those between rows with more than a hundred near ones, as curation does.
"""

from __future__ import annotations

import argparse
import functools
import io
import json
import multiprocessing
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from afresh.cores import cpu_count
from curate.stages.join import CROWD

THRESHOLD = 0.9
QUERIES = 4096
TILE = 1024  # rows of a product, as the screen has them
TOLERANCE = 2e-6  # pairs nearer to the threshold than this may fall either way in faiss's float32 sums


def gaussian(rows: int, seed: int = 0, decay: float = 0.5) -> np.ndarray:
    """``[rows, 256]`` float16; every tenth row is a copy of another one, at a cosine of about 0.98."""
    rng = np.random.default_rng(seed)
    deviation = np.arange(1, 257, dtype=np.float32) ** -decay
    result = np.empty((rows, 256), np.float16)
    for start in range(0, rows, 8192):
        x = rng.standard_normal((min(8192, rows - start), 256), dtype=np.float32) * deviation
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        copies = np.flatnonzero(rng.random(len(x)) < 0.1)
        x[copies] = x[rng.integers(0, len(x), len(copies))]
        x[copies] += 0.2 / 16 * rng.standard_normal((len(copies), 256), dtype=np.float32)
        result[start : start + len(x)] = x / np.linalg.norm(x, axis=1, keepdims=True)
    return result


def mosaics(rows: int, seed: int = 0) -> np.ndarray:
    """``[rows, 157]`` float16; see the head of this file."""
    from PIL import Image

    from curate.embed.layout import LayoutEmbedder
    from curate.reading.images import decode_image, stack_images
    from curate.sample_set import load_part

    parts = ("pretrain", "finetune", "held_out")
    images = [decode_image(sample.image) for part in parts for sample in load_part(part)]
    pixels = (stack_images(images, 64) * 255).astype(np.uint8).transpose(0, 2, 3, 1)
    rng, embedder, vectors = np.random.default_rng(seed), LayoutEmbedder(), []
    batch: list[Image.Image] = []
    for row in range(rows):
        if row % 10 == 9:  # a copy of one of the last nine
            buffer = io.BytesIO()
            batch[-int(rng.integers(1, 10))].save(buffer, "JPEG", quality=int(rng.integers(30, 95)))
            batch.append(Image.open(buffer).convert("RGB"))
        else:
            canvas = np.empty((64, 64, 3), np.uint8)
            for quarter in range(4):
                left, top = rng.integers(0, 32, 2)
                tile = pixels[rng.integers(len(pixels)), top : top + 32, left : left + 32].astype(np.float32)
                tile = tile[:, :: rng.choice([-1, 1])] * rng.uniform(0.6, 1.2, 3)
                y, x = 32 * (quarter // 2), 32 * (quarter % 2)
                canvas[y : y + 32, x : x + 32] = tile.clip(0, 255)
            batch.append(Image.fromarray(canvas))
        if len(batch) == 2000 or row == rows - 1:
            vectors.append(embedder.embed(batch).astype(np.float16))
            batch = []
    return np.concatenate(vectors)


def crowd(rows: int, seed: int = 0) -> np.ndarray:
    """As :func:`gaussian`, but half of the rows are encodings of one placeholder, at a cosine of about 0.998."""
    result, rng = gaussian(rows, seed), np.random.default_rng(seed + 1)
    copies = np.sort(rng.choice(rows, rows // 2, replace=False))
    for some in np.array_split(copies, max(1, rows // 8192)):
        noise = 0.05 / 16 * rng.standard_normal((len(some), 256), dtype=np.float32)
        result[some] = result[copies[0]].astype(np.float32) + noise
    return result


def captions(rows: int, seed: int = 0) -> np.ndarray:
    """``[rows, 512]`` float16: the captions of :mod:`benchmarks.captions` as curation's default embedder has them."""
    from benchmarks.captions import make_captions
    from curate.embed.ngrams import NgramEmbedder
    from curate.stages.join import CAPTION_BLOCK, embedded_captions

    texts = make_captions(rows, seed)[0]
    blocks = (texts[start : start + CAPTION_BLOCK] for start in range(0, rows, CAPTION_BLOCK))
    with tempfile.TemporaryDirectory() as folder:
        return embedded_captions(NgramEmbedder(), blocks, Path(folder))


MAKERS = {"gaussian": gaussian, "mosaics": mosaics, "captions": captions, "crowd": crowd}


def ours(
    embeddings: np.ndarray, threads: int, crowd: int | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``(i, j, similarity)``."""
    from curate.neighbors.join import find_pairs

    pairs = find_pairs(embeddings, THRESHOLD, crowd=crowd, threads=threads)
    return pairs.i, pairs.j, pairs.similarity


def brute_force(embeddings: np.ndarray, threads: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``(i, j, similarity)`` from ``IndexFlatIP.range_search``."""
    import faiss

    faiss.omp_set_num_threads(threads)
    n, d = embeddings.shape
    index = faiss.IndexFlatIP(d)
    rows = np.array(embeddings, np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    index.add(rows)
    found = []
    for start in range(0, n, QUERIES):
        limits, similarity, j = index.range_search(rows[start : start + QUERIES], THRESHOLD - TOLERANCE)
        i = start + np.repeat(np.arange(len(limits) - 1), np.diff(limits).astype(np.int64))
        once = i < j
        found.append((i[once], j[once], similarity[once]))
    i, j, similarity = (np.concatenate(column) for column in zip(*found, strict=True))
    order = np.lexsort((j, i))
    return i[order], j[order], similarity[order]


def within_cells(embeddings: np.ndarray, threads: int, probes: int = 3) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``(i, j, similarity)`` of rows that share one of their ``probes`` nearest cells."""
    from curate.neighbors.cells import find_pairs_in_cells

    pairs = find_pairs_in_cells(embeddings, THRESHOLD, probes=probes, threads=threads)
    return pairs.i, pairs.j, pairs.similarity


def by_tasks(embeddings: np.ndarray, threads: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Likewise, as curation does it: in an engine's tasks, ``threads`` processes of this machine."""
    from curate.engines.local import LocalEngine
    from curate.stages.cells import pairs_by_tasks

    with tempfile.TemporaryDirectory() as folder, LocalEngine(threads) as engine:
        pairs = pairs_by_tasks(engine, Path(folder), embeddings, THRESHOLD, None, 2 * 10**9, "joining")
    return pairs.i, pairs.j, pairs.similarity


SIDES = {
    "ours": ours,
    "ours, without pairs in crowds": functools.partial(ours, crowd=CROWD),
    "faiss": brute_force,
    "cells": within_cells,
    "cells, by tasks": by_tasks,
    "one cell a row, as SemDeDup": functools.partial(within_cells, probes=1),
}


def _measure(side: str, path: str, threads: int, out: str, loaded: bool) -> None:
    """In a process of its own: run one side, leave its pairs in ``out`` and its figures beside them."""
    import faiss  # noqa: F401  both sides carry the same libraries
    import threadpoolctl  # noqa: F401

    import curate.neighbors.join  # noqa: F401

    if loaded:
        import torch  # noqa: F401

    embeddings = np.load(path, mmap_mode="r")
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    start, cpu = time.perf_counter(), time.process_time()
    i, j, similarity = SIDES[side](embeddings, threads)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    gained = _resident("VmHWM") - before
    np.savez(out, i=i, j=j, similarity=similarity)
    Path(out + ".json").write_text(json.dumps({"seconds": seconds, "cpu": cpu, "bytes": gained}))


def _resident(what: str) -> int:
    """``VmRSS``, the resident memory in bytes, or ``VmHWM``, its peak (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(what + ":"))


def kernels() -> str:
    """Which kernels the BLAS of each library has chosen."""
    import faiss  # noqa: F401
    from threadpoolctl import threadpool_info

    found = [(Path(blas["filepath"]).parent.name, blas) for blas in threadpool_info() if blas["user_api"] == "blas"]
    return ", ".join(f"{name.partition('.')[0]} {blas.get('architecture')}" for name, blas in found)


def measure(side: str, path: Path, threads: int, torch: bool = False) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Figures and pairs of one side."""
    out = str(path.with_name(f"{side.split(',')[0]}.npz"))
    process = multiprocessing.get_context("spawn").Process(target=_measure, args=(side, str(path), threads, out, torch))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{side} failed")
    return json.loads(Path(out + ".json").read_text()), dict(np.load(out))


def same_pairs(a: dict[str, np.ndarray], b: dict[str, np.ndarray], n: int) -> bool:
    """Whether all pairs agree but those at the threshold within float32's error."""
    keys = [side["i"].astype(np.int64) * n + side["j"] for side in (a, b)]
    for one, other, side in ((keys[0], keys[1], a), (keys[1], keys[0], b)):
        alone = side["similarity"][~np.isin(one, other)]
        if (np.abs(alone - THRESHOLD) > TOLERANCE).any():
            return False
    return True


def products(path: Path) -> tuple[int, float]:
    """What no screen of short rows in float32 does without, if boxes rule nothing out: the length of the rows that it
    chooses, and CPU seconds of one thread for the products of each with each later one, without a look at them.
    """
    from curate.neighbors.join import BLOCK, one_blas_thread
    from curate.neighbors.screen import screening_axes
    from curate.neighbors.verify import unit_rows

    embeddings = np.load(path, mmap_mode="r")
    with one_blas_thread():
        axes = screening_axes(embeddings, THRESHOLD)
        short = np.ones((len(embeddings), axes.shape[1] + 1), np.float32)
        for start in range(0, len(short), QUERIES):
            some = slice(start, start + QUERIES)
            short[some, :-1] = unit_rows(embeddings, some) @ axes
        start_of_all = time.process_time()
        for start in range(0, len(short), BLOCK):
            block = short[start : start + BLOCK].T
            for later in range(start, len(short), TILE):
                short[later : later + TILE] @ block
        return short.shape[1], time.process_time() - start_of_all


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--kinds", nargs="+", choices=MAKERS, default=["gaussian", "mosaics"])
    parser.add_argument("--threads", type=int, default=cpu_count())
    parser.add_argument("--dtype", choices=["float16", "float32"], default="float32")
    parser.add_argument("--no_faiss", action="store_true", help="ours alone")
    parser.add_argument("--curve", action="store_true", help="ours alone, over 25,000 to 400,000 rows")
    parser.add_argument("--cells", action="store_true", help="the join within cells beside the exact one")
    parser.add_argument("--products", action="store_true", help="the screen's products alone, on one thread")
    parser.add_argument("--torch", action="store_true", help="torch is loaded before")
    parser.add_argument("--decay", type=float, default=0.5, help="of the kind gaussian")
    arguments = parser.parse_args()
    makers = MAKERS | {"gaussian": functools.partial(gaussian, decay=arguments.decay)}
    print(f"kernels: {kernels()}", flush=True)
    sizes = [25_000, 50_000, 100_000, 200_000, 400_000] if arguments.curve else [arguments.rows]
    for kind in arguments.kinds:
        seconds = []
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "embeddings.npy"
            for rows in sizes:
                embeddings = makers[kind](rows).astype(arguments.dtype)
                np.save(path, embeddings)
                size, shape = embeddings.nbytes, embeddings.shape
                del embeddings
                side = "ours, without pairs in crowds" if kind == "crowd" else "ours"
                figures, pairs = measure(side, path, arguments.threads, arguments.torch)
                seconds.append(figures["seconds"])
                print(
                    f"{kind} {shape[0]:,} × {shape[1]} {arguments.dtype}, cosine ≥ {THRESHOLD}, "
                    f"{arguments.threads} threads: {side} {figures['seconds']:.1f} s, {figures['cpu']:.2f} CPU s, "
                    f"{len(pairs['i']):,} pairs, peak {figures['bytes'] / size:.2f} × the embeddings",
                    flush=True,
                )
                if arguments.products:
                    length, alone = products(path)
                    print(f"{kind}: products of {length} numbers alone {alone:.2f} CPU s", flush=True)
                if arguments.cells:
                    true = pairs["i"].astype(np.int64) * rows + pairs["j"]
                    for side in ("cells", "cells, by tasks", "one cell a row, as SemDeDup"):
                        theirs, their_pairs = measure(side, path, arguments.threads, arguments.torch)
                        recall = np.isin(true, their_pairs["i"].astype(np.int64) * rows + their_pairs["j"]).mean()
                        print(f"{kind}: {side}: {theirs['seconds']:.1f} s, recall {recall:.4f}", flush=True)
                    continue
                if arguments.no_faiss or arguments.curve or kind == "crowd":
                    continue
                theirs, their_pairs = measure("faiss", path, arguments.threads, arguments.torch)
                same = "the same pairs" if same_pairs(pairs, their_pairs, rows) else "OTHER PAIRS"
                print(
                    f"{kind}: faiss IndexFlatIP.range_search {theirs['seconds']:.1f} s, {theirs['cpu']:.1f} CPU s, "
                    f"{theirs['seconds'] / figures['seconds']:.1f} times ours ({theirs['cpu'] / figures['cpu']:.1f} in "
                    f"CPU seconds), {same}, "
                    f"peak {theirs['bytes'] / size:.2f} × the embeddings",
                    flush=True,
                )
        if arguments.curve:
            slopes = np.diff(np.log(seconds)) / np.diff(np.log(sizes))
            print(f"{kind}: seconds grow with rows^{statistics.mean(slopes):.2f}")


if __name__ == "__main__":
    main()
