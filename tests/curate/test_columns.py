"""Columns on disk are the sequences that they stand for, and equal values get equal numbers."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curate.columns import Column, array_on_disk, arrays_on_disk, numbered, on_disk, some_rows, table_on_disk

VALUES = ["a", None, "", "bär", "a", None, "long " * 50, "z"]
TABLE = pa.table({"text": pa.chunked_array([VALUES[:3], [], VALUES[3:4], VALUES[4:]], pa.string())})


def columns(tmp_path):
    pq.write_table(TABLE, tmp_path / "table.parquet", row_group_size=3)
    mapped = table_on_disk(tmp_path, TABLE.to_batches(), TABLE.schema)
    yield Column.of(TABLE["text"])
    yield Column.of(mapped["text"])
    yield Column.of_parquet(tmp_path / "table.parquet", "text")


def test_a_column_is_a_sequence_wherever_it_lies(tmp_path):
    for column in columns(tmp_path):
        assert list(column) == VALUES and len(column) == 8 and column == VALUES and column != VALUES[:-1]
        assert [column[row] for row in range(-8, 8)] == [VALUES[row] for row in range(-8, 8)]
        assert column[np.int64(3)] == "bär" and column[2:6:2] == VALUES[2:6:2]
        assert column.take([7, 0, 0, 3]) == ["z", "a", "a", "bär"] and column.take([]) == []
        with pytest.raises(IndexError):
            column[8]


def test_some_of_the_rows_with_something_for_nulls():
    column = Column.of(TABLE["text"], np.array([1, 3, 5, 7]), default="")
    assert list(column) == ["", "bär", "", "z"] and column[2] == "" and column.take([3, 0]) == ["z", ""]


def test_numbers_go_by_first_appearance():
    rng = np.random.default_rng(0)
    texts = [f"text {number}" for number in rng.integers(0, 300, 2000)]
    seen: dict[str, int] = {}
    expected = [seen.setdefault(text, len(seen)) for text in texts]
    numbers, first = numbered(texts, len(texts))
    assert numbers.tolist() == expected and first.tolist() == [texts.index(text) for text in seen]
    assert [len(part) for part in numbered([], 0)] == [0, 0]


def test_what_lies_on_disk_has_no_name_there(tmp_path):
    blocks = [np.arange(6, dtype=np.float16).reshape(3, 2), np.ones((1, 2), np.float32), np.empty((0, 2), np.float16)]
    rows = array_on_disk(tmp_path, blocks, 2)
    assert rows.dtype == np.float16 and rows.tolist() == [[0, 1], [2, 3], [4, 5], [1, 1]]
    assert array_on_disk(tmp_path, [], 7).shape == (0, 7)
    numbers, halves = arrays_on_disk(tmp_path, [([1, 2], [0.5, 1]), ([], []), ([3], [1.5])], (np.int64, np.float32))
    assert numbers.dtype == np.int64 and numbers.tolist() == [1, 2, 3] and halves.tolist() == [0.5, 1, 1.5]
    assert [one.dtype for one in arrays_on_disk(tmp_path, [], (np.int64, np.float32))] == [np.int64, np.float32]
    assert isinstance(on_disk(tmp_path, numbers).base, np.memmap) and on_disk(tmp_path, numbers).tolist() == [1, 2, 3]
    table = table_on_disk(tmp_path, TABLE.to_batches(), TABLE.schema)
    assert table.equals(TABLE) and some_rows(table, [6, 1])["text"].to_pylist() == [VALUES[6], None]
    assert list(tmp_path.iterdir()) == []
