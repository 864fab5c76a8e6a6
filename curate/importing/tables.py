"""Tables with a column of images: parquet files, and Hugging Face datasets wherever ``datasets`` finds them."""

from __future__ import annotations

import glob
import os
import posixpath
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as kinds

from afresh.errors import UsageError, UserError, reason
from afresh.files import visible
from afresh.storage import version
from curate.config import ImportConfig
from curate.importing.listing import fingerprint, list_files
from curate.importing.rows import (
    Content,
    Row,
    RowError,
    caption_of,
    checked_image,
    failed,
    filesystem_of,
    opened,
    read_image,
)
from curate.importing.values import json_values, without_bytes
from curate.reading.images import ImageError, array_to_png
from curate.reading.urls import shard_names

TEXT_COLUMNS = ("text", "caption", "prompt")
IMAGE_COLUMNS = ("image", "img", "image_path", "file_name", "path")
BATCH_ROWS = 32  # rows held at a time


@dataclass(frozen=True)
class Columns:
    """Which column holds what: the images, the captions (None when nothing does), and what travels along."""

    image: str
    text: str | None
    carried: tuple[str, ...]


@dataclass(frozen=True)
class _File:
    url: str
    name: str
    rows: int
    columns: Columns | None
    problem: str | None = None


class ParquetFiles:
    """Parquet files, one after the other, read a few rows at a time.

    An image is bytes, a struct ``{bytes, path}``, or a path below the file's own folder. Every row of a row group that
    cannot be decoded is a row with that reason, and an unreadable file is one row.

    Args:
        urls: local paths or fsspec URLs.
        config: ``image_column``, ``text_column`` and ``image_root`` apply.

    Raises:
        UsageError: a file's columns do not tell which is the image and which the caption.
        UserError: none of the files can be read.
    """

    def __init__(self, urls: Sequence[str], config: ImportConfig) -> None:
        self.config = config
        self.files = [self._described(url, name) for url, name in zip(urls, shard_names(urls), strict=True)]
        if all(file.columns is None for file in self.files):
            raise UserError(f"{self.files[0].url}: {self.files[0].problem}")
        self.total: int | None = sum(file.rows for file in self.files)
        self.contents = [[file.name, file.rows, _stamp(file.url)] for file in self.files]

    def rows(self, start: int = 0) -> Iterator[Row]:
        """The rows from number ``start`` on; row groups before it are not read."""
        first = 0
        for file in self.files:
            if first + file.rows > start:
                if file.columns is None:
                    yield failed(file.name, str(file.problem))
                else:
                    yield from self._rows_of(file, file.columns, first, max(0, start - first))
            first += file.rows

    def _described(self, url: str, name: str) -> _File:
        try:
            with opened(*filesystem_of(url)) as file:
                table = pq.ParquetFile(file)
                schema, rows = table.schema_arrow, table.metadata.num_rows
        except RowError as error:
            return _File(url, name, 1, None, str(error))
        except pa.ArrowException as error:
            return _File(url, name, 1, None, f"cannot be read: {reason(error)}")
        return _File(url, name, rows, choose_columns(schema, self.config, url))

    def _rows_of(self, file: _File, columns: Columns, first: int, start: int) -> Iterator[Row]:
        """Rows of one file from its row ``start`` on; ``first`` is the number of its row 0 among all files'."""
        root = self.config.image_root or posixpath.dirname(file.url) or "."
        wanted = [name for name in (columns.image, columns.text, *columns.carried) if name is not None]
        row, why = start, "cannot be read: the file ends before this row"
        try:
            with opened(*filesystem_of(file.url)) as stream:
                table = pq.ParquetFile(stream, pre_buffer=False, buffer_size=1 << 20)
                end = 0
                for group in range(table.num_row_groups):
                    begin, end = end, end + table.metadata.row_group(group).num_rows
                    if end <= row:
                        continue
                    try:
                        for batch in table.iter_batches(BATCH_ROWS, row_groups=[group], columns=wanted):
                            begin += batch.num_rows
                            ahead = batch.slice(batch.num_rows - max(0, begin - row))
                            for read in _readers(ahead, columns, lambda path: _read_below(root, path)):
                                yield Row(f"{file.name}#{row}", f"{first + row:09d}", read)
                                row += 1
                    except (pa.ArrowException, OSError) as error:
                        if isinstance(error, OSError) and (type(error) is not OSError or error.errno is not None):
                            raise  # not said by Arrow of damaged data, but by the file's store
                        for lost in range(row, end):
                            yield failed(f"{file.name}#{lost}", f"cannot be read: {reason(error)}")
                        row = end
        except RowError as error:
            why = str(error)
        for lost in range(row, file.rows):
            yield failed(f"{file.name}#{lost}", why)


def expand_parquet(pattern: str) -> list[str]:
    """Paths or URLs that a path, a folder, a glob, a brace range or a URL stands for, sorted.

    Raises:
        UsageError: there is no such file.
    """
    from braceexpand import braceexpand

    pattern = pattern if "://" in pattern else os.path.expanduser(pattern)
    try:
        patterns = [pattern] if os.path.exists(pattern) else list(braceexpand(pattern))
        found = [url for one in patterns for url in _matches(one)]
    except ValueError as error:  # unbalanced braces
        raise UsageError(f"src {pattern!r}: {error}") from error
    except OSError as error:
        raise UsageError(f"src {pattern!r}: {reason(error)}") from error
    if not found:
        raise UsageError(f"src {pattern!r}: no such parquet file")
    return list(dict.fromkeys(found))


def _matches(pattern: str) -> list[str]:
    filesystem, path = filesystem_of(pattern)
    if filesystem.isfile(path):
        return [pattern]
    if filesystem.isdir(path):
        path = f"{path.rstrip('/')}/**/*.parquet"
    elif not glob.has_magic(path):
        return []
    found = visible(map(str, filesystem.glob(path)), path)
    return [filesystem.unstrip_protocol(file) for file in found] if "://" in pattern else found


def _stamp(url: str) -> str:
    """Changes when a file does."""
    try:
        if "://" not in url:
            stat = os.stat(url)
            return f"{stat.st_size} {stat.st_mtime_ns}"
        return version(*filesystem_of(url))
    except Exception:  # then there is a row which says that the file cannot be read
        return ""


class HuggingFaceDataset:
    """A dataset that ``save_to_disk`` wrote, a folder that ``load_dataset`` reads, or a name on the hub.

    Folders are streamed, so that no copy of them is made in a cache. A dataset that fails while it is read ends the
    import at that row, since ``datasets`` does not go on behind it. Of a stream from the hub it is not noticed when it
    has changed since a stopped import.

    Args:
        src: a local path, a URL of what ``save_to_disk`` wrote, or a hub name.
        config: ``image_column``, ``text_column``, ``split``, ``subset``, ``streaming`` and ``image_root`` apply.

    Raises:
        UsageError: there are several splits and none is named, or the columns do not tell which is the image and
            which the caption.
        UserError: there is no such dataset here or on the hub, or it cannot be read.
    """

    def __init__(self, src: str, config: ImportConfig) -> None:
        self.src, self.config = src, config
        path = Path(src).expanduser()
        is_local = "://" not in src and path.is_dir()
        split, self.data = _one_split(self._load(path if is_local else None), config.split, src)
        self.name = split or posixpath.basename(str(path.resolve()) if is_local else src.rstrip("/"))
        self.total: int | None = len(self.data) if hasattr(self.data, "__len__") else None
        self.root = config.image_root or (str(path) if is_local else None)
        if is_local:
            self.contents: Any = fingerprint(sorted(list_files(str(path))))
        else:
            self.contents = getattr(self.data, "_fingerprint", None) if self.total is not None else None
        self.columns = choose_columns(self._schema(), config, src)

    def rows(self, start: int = 0) -> Iterator[Row]:
        """The rows from number ``start`` on. Of a stream, those before are read and passed over."""
        row = start
        data = self.data.skip(start) if start else self.data
        tables = data.with_format("arrow").iter(batch_size=BATCH_ROWS)
        while (table := self._next(tables, row)) is not None:
            for batch in table.to_batches():
                for read in _readers(batch, self.columns, self._read_path):
                    yield Row(f"{self.name}#{row}", f"{row:09d}", read)
                    row += 1

    def _load(self, local: Path | None) -> Any:
        import datasets

        src, subset = self.src, self.config.subset
        try:
            if "://" in src:
                return datasets.load_from_disk(src)
            if local is not None and ((local / "state.json").is_file() or (local / "dataset_dict.json").is_file()):
                return datasets.load_from_disk(str(local))
            if local is not None:
                return datasets.load_dataset(str(local), subset, streaming=True)
            return datasets.load_dataset(src, subset, split=self.config.split, streaming=self.config.streaming)
        except Exception as error:  # builders raise whatever their files lead them to
            where = src if local is not None else f"{src}: no such folder here, and no dataset of this name to be had"
            raise UserError(f"src: {where}: {reason(error)}") from error

    def _schema(self) -> pa.Schema:
        if self.data.features is not None:
            return self.data.features.arrow_schema
        first = self._next(self.data.with_format("arrow").iter(batch_size=1), 0)
        if first is None:
            raise UserError(f"src: {self.src} has no rows")
        return first.schema

    def _next(self, tables: Iterator[pa.Table], row: int) -> pa.Table | None:
        try:
            return next(tables, None)
        except Exception as error:
            raise UserError(
                f"src: {self.src} cannot be read from row {row} on ({reason(error)}); what was imported stays, and "
                f"the same command goes on there; --kind parquet passes over what is damaged in parquet files"
            ) from error

    def _read_path(self, path: str) -> bytes:
        """An image that the dataset names instead of holding it: ``datasets`` would read it, too."""
        if "://" not in path and self.root is not None:
            path = os.path.join(self.root, path)
        try:
            filesystem, path = filesystem_of(path)
        except UsageError as error:
            raise RowError(f"cannot be read: {error}") from error
        with opened(filesystem, path) as file:
            return read_image(file)


def _one_split(loaded: Any, wanted: str | None, src: str) -> tuple[str | None, Any]:
    """The split that is meant, and its name, where it has one."""
    if not isinstance(loaded, dict):
        split = getattr(loaded, "split", None)
        if wanted is not None and split is not None and str(split) != wanted:
            raise UsageError(f"split: {src} is the split {split!s}, and has no {wanted!r}")
        return None if split is None else str(split), loaded
    if wanted is None and len(loaded) == 1:
        wanted = next(iter(loaded))
    if wanted not in loaded:
        raise UsageError(f"split: {src} has {', '.join(loaded)}; name one of them (--split), got {wanted}")
    return wanted, loaded[wanted]


def choose_columns(schema: pa.Schema, config: ImportConfig, where: str) -> Columns:
    """Which columns hold images and captions, by ``config`` or by their types and names.

    Raises:
        UsageError: a column that is named is not there, or none is named and not exactly one offers itself.
    """
    names = schema.names
    image = config.image_column
    if image is None:
        structs = [f.name for f in schema if kinds.is_struct(f.type) and f.type.get_field_index("bytes") >= 0]
        binaries = [f.name for f in schema if _is_binary(f.type)]
        offered = structs or binaries or [name for name in IMAGE_COLUMNS if name in names]
        if len(offered) != 1:
            which = f"any of {', '.join(offered)} may be the images" if offered else "no column looks like images"
            raise UsageError(f"{where}: {which}; name one with --image_column (columns: {', '.join(names)})")
        image = offered[0]
    elif image not in names:
        raise UsageError(f"{where}: no column {image!r} (--image_column); its columns: {', '.join(names)}")
    text = choose_text([name for name in names if name != image], config.text_column, where)
    return Columns(image, text, tuple(without_bytes(field for field in schema if field.name not in (image, text))))


def choose_text(columns: Sequence[str], wanted: str | None, where: str) -> str | None:
    """The column with the captions: ``wanted``, or the only one of TEXT_COLUMNS; None if ``wanted`` is empty.

    Raises:
        UsageError: it is not there, or none is named and not exactly one offers itself.
    """
    if wanted == "":
        return None
    listed = f"columns: {', '.join(columns)}"
    if wanted is not None:
        if wanted not in columns:
            raise UsageError(f"{where}: no column {wanted!r} (--text_column; {listed})")
        return wanted
    offered = [name for name in TEXT_COLUMNS if name in columns]
    if len(offered) != 1:
        which = f"any of {', '.join(offered)}" if offered else f"none of {', '.join(TEXT_COLUMNS)}"
        raise UsageError(
            f"{where}: {which} may be the captions; name the column with --text_column, or --text_column= for none "
            f"({listed})"
        )
    return offered[0]


def _readers(
    batch: pa.RecordBatch, columns: Columns, read_path: Callable[[str], bytes]
) -> Iterator[Callable[[], Content]]:
    """For each row of a batch, what reads it; ``read_path`` reads an image that is named and not held."""
    images = batch.column(columns.image)
    texts: list[Any] = [None] * batch.num_rows
    if columns.text is not None:
        column = batch.column(columns.text)
        values = column.to_pylist() if _is_binary(column.type) else json_values(column)
        texts = [{}] * batch.num_rows if values is None else values  # a struct: reported as no text
    carried = {name: json_values(batch.column(name)) for name in columns.carried}

    def reader(row: int) -> Callable[[], Content]:
        def read() -> Content:
            image = checked_image(_image_bytes(images[row], read_path))
            fields = {name: values[row] for name, values in carried.items() if values is not None}
            if columns.text is None:
                return Content(image, None, "no caption: no column holds captions", fields)
            if isinstance(texts[row], list):
                fields[columns.text] = texts[row]
            return Content(image, *caption_of(texts[row], columns.text), fields)

        return read

    return map(reader, range(batch.num_rows))


def _image_bytes(scalar: pa.Scalar, read_path: Callable[[str], bytes]) -> bytes:
    """Encoded image of a cell: bytes, a struct with bytes or a path, a path, or an array (encoded as PNG)."""
    try:
        value = scalar.as_py()
    except (UnicodeDecodeError, pa.ArrowException) as error:
        raise RowError(f"cannot be read: {reason(error)}") from error
    if isinstance(value, dict):
        value = value.get("bytes") if value.get("bytes") is not None else value.get("path")
    if value is None:
        raise RowError("no image: the row has neither bytes nor a path")
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return read_path(value)
    try:
        return array_to_png(value)
    except ImageError as error:
        raise RowError(f"not an image: {error}") from error


def _read_below(root: str, path: str) -> bytes:
    """An image that a table names. Others write tables: a path that leads out of ``root`` is refused."""
    if "://" in path:
        raise RowError("path refused: it is a URL, and nothing is fetched because a table says so")
    scheme, slashes, base = root.rpartition("://")
    base = posixpath.normpath(base) if slashes else os.path.abspath(os.path.expanduser(base))
    if "\\" in path and not os.path.exists(os.path.join(base, path)):  # as Windows writes paths
        path = path.replace("\\", "/")
    full = posixpath.normpath(posixpath.join(base, path))
    if full != base and not full.startswith(base.rstrip("/") + "/"):
        raise RowError(f"path refused: {path!r} leads out of {root} (--image_root names the folder of the images)")
    try:
        with opened(*filesystem_of(f"{scheme}{slashes}{full}")) as file:
            return read_image(file)
    except RowError as error:
        raise RowError(f"{error} ({path})") from error


def _is_binary(kind: pa.DataType) -> bool:
    return kinds.is_binary(kind) or kinds.is_large_binary(kind) or kinds.is_binary_view(kind)
