"""The join within cells: nothing false, little lost, and what is lost is measured."""

import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from curate.neighbors import coarse
from curate.neighbors.cells import assign, find_pairs_in_cells
from curate.neighbors.join import find_pairs, once
from curate.neighbors.recall import recall
from curate.neighbors.screen import screening_axes
from curate.neighbors.verify import Pairs


def rows_with_copies(n: int = 6000, d: int = 32, seed: int = 0) -> np.ndarray:
    """Unit rows of a falling spectrum, a tenth of which are near copies of others."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((n, d)) * np.arange(1, d + 1) ** -0.5
    copies = rng.choice(n, n // 10, replace=False)
    rows[copies] = rows[rng.integers(0, n, n // 10)]
    rows += 0.1 * rng.standard_normal((n, d)) * np.linalg.norm(rows, axis=1, keepdims=True) / d**0.5
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


def keys(pairs, n: int) -> np.ndarray:
    return pairs.i * n + pairs.j


def test_all_that_is_found_is_true_and_more_probes_and_clusterings_find_more():
    rows = rows_with_copies()
    n, true = len(rows), find_pairs(rows, 0.9)
    found = {}
    for probes, clusterings in ((1, 1), (3, 1), (1, 3)):
        pairs = find_pairs_in_cells(rows, 0.9, cells=40, probes=probes, clusterings=clusterings)
        inside = np.isin(keys(true, n), keys(pairs, n))
        assert len(pairs) == inside.sum()  # nothing else
        np.testing.assert_array_equal(pairs.similarity, true.similarity[inside])
        found[probes, clusterings] = inside.mean()
        assert recall(rows, pairs, 0.9, sample=n) == pytest.approx(inside.mean())
    assert found[1, 1] < 0.97 < found[3, 1] and found[1, 1] < found[1, 3]


def test_one_cell_and_every_cell_are_the_exact_join():
    rows, true = rows_with_copies(), find_pairs(rows_with_copies(), 0.9)
    for options in ({"cells": 1}, {"cells": 8, "probes": 8}):
        pairs = find_pairs_in_cells(rows, 0.9, **options)
        for name in ("i", "j", "similarity"):
            assert getattr(pairs, name).tobytes() == getattr(true, name).tobytes()


def test_the_number_of_threads_changes_no_bit():
    rows = rows_with_copies()
    one, two = (find_pairs_in_cells(rows, 0.9, crowd=50, threads=threads) for threads in (1, 3))
    for name in ("i", "j", "similarity"):
        assert getattr(one, name).tobytes() == getattr(two, name).tobytes()


def test_a_hot_cell_is_compared_whole_and_its_crowd_left_out():
    rows = rows_with_copies()
    hot = np.random.default_rng(1).choice(len(rows), 3000, replace=False)
    rows[hot] = rows[0] + 0.05 * np.random.default_rng(2).standard_normal((3000, 32)).astype(np.float16) / 32**0.5
    pairs = find_pairs_in_cells(rows, 0.9, cells=40, crowd=60)
    assert set(hot.tolist()) <= set(pairs.crowd.rows.tolist())
    assert len(pairs) <= 60 * len(rows)
    assert recall(rows, pairs, 0.9, sample=2000) > 0.97


def test_few_rows_and_bad_numbers():
    rows = np.eye(3, dtype=np.float32)
    assert len(find_pairs_in_cells(rows, 0.9, cells=10)) == 0
    assert len(find_pairs_in_cells(np.repeat(rows, 2, axis=0), 0.9)) == 3
    assert len(find_pairs_in_cells(rows[:0], 0.9)) == 0
    for name, value in (("probes", 0), ("clusterings", 0), ("cells", -1)):
        with pytest.raises(ValueError, match=name):
            find_pairs_in_cells(rows, 0.9, **{name: value})


def test_rows_are_assigned_to_many_cells_in_little_memory():
    rng = np.random.default_rng(0)
    rows, centroids = (rng.standard_normal((n, 4)).astype(np.float32) for n in (6000, 1 << 14))
    with ThreadPoolExecutor(1) as pool:
        tracemalloc.start()
        found = assign(rows, centroids, 2, pool)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert most < 3e8
    unit = rows[:50] / np.linalg.norm(rows[:50], axis=1, keepdims=True)
    cosine = unit @ centroids.T
    assert np.allclose(np.sort(np.take_along_axis(cosine, found[:50], 1)), np.sort(cosine)[:, -2:])


def test_rows_by_the_billion_are_told_apart():
    n = 1 << 33
    i, j = np.array([n // 2, 0, n // 2]), np.array([n - 1, n - 1, n - 1])
    assert (i * n + j).tolist() == [n - 1] * 3  # in int64
    pairs = once(Pairs(i, j, np.array([0.9, 0.95, 0.9], np.float32)))
    assert pairs.i.tolist() == [0, n // 2] and pairs.j.tolist() == [n - 1, n - 1]
    assert pairs.similarity.tolist() == np.array([0.95, 0.9], np.float32).tolist()


def test_a_pair_is_found_among_those_of_billions_of_rows():
    n, rng = 1 << 33, np.random.default_rng(0)
    i = np.repeat(np.sort(rng.choice(n // 2, 300, replace=False)), rng.integers(1, 9, 300))
    pairs = once(Pairs(i, n // 2 + rng.integers(0, n // 2, len(i)), np.zeros(len(i), np.float32)))
    chosen = rng.permutation(len(pairs))
    assert np.array_equal(pairs.places(pairs.i[chosen], pairs.j[chosen]), chosen)
    for i, j in ((pairs.i, pairs.j + 1), (pairs.i + 1, pairs.j), (pairs.i[::-1], pairs.j)):
        stand = set(zip(pairs.i.tolist(), pairs.j.tolist(), strict=True))
        expected = [(one, other) in stand for one, other in zip(i.tolist(), j.tolist(), strict=True)]
        assert ((pairs.places(i, j) >= 0) == expected).all()
    assert Pairs.empty().places(np.array([n]), np.array([n])).tolist() == [-1]


def test_the_screen_is_chosen_for_the_rows_of_a_cell(monkeypatch):
    asked = []
    monkeypatch.setattr(coarse, "pays", lambda n: asked.append(n))
    find_pairs_in_cells(rows_with_copies(), 0.9, cells=30)
    assert asked and max(asked) < 6000 // 2  # six hundred on average


def test_the_screen_of_a_cell_is_longer_since_its_rows_are_near_ones():
    rows = rows_with_copies(d=128)
    of_all, of_cells = (screening_axes(rows, 0.9, together).shape[1] for together in (None, 60))
    assert of_all < of_cells < 128
    assert screening_axes(rows, 0.9, len(rows)).shape[1] == of_all
