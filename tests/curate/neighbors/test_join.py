"""The join: exactly the pairs that brute force finds, whatever the tiles."""

import tracemalloc

import numpy as np
import pytest

from curate.neighbors.join import find_pairs
from curate.neighbors.nearest import find_nearest
from curate.neighbors.recall import recall
from curate.neighbors.screen import Screen
from curate.neighbors.verify import Crowd, Pairs, as_float32


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


@pytest.mark.parametrize("threshold", [0.6, 0.9, 0.97])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_the_screen_loses_nothing(dtype, threshold):
    # Enough rows for axes to be found; a spectrum that falls, and one whose rows have a large common part.
    rng = np.random.default_rng(5)
    falling = rng.standard_normal((3000, 40)) * np.arange(1, 41) ** -0.7
    common = rng.standard_normal((3000, 40)) * 0.3 + rng.standard_normal(40)
    for rows in (falling, common):
        rows[::7] = rows[1::7][: len(rows[::7])] + 0.3 * rng.standard_normal((len(rows[::7]), 40)) * rows.std()
        rows = rows.astype(dtype)
        pairs = find_pairs(rows, threshold, threads=2)
        x = rows.astype(np.float64)
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        i, j = np.nonzero(np.triu((x @ x.T).astype(np.float32) >= np.float32(threshold), 1))
        assert len(pairs) > 0 and np.array_equal(pairs.i, i) and np.array_equal(pairs.j, j)


def test_threads_and_blocks_change_no_bit():
    embeddings = clustered(5000, 24, seed=6)
    first = find_pairs(embeddings, 0.85, threads=1)
    assert len(first) > 100
    for options in ({"threads": 2}, {"threads": 3, "block": 100}, {"threads": 1, "block": 5000}):
        other = find_pairs(embeddings, 0.85, **options)
        for name in ("i", "j", "similarity"):
            assert getattr(first, name).tobytes() == getattr(other, name).tobytes()


@pytest.mark.parametrize("crowd", [None, 40])
def test_little_memory_changes_no_bit(crowd):
    embeddings = clustered(5000, 24, seed=6, dtype=np.float16)
    embeddings[1000:4000:9] = embeddings[1]
    at_once = find_pairs(embeddings, 0.85, crowd=crowd)
    for memory in (1, 200_000, 1 << 40):  # slabs of a block, of some, and one
        other = find_pairs(embeddings, 0.85, crowd=crowd, memory=memory, block=100)
        for name in ("i", "j", "similarity"):
            assert getattr(at_once, name).tobytes() == getattr(other, name).tobytes()
        assert (crowd is None) == (other.crowd is None)
        assert crowd is None or at_once.crowd.rows.tolist() == other.crowd.rows.tolist()
    embeddings[4567, 3] = np.inf
    with pytest.raises(ValueError, match="row 4567 is not finite"):
        find_pairs(embeddings, 0.85, memory=1)


def test_a_screen_takes_no_more_memory_than_it_is_reckoned_with():
    embeddings = clustered(100_000, 24, seed=10, dtype=np.float16)
    axes = np.eye(24, dtype=np.float32)
    tracemalloc.start()
    screen = Screen.of(embeddings, axes, 0.9, 256, 0, len(embeddings))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(screen.rows) == len(embeddings)
    assert peak <= len(embeddings) * Screen.bytes_a_row(24) + 4_000_000  # what is turned at a time


def test_float16_is_widened_to_the_same_numbers():
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16).reshape(256, 256)
    finite = every[np.isfinite(every).all(axis=1)]
    assert as_float32(finite).tobytes() == finite.astype(np.float32).tobytes()
    np.testing.assert_array_equal(as_float32(every), every.astype(np.float32))  # with infinities and NaN


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_the_length_of_rows_does_not_matter(scale):
    embeddings = clustered(300, 16, seed=11, dtype=np.float64)
    expected = as_list(find_pairs(embeddings, 0.9))
    embeddings[::2] *= scale
    assert as_list(find_pairs(embeddings, 0.9)) == expected


@pytest.mark.parametrize("threads", [1, 2])
def test_pairs_inside_a_crowd_are_left_out_and_all_others_found(threads):
    rng = np.random.default_rng(7)
    embeddings = clustered(3000, 24, seed=7)
    placeholder = rng.standard_normal(24)
    copies = rng.choice(3000, 900, replace=False)
    embeddings[copies] = placeholder + 0.05 * rng.standard_normal((900, 24))
    every, crowd = find_pairs(embeddings, 0.9), 40
    near = np.bincount(np.concatenate([every.i, every.j]), minlength=3000)
    crowded = near > crowd

    pairs = find_pairs(embeddings, 0.9, crowd=crowd, threads=threads)
    assert pairs.crowd is not None and pairs.crowd.rows.tolist() == np.flatnonzero(crowded).tolist()
    outside = ~(crowded[every.i] & crowded[every.j])
    for name in ("i", "j", "similarity"):
        assert getattr(pairs, name).tobytes() == getattr(every, name)[outside].tobytes()
    assert len(pairs) <= crowd * 3000 < len(every)

    # What was left out is to be had one by one.
    row = int(pairs.crowd.rows[3])
    others = pairs.crowd.rows[pairs.crowd.rows != row]
    known = {(a, b): s for a, b, s in zip(every.i.tolist(), every.j.tolist(), every.similarity.tolist(), strict=True)}
    expected = [(o, known[min(o, row), max(o, row)]) for o in others.tolist() if (min(o, row), max(o, row)) in known]
    assert pairs.crowd.near(row, others.tolist()) == expected
    links = list(pairs.crowd.links())
    assert all((min(link), max(link)) in known for link in links)
    assert len(links) == len(pairs.crowd.rows) - 1 == len({b for _, b in links})


@pytest.mark.parametrize("spread", [0.05, 0.35, 0.6])  # balls that touch nothing, loose ones, chains
def test_links_of_a_crowd_connect_what_its_near_pairs_connect(spread):
    rng = np.random.default_rng(5)
    centres = rng.standard_normal((5, 8))
    embeddings = (centres[rng.integers(0, 5, 500)] + spread * rng.standard_normal((500, 8))).astype(np.float32)
    every = find_pairs(embeddings, 0.95)
    near = set(zip(every.i.tolist(), every.j.tolist(), strict=True))
    links = list(Crowd(embeddings, np.arange(500), np.arange(500), 0.95).links())
    assert all((min(link), max(link)) in near for link in links)

    def components(pairs) -> np.ndarray:
        component = np.arange(500)
        for a, b in pairs:
            component[component == component[b]] = component[a]
        return np.unique(component, return_inverse=True)[1]

    ours, theirs = components(links), components(near)
    assert len(np.unique(np.stack([ours, theirs]), axis=1).T) == ours.max() + 1 == theirs.max() + 1
    assert len(links) == 500 - (ours.max() + 1)


@pytest.mark.parametrize("n", [100, 3000])
def test_the_nearest_known_row_is_found_wherever_one_is_near(n):
    both = clustered(n + 700, 24, seed=8, dtype=np.float16)
    known, queries = both[:n], both[n:]
    known[n // 2] = known[0]  # of equals the first
    queries[5] = known[0]
    row, cosine = find_nearest(queries, known, 0.9, threads=2)
    x, y = (rows.astype(np.float64) for rows in (queries, known))
    every = (x @ y.T / np.linalg.norm(x, axis=1)[:, None] / np.linalg.norm(y, axis=1)).astype(np.float32)
    near = every.max(axis=1) >= np.float32(0.9)
    assert 0 < near.sum() < len(queries)
    assert ((row >= 0) == near).all() and np.isnan(cosine[~near]).all()
    np.testing.assert_array_equal(row[near], every.argmax(axis=1)[near])
    np.testing.assert_allclose(cosine[near], every.max(axis=1)[near], rtol=1e-6)
    assert row[5] == 0
    for memory in (1, 50_000):
        for one, other in zip(find_nearest(queries, known, 0.9, memory=memory, block=64), (row, cosine), strict=True):
            np.testing.assert_array_equal(one, other)
    with pytest.raises(ValueError, match="24 dimensions, known rows 12"):
        find_nearest(queries, known[:, :12], 0.9)
    assert (find_nearest(queries, known[:0], 0.9)[0] == -1).all()


def test_pairs_at_a_higher_threshold_are_those_that_it_would_have_found():
    embeddings = clustered(600, 24, seed=9)
    embeddings[:200] = embeddings[0] + 0.2 * np.random.default_rng(0).standard_normal((200, 24)).astype(np.float32) / 5
    low, high = find_pairs(embeddings, 0.8), find_pairs(embeddings, 0.95)
    assert as_list(low.at_least(0.95)) == as_list(high) and len(low) > len(high) > 0
    crowd = find_pairs(embeddings, 0.8, crowd=20).at_least(0.95).crowd
    others = crowd.rows[1:].tolist()
    near = {(a, b) for a, b in as_list(high)}
    assert [o for o, _ in crowd.near(int(crowd.rows[0]), others)] == [
        o for o in others if (int(crowd.rows[0]), o) in near
    ]


def test_renumbered_pairs_keep_their_crowd():
    embeddings = np.repeat(np.eye(4, dtype=np.float32), [30, 1, 1, 1], axis=0)
    numbers = np.arange(33) * 10 + 5
    pairs = find_pairs(embeddings, 0.9, crowd=3).renumbered(numbers)
    assert pairs.crowd.rows.tolist() == numbers[:30].tolist() and 15 in pairs.crowd
    assert pairs.crowd.near(5, [15, 25]) == [(15, 1.0), (25, 1.0)]


def test_without_a_crowd_nothing_is_left_out():
    pairs = find_pairs(clustered(400, 16, seed=4), 0.9, crowd=1000)
    assert pairs.crowd is None and as_list(pairs) == as_list(find_pairs(clustered(400, 16, seed=4), 0.9))


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
    with pytest.raises(ValueError, match="threads"):
        find_pairs(rows, 0.5, threads=-1)
    with pytest.raises(ValueError, match="memory"):
        find_pairs(rows, 0.5, memory=0)
    with pytest.raises(ValueError, match=r"\[n, d\]"):
        find_pairs(rows.astype(int), 0.5)
    rows[2, 1] = np.nan
    with pytest.raises(ValueError, match="row 2 is not finite"):
        find_pairs(rows, 0.5)
