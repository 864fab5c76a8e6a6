"""What the read stage found, on disk: one row of text a sample, and the embeddings of those that can be read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from curate.columns import BLOCK, Column, array_on_disk, on_disk, table_on_disk
from curate.reading.samples import NO_SAMPLE

if TYPE_CHECKING:
    from numpy.typing import NDArray


READ_COLUMNS = (
    ("shard", pa.string()),
    ("key", pa.string()),
    ("reason", pa.string()),  # why the image cannot be used; null when it can
    ("left_out", pa.string()),  # the filter that leaves the sample out; null when none does
    ("caption_problem", pa.string()),
    ("caption", pa.string()),
    ("captionless", pa.bool_()),  # nothing stands where a caption would; null of what is no whole sample
    ("others", pa.list_(pa.string())),  # further captions: of its own, and pooled by curations before
    ("duplicates", pa.int64()),  # that curations before dropped for it
    ("sha256", pa.string()),
    ("pixels", pa.string()),  # equal only for images with equal pixels
    ("width", pa.int32()),
    ("height", pa.int32()),
    ("lossless", pa.bool_()),
    ("numbers", pa.list_(pa.float64())),  # of the json fields that decide who is preferred
)


@dataclass(frozen=True)
class Rows:
    """Every sample of the input, in input order.

    Attributes:
        table: READ_COLUMNS of all N rows, memory-mapped; ``reason`` says of each row why it is unreadable, or is null.
        starts: int64 [shards + 1], the first row of each input shard, and N.
        readable: int64 [n], the rows that can be curated, memory-mapped.
        embeddings: float16 [n, dim] of the readable rows, memory-mapped.
    """

    table: pa.Table
    starts: NDArray[np.int64]
    readable: NDArray[np.int64]
    embeddings: NDArray[np.float16]

    @classmethod
    def load(cls, caches: Sequence[Path], dim: int, missing_caption: str, shards: Sequence[str] = ()) -> Rows:
        """What the caches hold, brought into two files that are memory-mapped and gone with the process.

        Args:
            caches: of the read stage, in input order.
            dim: of the embeddings.
            missing_caption: as in the settings; ``auto`` is ``unreadable`` where some sample has a caption.
            shards: names; with them a shard that holds nothing has a row that says so.
        """
        folder, names = caches[0].parent, [name for name, _ in READ_COLUMNS]
        sizes: list[int] = []

        def batches() -> Iterator[pa.RecordBatch]:
            for number, cache in enumerate(caches):
                sizes.append(0)
                with pq.ParquetFile(cache) as file:
                    for batch in file.iter_batches(BLOCK, columns=names):
                        sizes[-1] += len(batch)
                        yield from pa.Table.from_batches([batch]).cast(schema).to_batches()
                if shards and sizes[-1] == 0:
                    sizes[-1] = 1
                    nothing = {"shard": shards[number], "key": "", "reason": NO_SAMPLE}
                    yield from pa.Table.from_pylist([nothing], schema=schema).to_batches()

        schema = pa.schema(READ_COLUMNS)
        table = table_on_disk(folder, batches(), schema)
        reason = table["reason"]
        if missing_caption == "unreadable" or (missing_caption == "auto" and not _of_images_alone(table)):
            reason = pc.coalesce(reason, table["caption_problem"])
            table = table.set_column(names.index("reason"), "reason", reason)
        usable = reason.is_null().to_numpy()
        starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])

        def vectors() -> Iterator[NDArray[np.float16]]:
            for cache, start in zip(caches, starts.tolist(), strict=False):
                with pq.ParquetFile(cache) as file:
                    for batch in file.iter_batches(BLOCK, columns=["embedding"]):
                        stored = batch["embedding"]
                        data = np.frombuffer(stored.buffers()[1] or b"", np.float16).reshape(-1, dim)
                        data = data[stored.offset : stored.offset + len(stored)]
                        yield data[usable[start : start + len(stored)]]
                        start += len(stored)

        readable = on_disk(folder, np.flatnonzero(usable))
        return cls(table, starts, readable, array_on_disk(folder, vectors(), dim))

    @property
    def of_images_alone(self) -> bool:
        """Whether no sample has a caption."""
        return _of_images_alone(self.table)

    @property
    def captions(self) -> Column:
        """Of the readable rows, [n]; the empty text where there is none."""
        return self.of_readable("caption", "")

    def places(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Which input shard each row comes from, and which sample of it it is."""
        shards = np.searchsorted(self.starts, rows, side="right") - 1
        return shards, rows - self.starts[shards]

    def texts(self, name: str) -> Column:
        """A column of all rows, [N], read as it is asked for."""
        return Column.of(self.table[name])

    def of_readable(self, name: str, default: Any = None) -> Column:
        """A column of the readable rows, [n], read as it is asked for."""
        return Column.of(self.table[name], self.readable, default)

    def column(self, name: str) -> NDArray[Any]:
        """A column of numbers of the readable rows, [n], in memory."""
        usable = np.zeros(self.table.num_rows, bool)
        usable[self.readable] = True
        return self.table[name].filter(usable).to_numpy(zero_copy_only=False)


def _of_images_alone(table: pa.Table) -> bool:
    return pc.all(table["captionless"]).as_py() is True  # of none None; nulls are passed over
