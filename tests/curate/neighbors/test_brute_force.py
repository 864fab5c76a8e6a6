"""The nearest rows, as one product of everything with everything has them."""

from __future__ import annotations

import numpy as np
import pytest

from curate.neighbors.brute_force import in_blocks, nearest


@pytest.fixture(scope="module")
def unit():
    rows = np.random.default_rng(0).standard_normal((200, 16)).astype(np.float32)
    rows[150] = rows[20]  # equally near: the first of them is found
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize("k", [1, 5, 300])
@pytest.mark.parametrize("block", [1, 7, 64, 1000])
def test_the_nearest_are_found_whatever_the_block(unit, block, k):
    queries = unit[3::5]
    product, row = nearest(queries, in_blocks(unit, block), k)
    full = queries @ unit.T
    order = np.argsort(-full, axis=1, kind="stable")[:, :k]
    np.testing.assert_allclose(product, np.take_along_axis(full, order, 1), atol=1e-6)
    assert product.dtype == np.float32 and row.shape == (len(queries), min(k, 200))
    np.testing.assert_allclose(np.einsum("md,mkd->mk", queries, unit[row]), product, atol=1e-6)


@pytest.mark.parametrize("block", [1, 64])
def test_of_equally_near_rows_the_earlier_is_first(unit, block):
    assert nearest(unit[[150]], in_blocks(unit, block))[1].tolist() == [[20]]
    assert nearest(unit[[150]], in_blocks(unit, block), 2)[1].tolist() == [[20, 150]]


def test_what_is_hidden_does_not_count(unit):
    def hide(start, products):
        inside = np.arange(start, start + products.shape[1])
        products[:, np.isin(inside, [20, 150])] = -np.inf

    product, row = nearest(unit[[20]], in_blocks(unit, 64), hide=hide)
    full = unit @ unit[20]
    full[[20, 150]] = -np.inf
    assert row.tolist() == [[int(full.argmax())]] and product[0, 0] == pytest.approx(float(full.max()), abs=1e-6)


def test_without_rows_nothing_is_near(unit):
    product, row = nearest(unit[:3], iter(()))
    assert product.shape == row.shape == (3, 0)
