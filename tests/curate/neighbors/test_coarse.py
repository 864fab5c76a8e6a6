"""Products of bytes go before the others where the processor has them: what is found does not depend on them."""

import numpy as np
import pytest

from curate.neighbors import coarse, find_nearest, find_pairs


@pytest.mark.parametrize("size", [1.0, 0.003])
def test_rows_in_bytes_are_as_far_off_as_they_say(size):
    rows = (size * np.random.default_rng(0).standard_normal((100, 25))).astype(np.float32)
    step = size / 127  # so that some numbers are out of reach
    found, off = coarse.as_bytes(rows, step)
    assert found.shape == (100, 32) and not found[:, 25:].any()
    missed = np.linalg.norm(rows.astype(np.float64) - found[:, :25] * step, axis=1)
    assert missed.max() == pytest.approx(off) and missed.max() > size


def test_products_are_exact_where_they_are_used():
    if not coarse.there():
        pytest.skip("this processor has no exact products of bytes that are faster")
    x, y = np.random.default_rng(0).integers(-127, 128, (2, 70, 48)).astype(np.int8)
    assert (coarse.products(x, y[:33]) == x.astype(np.int64) @ y[:33].T.astype(np.int64)).all()


def exactly(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """As products of bytes are, on any processor."""
    return (x.astype(np.int32) @ y.T.astype(np.int32)).astype(np.int32)


@pytest.mark.parametrize("threshold", [0.7, 0.9])
@pytest.mark.parametrize("power", [0.0, 2.0])
def test_bytes_change_no_pair(power, threshold, monkeypatch):
    rng = np.random.default_rng(1)
    rows = rng.standard_normal((3000, 64)).astype(np.float32) * np.arange(1, 65, dtype=np.float32) ** -power
    rows[::10] = rows[rng.integers(0, 3000, 300)] + 0.05 * rng.standard_normal((300, 64)).astype(np.float32)
    rows[7] = 0
    if power == 2.0:
        rows = rows[:2200]  # nearly all are near
        threshold = max(threshold, 0.9)
    monkeypatch.setattr(coarse, "products", exactly)
    results = []
    for used in (False, True):
        monkeypatch.setattr(coarse, "pays", lambda n, used=used: used)
        found = [find_pairs(rows, threshold), find_pairs(rows, threshold, memory=200_000, crowd=50)]
        results.append((found, find_nearest(rows[:700], rows[500:], threshold, memory=100_000)))
    for one, two in zip(*(found for found, _ in results), strict=True):
        for name in ("i", "j", "similarity"):
            np.testing.assert_array_equal(getattr(one, name), getattr(two, name))
    for one, two in zip(*(nearest for _, nearest in results), strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("lowest", [-10, 400, 1500, 10**6])
def test_what_reaches_a_number_is_found_row_by_row(lowest, monkeypatch):
    monkeypatch.setattr(coarse, "products", exactly)
    x, y = np.random.default_rng(2).integers(-20, 21, (2, 90, 16)).astype(np.int8)
    found = coarse.reaching(x, y[:33], lowest)
    expected = np.nonzero(x.astype(np.int64) @ y[:33].T.astype(np.int64) >= lowest)
    assert (len(expected[0]) > 0) == (lowest < 10**6)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)
