"""The plan of tiles compares every pair of a cell once, in even pieces; what tiles find is what whole cells find."""

import itertools

import numpy as np
import pytest

from curate.neighbors import tiles
from curate.neighbors.join import find_pairs
from curate.neighbors.tiles import COMPARED, ROWS, Tile, crowded_rows, cuts, join_cells, join_parts, merged
from curate.neighbors.verify import Pairs


def compared(plan: list[Tile], sizes: np.ndarray) -> dict[int, int]:
    """Pairs of members that a plan compares, by cell."""
    found = dict.fromkeys(range(len(sizes)), 0)
    for tile in plan:
        for cell in range(tile.first, tile.last):
            if tile.a is None:
                found[cell] += int(sizes[cell]) * (int(sizes[cell]) - 1) // 2
            else:
                a, b = (stop - start for start, stop in (tile.a, tile.b))
                found[cell] += a * (a - 1) // 2 if tile.a == tile.b else a * b
    return found


def rows_of(tile: Tile, sizes: np.ndarray) -> int:
    if tile.a is None:
        return int(sizes[tile.first : tile.last].sum())
    return sum(stop - start for start, stop in {tile.a, tile.b})


@pytest.mark.parametrize("memory", [None, 100_000_000])
def test_every_pair_of_a_cell_is_compared_once_in_tiles_of_bounded_size(memory):
    sizes = np.random.default_rng(0).integers(0, 6000, 500)
    sizes[[0, 200, 499]] = 0, 2_000_001, 90_000
    a_row = tiles.bytes_a_row(256, 2)
    plan = tiles.tiles(sizes, a_row, memory)
    done = compared(plan, sizes)
    assert all(done[cell] == size * (size - 1) // 2 for cell, size in enumerate(sizes.tolist()))
    most = ROWS if memory is None else memory // a_row
    for tile in plan:
        assert rows_of(tile, sizes) <= most and sum(compared([tile], sizes).values()) <= COMPARED
    order = [(tile.first, tile.a or (0, 0), tile.b or (0, 0)) for tile in plan]
    assert order == sorted(order)
    whole = [rows_of(tile, sizes) for tile in plan if tile.a is None]
    assert sum(rows < most / 10 for rows in whole) <= 6  # where a large cell or the end cuts one short


def test_few_rows_are_tiles_for_some_workers_and_cells_of_one_row_none():
    assert len(tiles.tiles(np.full(600, 1000))) == 38
    assert tiles.tiles(np.array([1, 0, 1])) == [] and tiles.tiles(np.empty(0, np.int64)) == []


def test_five_billion_rows_have_as_many_tiles_as_their_work_asks_for():
    sizes = np.full(65_536, 3 * 5_000_000_000 // 65_536)
    plan = tiles.tiles(sizes)
    assert len(plan) == 65_536 * 10  # of four parts each
    assert max(rows_of(tile, sizes) for tile in plan[:100]) < ROWS


def crowd_in_parts(n: int = 900, d: int = 16) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((n, d))
    for start, size, noise in ((0, 400, 0.1), (500, 120, 0.35)):
        chosen = rng.choice(n, size, replace=False)
        rows[chosen] = rows[start] + noise * rng.standard_normal((size, d)) * np.linalg.norm(rows[start]) / d**0.5
    numbers = np.cumsum(rng.integers(1, 10**8, n))  # above 2^32
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16), numbers


@pytest.mark.parametrize("crowd", [None, 20, 60])
def test_a_cell_in_parts_has_the_pairs_and_the_crowd_of_the_whole_cell(crowd):
    rows, numbers = crowd_in_parts()
    whole = find_pairs(rows, 0.9, crowd=crowd)
    found, n = [], len(rows)
    places = np.arange(n)
    parts = list(itertools.pairwise([0, 250, 600, n]))
    for at, a in enumerate(parts):
        for b in parts[at:]:
            one, other = slice(*a), slice(*b)
            if a == b:
                pairs, crowded = join_cells(rows[one], places[one], np.array([0, a[1] - a[0]]), 0.9, crowd)
            else:
                pairs, crowded = join_parts(rows[one], places[one], rows[other], places[other], 0.9, crowd)
            found.append((Tile(7, 8, a, b), pairs, crowded))
    crowded = crowded_rows(((tile, pairs.i, pairs.j, rows) for tile, pairs, rows in found), n, crowd)
    pairs = merged([pairs for _, pairs, _ in found], crowded)
    for name in ("i", "j", "similarity"):
        assert getattr(pairs, name).tobytes() == getattr(whole, name).tobytes()
    expected = [] if whole.crowd is None else whole.crowd.rows.tolist()
    assert np.flatnonzero(crowded).tolist() == expected
    assert crowd is None or len(expected) > 100
    pairs, _ = join_cells(rows, numbers, np.array([0, n]), 0.9, crowd)  # and by its rows' own numbers
    assert pairs.i.tobytes() == numbers[whole.i].tobytes() and pairs.j.tobytes() == numbers[whole.j].tobytes()


def test_rows_are_crowded_by_a_cell_not_by_two():
    near = np.arange(1, 41)
    found = [(np.zeros(20, np.int64), near[start : start + 20], near[:0]) for start in (0, 20)]
    two = [(Tile(cell, cell + 1, (0, 9), (0, 9)), *some) for cell, some in enumerate(found)]
    assert not crowded_rows(two, 50, 30).any()
    one = [(Tile(0, 1, (0, 9), part), *some) for part, some in zip(((0, 9), (9, 18)), found, strict=True)]
    assert np.flatnonzero(crowded_rows(one, 50, 30)).tolist() == [0]


def test_pairs_of_billions_of_rows_are_merged_in_order_some_at_a_time():
    n = 1 << 33
    rng = np.random.default_rng(0)
    some = []
    for _ in range(5):
        i = np.sort(rng.integers(0, n // 2, 2000))
        some.append(Pairs(i, i + 1 + rng.integers(0, n // 2, 2000), rng.random(2000).astype(np.float32)))
    some.append(some[0])
    at = cuts([pairs.i for pairs in some], n, 1000)
    assert at[0] == 0 and at[-1] == n and (np.diff(at) > 0).all() and 8 < len(at) < 20
    every = tiles.concatenated(some)
    ranges = [
        Pairs(every.i[within], every.j[within], every.similarity[within])
        for low, high in itertools.pairwise(at.tolist())
        for within in [(every.i >= low) & (every.i < high)]
    ]
    assert max(map(len, ranges)) < 2500
    found = tiles.concatenated([tiles.once(pairs) for pairs in ranges])
    keys = list(zip(found.i.tolist(), found.j.tolist(), strict=True))
    assert keys == sorted(set(keys)) and len(keys) == 10_000
