"""Centroids on all cores are those of faiss on one thread, to the last bit."""

from concurrent.futures import ThreadPoolExecutor

import faiss
import numpy as np
import pytest

from curate.neighbors.kmeans import spherical_kmeans, train_centroids


def unit(n: int, d: int, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((n, d), dtype=np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def of_faiss(rows: np.ndarray, cells: int, iterations: int, seed: int) -> tuple[np.ndarray, int]:
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    kmeans = faiss.Kmeans(
        rows.shape[1], cells, niter=iterations, spherical=True, seed=seed, min_points_per_centroid=1,
        max_points_per_centroid=len(rows),
    )  # fmt: skip
    kmeans.train(rows)
    faiss.omp_set_num_threads(threads)
    return np.asarray(kmeans.centroids), sum(round(one["nsplit"]) for one in kmeans.iteration_stats)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    ("n", "d", "cells", "copies"), [(40_000, 64, 500, 0), (40_000, 32, 900, 20_000), (1500, 13, 1400, 0)]
)
def test_centroids_are_those_of_faiss_also_where_cells_have_no_rows(n, d, cells, copies, threads):
    rows = unit(n, d)
    rows[:copies] = rows[0]
    expected, split = of_faiss(rows, cells, 5, 7)
    assert (split > 0) == (copies > 0)
    with ThreadPoolExecutor(threads) as pool:
        found = spherical_kmeans(rows, cells, 5, 7, pool)
    assert found.tobytes() == expected.tobytes()


def test_as_many_cells_as_rows_are_the_rows():
    rows = unit(20, 8)
    with ThreadPoolExecutor(1) as pool:
        assert np.allclose(np.sort(train_centroids(rows, 20, 0, pool)), np.sort(rows), atol=1e-6)
