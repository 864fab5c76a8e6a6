"""The ledger of a curation: one row for every input sample, whatever became of it."""

from __future__ import annotations

import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from afresh.errors import UserError
from afresh.files import write_atomic
from afresh.storage import Store
from curate.columns import table_on_disk

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


KEPT, DROPPED, UNREADABLE = "kept", "dropped", "unreadable"
DROP_REASONS = (  # and "filter:NAME", of what a filter left out
    "exact_image", "near_image", "near_caption", "near_pair", "caption_quota", "other_set", "excluded", "own_rule"
)  # fmt: skip
SCHEMA = pa.schema(
    [
        pa.field("shard", pa.string(), nullable=False),  # as curate.reading.urls.shard_names calls it
        pa.field("key", pa.string(), nullable=False),  # empty for what befell the archive itself
        pa.field("row", pa.int64(), nullable=False),  # number in input order, from 0: this row's own number
        pa.field("status", pa.string(), nullable=False),  # kept | dropped | unreadable
        pa.field("reason", pa.string()),  # null when kept, one of DROP_REASONS, filter:NAME, or the error's text
        pa.field("kept_shard", pa.string()),  # who stands for a dropped sample; of another set, "folder:shard"
        pa.field("kept_key", pa.string()),
        pa.field("image_similarity", pa.float32()),  # to the one that stands for it
        pa.field("caption_similarity", pa.float32()),
        pa.field("group", pa.int64()),  # null when unreadable; a lone sample is a group of its own
        pa.field("group_size", pa.int64()),
        pa.field("sha256", pa.string()),  # of the image's bytes
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("caption", pa.string()),
    ]
)
_FORMAT = {"compression": "zstd", "version": "2.6"}


@contextmanager
def table_writer(schema: pa.Schema, path: str | Path) -> Iterator[pq.ParquetWriter]:
    """A parquet file that takes tables one after the other, written atomically: it appears when the block ends well.

    Equal tables in equal pieces give equal bytes.
    """
    with write_atomic(path) as temporary, pq.ParquetWriter(temporary, schema, **_FORMAT) as writer:
        yield writer


def write_table(table: pa.Table, path: str | Path) -> None:
    """Write a parquet file atomically, with settings that give equal bytes for equal tables."""
    with write_atomic(path) as temporary:
        pq.write_table(table, temporary, row_group_size=1 << 16, **_FORMAT)


def read_ledger(out: str | Path, columns: Sequence[str] | None = None) -> pa.Table:
    """The ledger of a finished curation, in a folder or at a URL, of which only these columns are asked for.

    Its text is as large as the set: it is brought into a file in the system's temporary folder (``TMPDIR``), which is
    memory-mapped and gone with the process.

    Raises:
        UserError: there is none in ``out``, or it is not one; the disk is full.
    """
    place = Store(str(out))
    path = place.at("ledger.parquet")
    try:
        with place.open("ledger.parquet") as opened, pq.ParquetFile(opened) as file:
            names = list(columns) if columns else file.schema_arrow.names
            schema = pa.schema([file.schema_arrow.field(name) for name in names])
            batches = (batch.select(names) for batch in file.iter_batches(columns=names))
            return table_on_disk(Path(tempfile.gettempdir()), batches, schema)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; is {out} a folder that `curate dedup` wrote?") from None
    except pa.ArrowException as error:
        raise UserError(f"{path}: not a ledger: {error}") from error

