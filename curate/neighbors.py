"""The near-duplicate join: all pairs of embeddings whose cosine reaches a threshold.

Exact by construction. Tiles of the upper triangle are multiplied in float32 (BLAS threads do the work), every
pair that could reach the threshold within float32's error bound becomes a candidate, and candidates are
decided in float64. So the pairs, and their similarities to the last bit, depend neither on the tile size nor
on the BLAS.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BLOCK = 2048  # rows of a tile: 16 MB of float32 products
_VERIFY_ELEMENTS = 1 << 22  # float64 elements of each side that are verified at a time
_SEARCH_ELEMENTS = 1 << 24  # float32 elements that are compared with the sampled rows at a time


@dataclass(frozen=True)
class Pairs:
    """Near pairs: ``i < j``, sorted by ``(i, j)``, each once.

    Attributes:
        i, j: int64 ``[m]``, rows.
        similarity: float32 ``[m]``, their cosine.
    """

    i: NDArray[np.int64]
    j: NDArray[np.int64]
    similarity: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.i)

    @classmethod
    def empty(cls) -> Pairs:
        """No pairs."""
        return cls(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))


def find_pairs(embeddings: NDArray, threshold: float, *, block: int = BLOCK, engine: str = "exact") -> Pairs:
    """All pairs of rows with cosine ≥ ``threshold``.

    Memory beside the result: a few tiles of ``block`` rows; ``embeddings`` is read block by block and may be
    a memory map. Time grows with n². Many identical rows give quadratically many pairs: collapse them
    beforehand.

    Args:
        embeddings: ``[n, d]`` float16, float32 or float64; any length of rows, zero rows are near to nothing.
        threshold: cosine in (0, 1]; a pair whose cosine, rounded to float32, equals it counts.
        block: rows of a tile.
        engine: ``exact`` is the one there is.

    Raises:
        ValueError: a bad argument, or a row that is not finite (named).
    """
    _check(embeddings, threshold)
    if block < 1:
        raise ValueError(f"block must be at least 1, not {block}")
    if engine != "exact":
        raise ValueError(f"unknown engine {engine!r} of find_pairs: choose exact")
    n, d = embeddings.shape
    lowest = np.float32(_candidate_threshold(threshold, d))
    found: list[Pairs] = []
    for i in range(0, n, block):
        rows = _unit(embeddings, i, min(i + block, n))
        for j in range(i, n, block):
            columns = rows if j == i else _unit(embeddings, j, min(j + block, n))
            near = (rows @ columns.T) >= lowest
            if j == i:
                near = np.triu(near, 1)
            a, b = np.nonzero(near)
            if len(a):
                found.append(_verified(embeddings, a + i, b + j, threshold))
    if not found:
        return Pairs.empty()
    i_all, j_all = np.concatenate([p.i for p in found]), np.concatenate([p.j for p in found])
    order = np.lexsort((j_all, i_all))
    similarity = np.concatenate([p.similarity for p in found])
    return Pairs(i_all[order], j_all[order], similarity[order])


def recall(embeddings: NDArray, pairs: Pairs, threshold: float, *, sample: int = 512, seed: int = 0) -> float:
    """Share of the true pairs of randomly sampled rows that ``pairs`` holds; 1 if these rows have none.

    The true pairs come from comparing each sampled row with every other one, apart from the join's tiles.

    Args:
        embeddings: ``[n, d]``, what ``pairs`` was found in.
        pairs: the join's result.
        threshold: the join's threshold.
        sample: rows to measure with, at most n.
        seed: of their choice.
    """
    _check(embeddings, threshold)
    n, d = embeddings.shape
    chosen = np.sort(np.random.default_rng(seed).choice(n, min(sample, n), replace=False))
    if n < 2:
        return 1.0
    lowest = _candidate_threshold(threshold, d)
    queries = np.concatenate([_unit(embeddings, row, row + 1) for row in chosen])
    known = pairs.i * n + pairs.j
    true = np.empty(0, np.int64)
    for start, some in _chunks(embeddings, n, max(1, _SEARCH_ELEMENTS // max(d, len(chosen)))):
        a, b = np.nonzero(queries @ some.T >= lowest)
        low, high = np.minimum(chosen[a], b + start), np.maximum(chosen[a], b + start)
        different = low < high
        verified = _verified(embeddings, low[different], high[different], threshold)
        true = np.union1d(true, verified.i * n + verified.j)
    return float(np.isin(true, known).mean()) if len(true) else 1.0


def _check(embeddings: NDArray, threshold: float) -> None:
    if embeddings.ndim != 2 or not np.issubdtype(embeddings.dtype, np.floating):
        raise ValueError(f"embeddings must be floating [n, d], not {embeddings.dtype} {list(embeddings.shape)}")
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold must be a cosine in (0, 1], not {threshold}")


def _candidate_threshold(threshold: float, d: int) -> float:
    """Below ``threshold`` by more than a float32 product of unit rows can err, in any order of summation."""
    return threshold - (d + 8) * 2.0**-23


def _unit(embeddings: NDArray, start: int, stop: int) -> NDArray[np.float32]:
    """float32 unit rows ``start … stop``."""
    rows = np.asarray(embeddings[start:stop], np.float32)
    norm = np.sqrt(np.einsum("nd,nd->n", rows, rows, dtype=np.float64))
    if not np.isfinite(norm).all():
        raise ValueError(f"embedding of row {start + int(np.argmin(np.isfinite(norm)))} is not finite")
    return (rows / np.where(norm == 0, 1, norm)[:, None]).astype(np.float32, copy=False)


def _chunks(embeddings: NDArray, n: int, size: int) -> Iterator[tuple[int, NDArray[np.float32]]]:
    for start in range(0, n, size):
        yield start, _unit(embeddings, start, min(start + size, n))


def _verified(embeddings: NDArray, i: NDArray[np.int64], j: NDArray[np.int64], threshold: float) -> Pairs:
    """Those of the candidates whose cosine, computed in float64, reaches the threshold."""
    similarity = np.empty(len(i), np.float32)
    step = max(1, _VERIFY_ELEMENTS // max(1, embeddings.shape[1]))
    for start in range(0, len(i), step):
        x = np.asarray(embeddings[i[start : start + step]], np.float64)
        y = np.asarray(embeddings[j[start : start + step]], np.float64)
        # einsum sums each row by itself, so a row's result does not depend on what stands beside it
        product = np.einsum("nd,nd->n", x, y)
        norms = np.sqrt(np.einsum("nd,nd->n", x, x) * np.einsum("nd,nd->n", y, y))
        similarity[start : start + step] = product / np.where(norms == 0, 1, norms)
    near = similarity >= np.float32(threshold)
    return Pairs(i[near], j[near], similarity[near])
