"""Columns that stay on disk: read a row or a block at a time; and numbers of equal values, by hashes of 128 bits."""

from __future__ import annotations

import contextlib
import hashlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from afresh.files import full_disk_named, temporary_name

if TYPE_CHECKING:
    from numpy.typing import NDArray


BLOCK = 1 << 13  # rows that are held as Python's objects at a time
SORTED_PARTS = 16  # of the hashes
GROUPS_HELD = 4  # row groups of a parquet file, by the rows that were asked for last


class Column(Sequence[Any]):
    """A column as a sequence, of which only what is asked for is in memory.

    Args:
        lengths: rows of each piece.
        piece: gives the array of a piece.
        rows: int64 ``[n]``, which rows are meant; None for all.
        default: what stands in the place of a null.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        piece: Callable[[int], pa.Array],
        rows: NDArray[np.int64] | None = None,
        default: Any = None,
    ) -> None:
        self._bounds = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        self._bounds_seen = self._bounds.data
        self._piece, self._rows, self._default = piece, rows, default

    @classmethod
    def of(cls, data: pa.ChunkedArray, rows: NDArray[np.int64] | None = None, default: Any = None) -> Column:
        """A column of a table, which may be memory-mapped."""
        return cls([len(chunk) for chunk in data.chunks], data.chunk, rows, default)

    @classmethod
    def of_parquet(cls, path: str | Path, name: str) -> Column:
        """A column of a parquet file, row group by row group; the file stays open."""
        import pyarrow.parquet as pq

        file = pq.ParquetFile(path, memory_map=True)
        lengths = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]

        reading = Lock()

        @lru_cache(maxsize=GROUPS_HELD)
        def piece(group: int) -> pa.Array:
            with reading:
                found = file.read_row_group(group, columns=[name])[name].combine_chunks()
            return found.chunk(0) if isinstance(found, pa.ChunkedArray) else found

        return cls(lengths, piece)

    def __len__(self) -> int:
        return int(self._bounds[-1]) if self._rows is None else len(self._rows)

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            return self.take(np.arange(*at.indices(len(self))))
        at = int(at)
        if at < 0:
            at += len(self)
        if not 0 <= at < len(self):
            raise IndexError(f"row {at} of {len(self)}")
        row = at if self._rows is None else int(self._rows[at])
        number = bisect_right(self._bounds_seen, row) - 1
        value = self._piece(number)[row - self._bounds_seen[number]].as_py()
        return self._default if value is None else value

    def take(self, places: NDArray[np.integer] | Sequence[int]) -> list[Any]:
        """The values at some places, in their order."""
        rows = np.asarray(places, np.int64)
        rows = rows if self._rows is None else self._rows[rows]
        numbers = np.searchsorted(self._bounds, rows, side="right") - 1
        order = np.argsort(numbers, kind="stable")
        cuts = np.flatnonzero(np.diff(numbers[order])) + 1
        found: list[Any] = [self._default] * len(rows)
        for there in np.split(order, cuts) if len(order) else ():
            number = int(numbers[there[0]])
            values = self._piece(number).take(pa.array(rows[there] - self._bounds[number])).to_pylist()
            for place, value in zip(there.tolist(), values, strict=True):
                if value is not None:
                    found[place] = value
        return found

    def blocks(self) -> Iterator[list[Any]]:
        """All values in order, some thousands at a time."""
        for start in range(0, len(self), BLOCK):
            yield self.take(np.arange(start, min(start + BLOCK, len(self))))

    def __iter__(self) -> Iterator[Any]:
        for block in self.blocks():
            yield from block

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]


def numbered(values: Iterable[str], count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Number of each value in order of appearance, and where each number appears first.

    Of the values only hashes of 128 bits are held, which no two texts of any set are known to share.

    Args:
        values: texts, ``count`` of them.
        count: how many.

    Returns:
        ``(int64 [count], int64 [distinct])``.
    """
    hashes = np.empty((count, 2), np.uint64)
    raw = hashes.reshape(-1).view(np.uint8).data
    end = 0
    for value in values:
        raw[end : end + 16] = hashlib.blake2b(value.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        end += 16
    first_like = _first_equal(hashes)
    del hashes, raw
    appears = first_like == np.arange(count, dtype=first_like.dtype)
    numbers = (np.cumsum(appears) - 1)[first_like]
    del first_like
    return numbers, np.flatnonzero(appears)


def _first_equal(hashes: NDArray[np.uint64]) -> NDArray[np.integer]:
    """``[n]``: the first row that is equal to each of ``hashes`` ``[n, 2]``. Some are sorted at a time."""
    first: NDArray[np.integer] = np.empty(len(hashes), np.int32 if len(hashes) < 1 << 31 else np.int64)
    one_byte = hashes.view(np.uint8)[:, 0]
    for part in range(SORTED_PARTS):
        rows = np.flatnonzero(one_byte % SORTED_PARTS == part)
        some = hashes[rows]
        order = np.lexsort((some[:, 1], some[:, 0]))  # stable: equal ones stand in the order of their rows
        rows, some = rows[order], some[order]
        fresh = np.ones(len(rows), bool)
        fresh[1:] = (some[1:] != some[:-1]).any(axis=1)
        first[rows] = rows[fresh][np.cumsum(fresh) - 1]
    return first


def array_on_disk(
    folder: Path, blocks: Iterable[NDArray[Any]], width: int, dtype: Any = np.float16
) -> NDArray[Any]:
    """``[n, width]``, the rows of all blocks, as a memory map of a file in ``folder`` that has no name any more.

    Raises:
        UserError: the disk is full.
    """
    path, rows = folder / temporary_name("rows"), 0
    try:
        with full_disk_named(folder / "rows"), open(path, "wb") as file:
            for block in blocks:
                file.write(np.ascontiguousarray(block, dtype).data)
                rows += len(block)
        if not rows * width:
            return np.empty((rows, width), dtype)
        return np.asarray(np.memmap(path, dtype, "r", shape=(rows, width)))
    finally:
        path.unlink(missing_ok=True)


def arrays_on_disk(
    folder: Path, blocks: Iterable[Sequence[NDArray[Any]]], dtypes: Sequence[Any]
) -> tuple[NDArray[Any], ...]:
    """Several arrays ``[n]`` that belong together, likewise; each block has a piece of every one.

    Raises:
        UserError: the disk is full.
    """
    paths, rows = [folder / temporary_name(f"numbers-{column}") for column in range(len(dtypes))], 0
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(full_disk_named(folder / "numbers"))
            files = [stack.enter_context(open(path, "wb")) for path in paths]
            for block in blocks:
                for file, piece, dtype in zip(files, block, dtypes, strict=True):
                    file.write(np.ascontiguousarray(piece, dtype).data)
                rows += len(block[0])
        if not rows:
            return tuple(np.empty(0, dtype) for dtype in dtypes)
        return tuple(
            np.asarray(np.memmap(path, dtype, "r", shape=(rows,))) for path, dtype in zip(paths, dtypes, strict=True)
        )
    finally:
        for path in paths:
            path.unlink(missing_ok=True)


def on_disk(folder: Path, array: NDArray[Any]) -> NDArray[Any]:
    """One array ``[n]``, likewise."""
    return arrays_on_disk(folder, [[array]], [array.dtype])[0]


def table_on_disk(folder: Path, batches: Iterable[pa.RecordBatch], schema: pa.Schema) -> pa.Table:
    """The table of all batches, likewise."""
    path = folder / temporary_name("table")
    try:
        named = full_disk_named(folder / "table")
        with named, pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, schema) as writer:
            for batch in batches:
                writer.write_batch(batch)
        return pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    finally:
        path.unlink(missing_ok=True)


def some_rows(table: pa.Table, rows: Iterable[int]) -> pa.Table:
    """A few rows of a table. Not by ``take``, which puts the pieces of a column together and fails where they are text
    of more than 2 GiB.
    """
    return pa.concat_tables([table.slice(0, 0), *(table.slice(row, 1) for row in rows)])
