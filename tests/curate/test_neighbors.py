"""The join: exactly the pairs that brute force finds, whatever the tiles."""

import numpy as np
import pytest

from curate.neighbors import Pairs, find_pairs, recall


def clustered(n: int, d: int, seed: int, dtype=np.float32) -> np.ndarray:
    """Unit rows in groups whose members lie from very near to far."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((max(1, n // 4), d))
    rows = centres[rng.integers(0, len(centres), n)]
    rows = rows + rng.standard_normal((n, d)) * rng.uniform(0, 1, (n, 1))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(dtype)


def brute_force(embeddings: np.ndarray, threshold: float) -> list[tuple[int, int]]:
    x = embeddings.astype(np.float64)
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    i, j = np.triu_indices(len(x), 1)
    near = (x @ x.T)[i, j].astype(np.float32) >= np.float32(threshold)
    return list(zip(i[near].tolist(), j[near].tolist(), strict=True))


def as_list(pairs: Pairs) -> list[tuple[int, int]]:
    return list(zip(pairs.i.tolist(), pairs.j.tolist(), strict=True))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize(("n", "d", "block"), [(300, 32, 64), (257, 7, 50), (129, 130, 128), (40, 1, 3)])
def test_finds_what_brute_force_finds(n, d, block, dtype):
    embeddings = clustered(n, d, seed=n, dtype=dtype)
    for threshold in (0.5, 0.9, 0.99):
        pairs = find_pairs(embeddings, threshold, block=block)
        expected = brute_force(embeddings, threshold)
        assert as_list(pairs) == expected
        assert (pairs.similarity >= np.float32(threshold)).all() and (pairs.i < pairs.j).all()
    assert (pairs.i.dtype, pairs.j.dtype, pairs.similarity.dtype) == (np.int64, np.int64, np.float32)


def test_tile_size_changes_no_bit():
    embeddings = clustered(500, 48, seed=1)
    results = [find_pairs(embeddings, 0.8, block=block) for block in (29, 64, 256, 4096)]
    assert len(results[0]) > 100
    for other in results[1:]:
        for name in ("i", "j", "similarity"):
            assert getattr(results[0], name).tobytes() == getattr(other, name).tobytes()


def test_a_pair_exactly_at_the_threshold_counts():
    embeddings = clustered(200, 24, seed=2)
    similarity = np.sort(find_pairs(embeddings, 0.5).similarity)
    for threshold in similarity[:: len(similarity) // 20]:
        at = len(find_pairs(embeddings, float(threshold), block=33))
        above = len(find_pairs(embeddings, float(np.nextafter(threshold, np.float32(1))), block=33))
        assert at == (similarity >= threshold).sum() and above == (similarity > threshold).sum() < at


def test_equal_rows_are_pairs_even_at_one():
    row = np.random.default_rng(0).standard_normal(100).astype(np.float32)
    pairs = find_pairs(np.stack([row, -row, row, 3 * row]), 1.0)
    assert as_list(pairs) == [(0, 2), (0, 3), (2, 3)]


@pytest.mark.parametrize("n", [0, 1])
def test_few_rows_have_no_pairs(n):
    embeddings = np.ones((n, 4), np.float16)
    pairs = find_pairs(embeddings, 0.5)
    assert len(pairs) == 0 and pairs.i.dtype == np.int64
    assert recall(embeddings, pairs, 0.5) == 1.0


def test_zero_rows_are_near_to_nothing():
    embeddings = np.zeros((5, 8), np.float32)
    embeddings[3, 0] = embeddings[4, 0] = 1
    assert as_list(find_pairs(embeddings, 0.01)) == [(3, 4)]


def test_reads_a_memory_map(tmp_path):
    embeddings = clustered(150, 16, seed=3, dtype=np.float16)
    np.save(tmp_path / "x.npy", embeddings)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    assert as_list(find_pairs(mapped, 0.9, block=32)) == brute_force(embeddings, 0.9)


def test_recall_is_the_share_of_pairs_found():
    embeddings = clustered(400, 16, seed=4)
    pairs = find_pairs(embeddings, 0.9)
    assert recall(embeddings, pairs, 0.9, sample=100, seed=1) == 1.0
    half = Pairs(pairs.i[::2], pairs.j[::2], pairs.similarity[::2])
    assert recall(embeddings, half, 0.9, sample=400) == pytest.approx(0.5, abs=0.01)
    assert recall(embeddings, Pairs.empty(), 0.9, sample=400) == 0.0


def test_bad_arguments_are_named():
    rows = np.eye(3, dtype=np.float32)
    with pytest.raises(ValueError, match="threshold"):
        find_pairs(rows, 1.5)
    with pytest.raises(ValueError, match="engine 'magic'"):
        find_pairs(rows, 0.5, engine="magic")
    with pytest.raises(ValueError, match=r"\[n, d\]"):
        find_pairs(rows.astype(int), 0.5)
    rows[2, 1] = np.nan
    with pytest.raises(ValueError, match="row 2 is not finite"):
        find_pairs(rows, 0.5)
