"""What the read stage found, in memory: one row of text a sample, and the embeddings of those that can be read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

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
        table: READ_COLUMNS of all N rows; ``reason`` says of each row why it is unreadable, or is null.
        shard_number: int32 [N], which input shard.
        ordinal: int64 [N], which sample of it.
        readable: int64 [n], the rows that can be curated.
        embeddings: float16 [n, dim] of the readable rows.
        captions: of the readable rows.
    """

    table: pa.Table
    shard_number: NDArray[np.int32]
    ordinal: NDArray[np.int64]
    readable: NDArray[np.int64]
    embeddings: NDArray[np.float16]
    captions: list[str]

    @classmethod
    def load(cls, caches: Sequence[Path], dim: int, missing_caption: str, shards: Sequence[str] = ()) -> Rows:
        """What the caches hold.

        Args:
            caches: of the read stage, in input order.
            dim: of the embeddings.
            missing_caption: as in the settings; ``auto`` is ``unreadable`` where some sample has a caption.
            shards: names; with them a shard that holds nothing has a row that says so.
        """
        names = [name for name, _ in READ_COLUMNS]
        tables = [pq.read_table(cache, columns=names) for cache in caches]
        for number, shard in enumerate(shards):
            if tables[number].num_rows == 0:
                nothing = {"shard": shard, "key": "", "reason": NO_SAMPLE}
                tables[number] = pa.Table.from_pylist([nothing], schema=pa.schema(READ_COLUMNS))
        sizes = [table.num_rows for table in tables]
        table = pa.concat_tables(tables)
        reason = table["reason"]
        if missing_caption == "unreadable" or (missing_caption == "auto" and not _of_images_alone(table)):
            reason = pc.coalesce(reason, table["caption_problem"])
            table = table.set_column(names.index("reason"), "reason", reason)
        usable = reason.is_null().to_numpy(zero_copy_only=False)
        embeddings = np.empty((int(usable.sum()), dim), dtype=np.float16)
        start = row = 0
        for cache, size in zip(caches, sizes, strict=True):
            stored = pq.read_table(cache, columns=["embedding"])["embedding"].combine_chunks()
            data = np.frombuffer(stored.buffers()[1] or b"", dtype=np.float16)[: len(stored) * dim].reshape(-1, dim)
            of_shard = data[usable[start : start + len(stored)]]
            embeddings[row : row + len(of_shard)] = of_shard
            start, row = start + size, row + len(of_shard)
        readable = np.flatnonzero(usable)
        return cls(
            table=table,
            shard_number=np.repeat(np.arange(len(sizes), dtype=np.int32), sizes),
            ordinal=np.concatenate([np.arange(size, dtype=np.int64) for size in sizes]),
            readable=readable,
            embeddings=embeddings,
            captions=[caption or "" for caption in table["caption"].filter(usable).to_pylist()],
        )

    @property
    def of_images_alone(self) -> bool:
        """Whether no sample has a caption."""
        return _of_images_alone(self.table)

    def column(self, name: str) -> NDArray[Any]:
        """A column of the readable rows, [n]."""
        usable = np.zeros(self.table.num_rows, bool)
        usable[self.readable] = True
        # Not by `take`, which puts the pieces of a column together and fails where they are text of more than 2 GiB.
        return self.table[name].filter(usable).to_numpy(zero_copy_only=False)


def _of_images_alone(table: pa.Table) -> bool:
    return pc.all(table["captionless"]).as_py() is True  # of none None; nulls are passed over
