"""The join within cells in pieces of even work: whole cells some at a time, and parts of large cells two at a time.

Pure functions of arrays, for tasks that see a part of the rows each (:mod:`curate.stages.cells`). What is found is
that of :func:`curate.neighbors.cells.find_pairs_in_cells`, bit for bit: a pair is decided by its two rows alone, and a
row is crowded by what is near it within a whole cell. Of a cell in parts that is known when all of its tiles are:

- a row that has more than ``crowd`` near rows in one tile is crowded, and that tile may leave out pairs of two such;
- any other row has all its pairs in the tiles' results, where they are counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from curate.neighbors.join import BLOCK, concatenated, join_blocks, join_with, once, outside
from curate.neighbors.screen import Screen
from curate.neighbors.verify import Pairs

ROWS = 1 << 18  # that a tile holds at most
COMPARED = 1 << 32  # pairs of rows that a tile compares at most: some seconds of one core
EVEN = 64  # tiles there are at least, where rows are few, as long as these have some thousand
FEWEST = 1 << 14  # rows that a tile holds, unless there are no more


@dataclass(frozen=True)
class Tile:
    """What is compared at a time.

    Attributes:
        first, last: cells, ``last`` not included.
        a, b: of a single cell the members ``a[0] … a[1]``, with themselves or with the later ones ``b[0] … b[1]``; None
            where cells are whole.
    """

    first: int
    last: int
    a: tuple[int, int] | None = None
    b: tuple[int, int] | None = None


def tiles(sizes: NDArray[np.int64], bytes_a_row: int = 0, memory: int | None = None) -> list[Tile]:
    """Tiles of even work that compare all members of each cell with each other.

    Args:
        sizes: ``[cells]``, how many members each has.
        bytes_a_row: that a row takes while its tile is compared.
        memory: bytes that a tile may take; by default only ``ROWS`` bounds it.
    """
    work = sizes * ((sizes - 1) / 2)
    fits = ROWS if memory is None else max(2, min(ROWS, memory // bytes_a_row))
    rows = min(fits, max(FEWEST, int(sizes.sum()) // EVEN))
    found: list[Tile] = []
    first = last = held = 0
    compared = 0.0

    def flush() -> None:
        if compared:
            found.append(Tile(first, last))

    for cell, (size, pairs) in enumerate(zip(sizes.tolist(), work.tolist(), strict=True)):
        parted = size > fits or pairs > COMPARED
        if parted or held + size > rows or compared + pairs > COMPARED:
            flush()
            first, held, compared = cell, 0, 0.0
        if parted:
            found += _parts(cell, size, min(fits // 2, int(COMPARED**0.5)))
            first = cell + 1
        else:
            held, compared = held + size, compared + pairs
        last = cell + 1
    flush()
    return found


def _parts(cell: int, size: int, most: int) -> list[Tile]:
    """Each part of a cell with itself and with each later one."""
    number = -(-size // most)
    bounds = [size * part // number for part in range(number + 1)]
    parts = list(zip(bounds[:-1], bounds[1:], strict=True))
    return [Tile(cell, cell + 1, a, b) for place, a in enumerate(parts) for b in parts[place:]]


def bytes_a_row(d: int, itemsize: int) -> int:
    """What a row of d numbers takes in a tile: itself twice, while rows are put in order, and the screen."""
    return 2 * d * itemsize + 16 + Screen.bytes_a_row(d)


def join_cells(
    rows: NDArray,
    numbers: NDArray[np.int64],
    bounds: NDArray[np.int64],
    threshold: float,
    crowd: int | None,
    axes: NDArray[np.float32] | None = None,
) -> tuple[Pairs, NDArray[np.int64]]:
    """Near pairs within each of some whole cells.

    Args:
        rows: ``[m, d]``, the members of the cells, one cell after the other.
        numbers: int64 ``[m]``, what they are called, ascending in each cell.
        bounds: int64 ``[cells + 1]``, where each cell starts.
        threshold: cosine in (0, 1].
        crowd: see :func:`curate.neighbors.find_pairs`.
        axes: of the screen (:func:`curate.neighbors.screen.screening_axes`), of the whole set; None takes those of each
            cell.

    Returns:
        Pairs of numbers, in order and each once, without those inside a cell's crowd; and the crowded numbers.
    """
    found, crowded = [Pairs.empty()], [np.empty(0, np.int64)]
    for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        if stop - start > 1:
            pairs = join_blocks(rows[start:stop], threshold, crowd, BLOCK, map, axes=axes)
            pairs = pairs.renumbered(numbers[start:stop])
            found.append(pairs)
            if pairs.crowd is not None:
                crowded.append(pairs.crowd.rows)
    return once(concatenated(found)), np.unique(np.concatenate(crowded))


def join_parts(
    a: NDArray,
    a_numbers: NDArray[np.int64],
    b: NDArray,
    b_numbers: NDArray[np.int64],
    threshold: float,
    crowd: int | None,
    axes: NDArray[np.float32] | None = None,
) -> tuple[Pairs, NDArray[np.int64]]:
    """Likewise of each row of one part of a cell and each of a later part, whose numbers are higher."""
    numbers = np.concatenate([a_numbers, b_numbers])
    pairs = join_with(np.concatenate([a, b]), len(a), threshold, crowd, BLOCK, map, axes).renumbered(numbers)
    crowded = np.empty(0, np.int64) if pairs.crowd is None else pairs.crowd.rows
    return once(pairs), crowded


def crowded_rows(
    found: Iterable[tuple[Tile, NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]], n: int, crowd: int | None
) -> NDArray[np.bool_]:
    """Which of n rows are crowded within some cell.

    Args:
        found: of each tile, in their order: the tile, ``i`` and ``j`` of its pairs, and the crowded rows of it.
        n: rows.
        crowd: near rows above which a row is crowded; None for no crowd.
    """
    crowded = np.zeros(n, bool)
    if crowd is None:
        return crowded
    cell, parts = -1, [np.empty(0, np.int64)]
    for tile, i, j, rows in found:
        crowded[rows] = True
        if tile.a is None:
            continue
        if tile.first != cell:
            crowded[_oftener(parts, crowd)] = True
            cell, parts = tile.first, []
        parts += [np.array(i), np.array(j)]
    crowded[_oftener(parts, crowd)] = True
    return crowded


def _oftener(parts: Sequence[NDArray[np.int64]], crowd: int) -> NDArray[np.int64]:
    """The numbers that stand there more than ``crowd`` times."""
    numbers, times = np.unique(np.concatenate(parts), return_counts=True)
    return numbers[times > crowd]


def merged(found: Sequence[Pairs], crowded: NDArray[np.bool_]) -> Pairs:
    """Pairs of several tiles in order, each once, without those of two crowded rows."""
    return once(outside([Pairs.empty(), *found], crowded))


def cuts(starts: Iterable[NDArray[np.int64]], n: int, most: int) -> NDArray[np.int64]:
    """Rows at which sorted pairs are cut, 0 and n among them, so that no more than about ``most`` lie between two.

    Args:
        starts: ``i`` of the pairs of each tile.
        n: rows.
        most: pairs.
    """
    width = max(1, n // (1 << 16))
    counts = np.zeros(-(-n // width), np.int64)
    for i in starts:
        for start in range(0, len(i), 1 << 20):
            np.add.at(counts, i[start : start + (1 << 20)] // width, 1)
    parts = np.cumsum(counts) // most
    return np.unique(np.concatenate([[0], (1 + np.flatnonzero(np.diff(parts))) * width, [n]]))
