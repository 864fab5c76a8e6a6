"""Connected components, against walking the links."""

from __future__ import annotations

import numpy as np

from curate.neighbors.components import components, linked


def test_every_row_is_named_by_the_smallest_that_it_is_linked_to():
    assert components(np.array([4, 5, 1]), np.array([2, 4, 0]), 7).tolist() == [0, 0, 2, 3, 2, 2, 6]
    assert components(np.empty(0, int), np.empty(0, int), 3).tolist() == [0, 1, 2]


def test_random_links_are_walked_to_their_ends():
    rng = np.random.default_rng(0)
    for _ in range(20):
        n, m = 40, int(rng.integers(0, 40))
        i, j = rng.integers(0, n, (2, m))
        expected = np.arange(n)
        for _ in range(n):
            for a, b in zip(i, j, strict=True):
                expected[a] = expected[b] = min(expected[a], expected[b])
        assert components(i, j, n).tolist() == expected.tolist()
        blocks = ((i[at : at + 7], j[at : at + 7]) for at in range(0, m, 7))
        assert linked(blocks, n).tolist() == expected.tolist()
