"""Connected components: what near pairs link, however long the chain."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray


def components(i: NDArray[np.integer], j: NDArray[np.integer], n: int) -> NDArray[np.int64]:
    """``[n]``: the smallest row that each row is linked to, itself where it is linked to none.

    Args:
        i, j: rows in [0, n) of each linked pair, in any order.
        n: rows.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    links = coo_array((np.ones(len(i), bool), (i, j)), (n, n))
    number, component = connected_components(links, directed=False)
    smallest = np.full(number, n, np.int64)
    np.minimum.at(smallest, component, np.arange(n))
    return smallest[component]


def linked(blocks: Iterable[tuple[NDArray[np.integer], NDArray[np.integer]]], n: int) -> NDArray[np.integer]:
    """``[n]``, likewise of pairs that come some at a time, in four bytes where that is enough.

    Args:
        blocks: ``(i, j)`` of some pairs.
        n: rows.
    """
    root: NDArray[np.integer] = np.arange(n, dtype=np.int32 if n < 1 << 31 else np.int64)
    for i, j in blocks:
        a, b = root[i], root[j]
        apart = a != b
        if apart.any():
            nodes, ends = np.unique(np.concatenate([a[apart], b[apart]]), return_inverse=True)
            smallest = np.arange(n, dtype=root.dtype)
            one, other = np.split(ends, 2)
            smallest[nodes] = nodes[components(one, other, len(nodes))]
            root = smallest[root]
    return root
