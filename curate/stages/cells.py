"""The join within cells as an engine's tasks, files in and files out, for sets that are too large for the exact one.

    vectors ─▶ centroids ─▶ cells-000000 … (a task for some rows) ─▶ pairs-…-000000 … (a task for some cells) ─▶ Pairs

Rows lie in one file, ``vectors``. A task assigns some of them to their nearest cells and writes these rows again,
sorted by cell. A next one gathers some whole cells out of all those files, or two parts of one large cell, and compares
exactly. What each finds is sorted, and merged in the end. A file that is there is whole: what was done by a run before,
on whatever engine, is not done again. All files lie in one folder, which all machines see and which goes when the pairs
are cached.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from afresh.cores import cpu_count
from afresh.errors import UserError
from afresh.files import digest, write_atomic
from curate.columns import BLOCK, arrays_on_disk
from curate.engines.protocol import Engine

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from curate.neighbors.tiles import Tile
    from curate.neighbors.verify import Pairs


FORMAT = 1
PAIR = (np.int64, np.int64, np.float32)  # two rows and their similarity
ASSIGNED = 1 << 18  # rows of a task that assigns, at most
MERGED = 1 << 22  # pairs that are put in order at a time
ASSIGNED_FEWEST = 1 << 13
ASSIGNED_EVEN = 64  # tasks that assign, at least, as long as they have ASSIGNED_FEWEST rows
MOST_FILES = 4096  # of sorted rows: every next task opens them all


@dataclass(frozen=True)
class Cells:
    """A set of rows that is joined, and where.

    Attributes:
        folder: of the files.
        n, d: rows, and numbers in each.
        dtype: of these.
        threshold, crowd: of the join.
        cells, probes: how many cells there are, and in how many each row stands.
        seed: of the centroids.
    """

    folder: Path
    n: int
    d: int
    dtype: str
    threshold: float
    crowd: int | None
    cells: int
    probes: int
    seed: int

    @property
    def vectors(self) -> NDArray[Any]:
        """``[n, d]``, memory-mapped."""
        return np.memmap(self.folder / "vectors", self.dtype, "r", shape=(self.n, self.d))

    @property
    def rows_a_task(self) -> int:
        """Rows that a task assigns: a multiple of those whose products are formed at a time."""
        from curate.neighbors.cells import assigned_together

        step = assigned_together(self.cells)
        even = max(ASSIGNED_FEWEST, self.n // ASSIGNED_EVEN)
        return -(-max(min(ASSIGNED, even), self.n // MOST_FILES) // step) * step

    def sorted_rows(self) -> list[_SortedRows]:
        """The files of the tasks that assign."""
        starts = range(0, self.n, self.rows_a_task)
        return [_SortedRows(self, number, start) for number, start in enumerate(starts)]


@dataclass(frozen=True)
class _SortedRows:
    """Some rows by cell, as a file: where each cell starts, int64 ``[cells + 1]``; their numbers, int64; vectors."""

    of: Cells
    number: int
    start: int

    @property
    def label(self) -> str:
        return f"rows from {self.start}"

    @property
    def path(self) -> Path:
        return self.of.folder / f"cells-{self.number:06d}"

    def write(self) -> None:
        from curate.neighbors.cells import assigned_together, by_cell, nearest_cells
        from curate.neighbors.verify import unit_rows

        of, centroids = self.of, _loaded(self.of.folder / "centroids.npy")
        vectors, stop = of.vectors, min(self.start + of.rows_a_task, of.n)
        rows, step = vectors[self.start : stop], assigned_together(of.cells)
        nearest = [
            nearest_cells(unit_rows(vectors, slice(at, min(at + step, stop))), centroids, of.probes)
            for at in range(self.start, stop, step)
        ]
        order, bounds = by_cell(np.concatenate(nearest), of.cells)
        with write_atomic(self.path) as temporary, open(temporary, "wb") as file:
            bounds.astype(np.int64).tofile(file)
            (order + self.start).tofile(file)
            for at in range(0, len(order), BLOCK):
                np.asarray(rows[order[at : at + BLOCK]]).tofile(file)

    def bounds(self, first: int, last: int) -> NDArray[np.int64]:
        """``[last - first + 1]``: where these cells start, and the last one ends."""
        return np.fromfile(self.path, np.int64, last - first + 1, offset=8 * first)

    def read(self, start: int, stop: int) -> tuple[NDArray[np.int64], NDArray[Any]]:
        """Numbers and vectors, by their places in the file."""
        of = self.of
        head = 8 * (of.cells + 1)
        width = of.d * np.dtype(of.dtype).itemsize
        standing = min(of.rows_a_task, of.n - self.start) * min(of.probes, of.cells)
        numbers = np.fromfile(self.path, np.int64, stop - start, offset=head + 8 * start)
        at = head + 8 * standing + width * start
        rows = np.fromfile(self.path, of.dtype, (stop - start) * of.d, offset=at)
        return numbers, rows.reshape(stop - start, of.d)


@dataclass(frozen=True)
class _Compared:
    """The pairs of a tile, as a file: how many, and how many crowded rows; ``i``, ``j``, ``similarity``; these rows."""

    of: Cells
    tile: Tile
    path: Path

    @property
    def label(self) -> str:
        return f"cells from {self.tile.first}"

    def write(self) -> None:
        from curate.neighbors.tiles import join_cells, join_parts

        of, tile, axes = self.of, self.tile, _loaded(self.of.folder / "axes.npy")
        if tile.a is None or tile.b is None:
            rows, numbers, bounds = gathered(of, tile.first, tile.last)
        else:
            rows, numbers = part_of(of, tile.first, *tile.a)
            bounds = np.array([0, len(rows)])
        if tile.b == tile.a:
            pairs, crowded = join_cells(rows, numbers, bounds, of.threshold, of.crowd, axes)
        else:
            assert tile.b is not None
            later, later_numbers = part_of(of, tile.first, *tile.b)
            pairs, crowded = join_parts(rows, numbers, later, later_numbers, of.threshold, of.crowd, axes)
        with write_atomic(self.path) as temporary, open(temporary, "wb") as file:
            np.array([len(pairs), len(crowded)], np.int64).tofile(file)
            for column in (pairs.i, pairs.j, pairs.similarity, crowded):
                column.tofile(file)

    def read(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32], NDArray[np.int64]]:
        """``i, j, similarity`` of the pairs, memory-mapped, and the crowded rows."""
        pairs, crowded = np.fromfile(self.path, np.int64, 2).tolist()
        if not pairs:
            nothing = np.empty(0, np.int64)
            return nothing, nothing, np.empty(0, np.float32), np.fromfile(self.path, np.int64, crowded, offset=16)
        data = np.memmap(self.path, np.uint8, "r", offset=16)
        i, j = (data[8 * pairs * at : 8 * pairs * (at + 1)].view(np.int64) for at in (0, 1))
        similarity = data[16 * pairs : 20 * pairs].view(np.float32)
        return i, j, similarity, np.fromfile(self.path, np.int64, crowded, offset=16 + 20 * pairs)


def write_file(task: _SortedRows | _Compared) -> None:
    """Run a task whose file is not there yet."""
    from curate.neighbors.join import one_blas_thread

    if not task.path.is_file():
        with one_blas_thread():
            task.write()


def gathered(of: Cells, first: int, last: int) -> tuple[NDArray[Any], NDArray[np.int64], NDArray[np.int64]]:
    """The members of the cells ``first … last``, one cell after the other.

    Returns:
        ``(rows [m, d], numbers [m], bounds [cells + 1])``, numbers ascending in each cell.
    """
    files = of.sorted_rows()
    bounds = np.array([file.bounds(first, last) for file in files])
    sizes = np.diff(bounds, axis=1)
    within = np.concatenate([[0], np.cumsum(sizes.sum(axis=0))])
    # Of each cell come first the members in the first file; their numbers are the smallest.
    starts = within[:-1] + np.cumsum(sizes, axis=0) - sizes
    rows, numbers = np.empty((within[-1], of.d), of.dtype), np.empty(within[-1], np.int64)
    for file, bound, size, start in zip(files, bounds, sizes, starts, strict=True):
        if bound[-1] > bound[0]:
            some, vectors = file.read(int(bound[0]), int(bound[-1]))
            places = np.repeat(start - (bound[:-1] - bound[0]), size) + np.arange(len(some))
            numbers[places], rows[places] = some, vectors
    return rows, numbers, within


def part_of(of: Cells, cell: int, start: int, stop: int) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """``(rows, numbers)`` of the members ``start … stop`` of a cell."""
    numbers, rows, before = [np.empty(0, np.int64)], [np.empty((0, of.d), of.dtype)], 0
    for file in of.sorted_rows():
        first, last = file.bounds(cell, cell + 1).tolist()
        low, high = max(first, first + start - before), min(last, first + stop - before)
        if high > low:
            some, vectors = file.read(low, high)
            numbers.append(some)
            rows.append(vectors)
        before += last - first
    return np.concatenate(rows), np.concatenate(numbers)


@lru_cache(maxsize=2)
def _loaded(path: Path) -> NDArray[np.float32]:
    return np.asarray(np.load(path, mmap_mode="r"))


def pairs_by_tasks(
    engine: Engine,
    folder: Path,
    embeddings: NDArray[Any],
    threshold: float,
    crowd: int | None,
    memory: int,
    desc: str,
    cells: int = 0,
    seed: int = 0,
) -> Pairs:
    """What :func:`curate.neighbors.cells.find_pairs_in_cells` finds, bit for bit.

    Args:
        engine: where the tasks run.
        folder: of the files, which all machines see; it names the rows that are joined.
        embeddings: ``[n, d]``, n of two and more.
        threshold: cosine in (0, 1].
        crowd: see :func:`curate.neighbors.find_pairs`.
        memory: bytes that a task may take for what it compares.
        desc: of the progress bar.
        cells: as there.
        seed: of the centroids.

    Raises:
        UserError: a task's worker was killed again and again, the disk is full, or machines do not see one folder.
        ValueError: a row is not finite (named).
    """
    from curate.neighbors import tiles
    from curate.neighbors.cells import PROBES, number_of_cells
    from curate.neighbors.join import check_arguments

    check_arguments(embeddings, threshold)
    n, d = embeddings.shape
    of = Cells(folder, n, d, embeddings.dtype.str, threshold, crowd, number_of_cells(n, cells), PROBES, seed)
    write_vectors(of, embeddings)
    _write_arrays(of, embeddings)
    files = of.sorted_rows()
    _run(engine, files, f"{desc}: assigning")
    sizes = np.zeros(of.cells, np.int64)
    for file in files:
        sizes += np.diff(file.bounds(0, of.cells))
    plan = tiles.tiles(sizes, tiles.bytes_a_row(d, embeddings.dtype.itemsize), memory)
    # Another plan, as other memory makes it, has other files.
    name = digest([FORMAT, threshold, crowd, [(tile.first, tile.last, tile.a, tile.b) for tile in plan]])[:12]
    compared = [_Compared(of, tile, folder / f"pairs-{name}-{number:06d}") for number, tile in enumerate(plan)]
    _run(engine, compared, f"{desc}: comparing")
    return _merged(of, compared, embeddings)


def write_vectors(of: Cells, embeddings: NDArray[Any]) -> None:
    """The rows as a file that tasks can read."""
    path = of.folder / "vectors"
    if path.is_file():
        return
    with write_atomic(path) as temporary, open(temporary, "wb") as file:
        for start in range(0, len(embeddings), BLOCK):
            np.ascontiguousarray(embeddings[start : start + BLOCK]).tofile(file)


def _write_arrays(of: Cells, embeddings: NDArray[Any]) -> None:
    """Centroids of the cells, and axes of the screen, both of sampled rows."""
    from concurrent.futures import ThreadPoolExecutor

    from curate.neighbors.cells import rows_of_a_cell
    from curate.neighbors.kmeans import train_centroids
    from curate.neighbors.screen import screening_axes

    def write(name: str, make: Callable[[], NDArray[np.float32]]) -> None:
        if not (of.folder / name).is_file():
            array = make()
            with write_atomic(of.folder / name) as temporary, open(temporary, "wb") as file:
                np.save(file, array)

    with ThreadPoolExecutor(cpu_count()) as pool:
        write("centroids.npy", lambda: train_centroids(embeddings, of.cells, of.seed, pool))
    together = rows_of_a_cell(of.n, of.cells, of.probes)
    write("axes.npy", lambda: screening_axes(embeddings, of.threshold, together))


def _run(engine: Engine, tasks: Sequence[_SortedRows] | Sequence[_Compared], desc: str) -> None:
    missing = [task for task in tasks if not task.path.is_file()]
    engine.map(write_file, missing, desc=desc, unit="tasks")
    for task in missing:
        if not task.path.is_file():
            raise UserError(
                f"{desc}: {task.label} was done on another machine, which does not see {task.of.folder}: all of a "
                "cluster must have out, or work_dir, under one path"
            )


def _merged(of: Cells, compared: Sequence[_Compared], embeddings: NDArray[Any]) -> Pairs:
    """The pairs of all tiles in order, each once, memory-mapped."""
    from curate.neighbors.tiles import crowded_rows, cuts, merged
    from curate.neighbors.verify import Crowd, Pairs

    def columns() -> Iterator[tuple[Tile, NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]]:
        for one in compared:
            i, j, _, rows = one.read()
            yield one.tile, i, j, rows

    crowded = crowded_rows(columns(), of.n, of.crowd)
    starts = (one.read()[0] for one in compared)
    at = cuts(starts, of.n, MERGED)

    def blocks() -> Iterator[list[NDArray[Any]]]:
        for low, high in zip(at[:-1].tolist(), at[1:].tolist(), strict=True):
            some = []
            for one in compared:
                i, j, similarity, _ = one.read()
                within = slice(*np.searchsorted(i, [low, high]).tolist())
                some.append(Pairs(i[within], j[within], similarity[within]))
            pairs = merged(some, crowded)
            yield [pairs.i, pairs.j, pairs.similarity]

    i, j, similarity = arrays_on_disk(of.folder.parent, blocks(), PAIR)
    rows = np.flatnonzero(crowded)
    return Pairs(i, j, similarity, Crowd(embeddings, rows, rows, of.threshold) if len(rows) else None)
