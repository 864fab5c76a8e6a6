"""What a join found of the true pairs, measured on a sample of its own rows."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from curate.neighbors.join import check_arguments
from curate.neighbors.verify import Pairs, candidate_threshold, unit_chunks, unit_rows, verified

_PAIRS = 1 << 20  # that are looked through at a time
_SEARCH_ELEMENTS = 1 << 22  # float32 elements that are compared with the sampled rows at a time: 16 MB


def recall(embeddings: NDArray, pairs: Pairs, threshold: float, *, sample: int = 512, seed: int = 0) -> float:
    """Share of the true pairs of randomly sampled rows that ``pairs`` holds; 1 if these rows have none.

    The true pairs come from comparing each sampled row with every other one, apart from the join's blocks. Pairs
    inside a crowd, which were left out on purpose, do not count.

    Args:
        embeddings: ``[n, d]``, what ``pairs`` was found in.
        pairs: the join's result.
        threshold: the join's threshold.
        sample: rows to measure with, at most n.
        seed: of their choice.
    """
    check_arguments(embeddings, threshold)
    n, d = embeddings.shape
    chosen = np.sort(np.random.default_rng(seed).choice(n, min(sample, n), replace=False))
    if n < 2:
        return 1.0
    lowest = candidate_threshold(threshold, d)
    queries = unit_rows(embeddings, chosen)
    # Pairs are told by the place of a sampled row among those and the other row: i·n + j leaves int64 at three billion.
    some_pairs = (slice(start, start + _PAIRS) for start in range(0, len(pairs), _PAIRS))
    told = [_told(chosen, Pairs(pairs.i[some], pairs.j[some], pairs.similarity[some]), n) for some in some_pairs]
    known = np.concatenate([np.empty(0, np.int64), *told])
    true = np.empty(0, np.int64)
    for start, some in unit_chunks(embeddings, 0, n, max(1, _SEARCH_ELEMENTS // max(d, len(chosen)))):
        a, b = np.nonzero(queries @ some.T >= lowest)
        low, high = np.minimum(chosen[a], b + start), np.maximum(chosen[a], b + start)
        different = low < high
        true_pairs = verified(embeddings, low[different], high[different], threshold)
        if pairs.crowd is not None:
            inside = np.isin(true_pairs.i, pairs.crowd.rows) & np.isin(true_pairs.j, pairs.crowd.rows)
            true_pairs = Pairs(true_pairs.i[~inside], true_pairs.j[~inside], true_pairs.similarity[~inside])
        true = np.union1d(true, _told(chosen, true_pairs, n))
    return float(np.isin(true, known).mean()) if len(true) else 1.0


def _told(chosen: NDArray[np.int64], pairs: Pairs, n: int) -> NDArray[np.int64]:
    """A number for each pair of a sampled row: of two sampled ones by the first."""
    place = np.searchsorted(chosen, pairs.i)
    by_i = chosen[np.minimum(place, len(chosen) - 1)] == pairs.i
    other = np.searchsorted(chosen, pairs.j)
    by_j = ~by_i & (chosen[np.minimum(other, len(chosen) - 1)] == pairs.j)
    of_i = place[by_i] * n + pairs.j[by_i]
    return np.concatenate([of_i, (len(chosen) + other[by_j]) * n + pairs.i[by_j]])
