"""A folder of images, with captions in files beside them or in Hugging Face's metadata files."""

from __future__ import annotations

import bisect
import hashlib
import io
import json
import posixpath
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from afresh.errors import UsageError, UserError, reason
from afresh.files import csv_rows, encoding_of
from afresh.progress import get_logger
from curate.config import ImportConfig
from curate.importing.layouts import METADATA_FILES, folder_repeats, of_split
from curate.importing.listing import Entry, fingerprint, list_files, open_folder
from curate.importing.rows import Content, Row, RowError, caption_of, failed, opened, printable, read_image
from curate.importing.sidecars import read_beside
from curate.importing.tables import BATCH_ROWS, choose_text
from curate.importing.values import json_values, without_bytes
from curate.reading.captions import TEXT_EXTENSIONS

log = get_logger(__name__)
MAX_KEY_BYTES = 100
_TEXTS = tuple(f".{extension}" for extension in TEXT_EXTENSIONS)  # of files with a caption, the first goes before
_TXT, _JSON, _IMAGE = 1, 2, 4  # what stands under one path without suffix; images are counted above the two bits


class Folder:
    """A folder, local or at a URL, read recursively; hidden files are passed over.

    First come the rows of metadata files in their order, as Hugging Face's imagefolder has them; then the images that
    no such row names, sorted by path, with the ``.txt`` and ``.json`` beside them; then captions without an image and
    what could not be listed. An image is told by its bytes: every file that is no caption is looked at, and has a row.
    Names are held in memory, contents are not.

    Args:
        url: a local path or an fsspec URL.
        config: ``caption_field`` and ``text_column`` say where captions are; ``split`` names one of several.
        metadata: whether metadata files are read, and folders' names for what they say; else they are passed over.

    Raises:
        UsageError: it is no folder, holds nothing or several splits of which none is named, or a metadata file's
            columns do not tell which is the caption.
        UserError: a metadata file cannot be read.
    """

    def __init__(self, url: str, config: ImportConfig, *, metadata: bool = True) -> None:
        self.url, self.caption_field, self.text_column = url, config.caption_field, config.text_column
        self.by_line = config.caption_lines
        self.filesystem, self.root = open_folder(url)
        self.images: list[str] = []
        self.metadata: dict[str, str | None] = {}  # file → its caption column
        self.problems: list[Entry] = []
        self._stems: dict[str, int] = {}
        self._spelled: dict[str, str] = {}  # what stands for a .txt or .json of another suffix, or in upper case
        entries: Sequence[Entry] = sorted(list_files(url))
        if not entries:
            raise UsageError(f"src: {url} holds no files")
        if metadata:
            entries = of_split(entries, config.split, url)
        for entry in entries:
            self._sort_in(entry)
        self.contents = fingerprint(entries)
        self.orphans = [
            sidecar
            for stem in sorted(stem for stem, found in self._stems.items() if found < _IMAGE)
            for sidecar in (self._sidecar(stem, ".json"), self._sidecar(stem, ".txt"))
            if sidecar is not None
        ]
        self.repeats: dict[str, tuple[int, str]] = {}
        if not metadata:
            self.metadata.clear()
        elif repeats := folder_repeats(self.images):
            self.repeats = repeats
            log.info(
                "%s: folders say how often their images are to be seen: the json of a sample has it as repeats, which "
                "train finetune takes as a weight (--weight_field repeats)", url,
            )  # fmt: skip
        for name in self.metadata:
            self.metadata[name] = self._caption_column(name)
        self.total: int | None = len(self.images) + len(self.orphans) + len(self.problems)

    def rows(self, start: int = 0) -> Iterator[Row]:
        """The rows from number ``start`` on; of those before, nothing but the metadata's is read."""
        for number, row in enumerate(self._rows()):
            if number >= start:
                yield row

    def _rows(self) -> Iterator[Row]:
        named: set[str] = set()
        for metadata, column in self.metadata.items():
            for number, record in enumerate(self._records(metadata)):
                place = f"{metadata}#{number}"
                try:
                    if isinstance(record, RowError):
                        raise record
                    name = self._named_image(metadata, record)
                except RowError as error:
                    yield failed(printable(place), str(error))
                    continue
                # An image may have several rows, with a caption each: each is a sample.
                key = hashed_key(name, f"{name}#{place}") if name in named else self._key(name)
                named.add(name)
                yield Row(printable(name), key, self._reader(name, record, column))
        for name in self.images:
            if name not in named:
                yield Row(printable(name), self._key(name), self._reader(name, {}, None))
        for name in self.orphans:
            yield failed(printable(name), "no image: no other file has this name before its suffix")
        for entry in self.problems:
            yield failed(printable(entry.name), str(entry.problem))

    def _sort_in(self, entry: Entry) -> None:
        name = entry.name
        stem, suffix = posixpath.splitext(name)
        if entry.problem is not None:
            self.problems.append(entry)
        elif posixpath.basename(name) in METADATA_FILES:
            self.metadata[name] = None
        elif suffix.lower() in (*_TEXTS, ".json"):
            kind = ".json" if suffix.lower() == ".json" else ".txt"
            bit = _JSON if kind == ".json" else _TXT
            before = self._sidecar(stem, kind) if self._stems.get(stem, 0) & bit else None
            self._stems[stem] = self._stems.get(stem, 0) | bit
            if before is None or _rank(name) < _rank(before):
                self._spelled.pop(stem + kind, None)
                if name != stem + kind:
                    self._spelled[stem + kind] = name
        else:
            self.images.append(name)
            self._stems[stem] = self._stems.get(stem, 0) + _IMAGE

    def beside(self, name: str) -> tuple[str | None, str | None]:
        """The ``.txt`` and the ``.json`` beside an image, as far as there are any."""
        stem = posixpath.splitext(name)[0]
        return self._sidecar(stem, ".txt"), self._sidecar(stem, ".json")

    def _sidecar(self, stem: str, suffix: str) -> str | None:
        if not self._stems[stem] & (_TXT if suffix == ".txt" else _JSON):
            return None
        return self._spelled.get(stem + suffix, stem + suffix)

    def _key(self, name: str) -> str:
        alone = self._stems[posixpath.splitext(name)[0]] < 2 * _IMAGE
        return path_key(name) if alone else hashed_key(name, name)

    # ------------------------------------------------------------------------------- an image and its captions

    def _reader(self, name: str, record: Mapping[str, Any], column: str | None) -> Callable[[], Content]:
        def read() -> Content:
            with opened(self.filesystem, posixpath.join(self.root, name)) as file:
                image = read_image(file)
            text, table = self.beside(name)
            place = self.filesystem, self.root
            caption, problem, fields = read_beside(*place, text, table, self.caption_field, self.by_line)
            if column is not None:
                in_row, why_none = caption_of(record.get(column), column)
                if in_row is not None:
                    caption, problem = in_row, None
                elif caption is None:
                    problem = why_none
            fields |= {key: value for key, value in record.items() if key != "file_name"}
            if (repeated := self.repeats.get(posixpath.dirname(name))) is not None:
                fields.setdefault("repeats", repeated[0])
                if caption is None:  # as these trainers do
                    caption, problem = repeated[1].encode("utf-8", "surrogateescape"), None
            if column is not None and isinstance(fields.get(column), str):
                del fields[column]
            return Content(image, caption, problem, fields)

        return read

    # ------------------------------------------------------------------------------------------- metadata files

    def _caption_column(self, metadata: str) -> str | None:
        """The column with the captions; None when there is none, or no row at all."""
        where = posixpath.join(self.url, metadata)
        try:
            if metadata.endswith(".parquet"):
                with opened(self.filesystem, posixpath.join(self.root, metadata)) as file:
                    columns = without_bytes(pq.ParquetFile(file).schema_arrow)
            else:
                records = (row for row in self._records(metadata) if isinstance(row, dict))
                first = next(records, None)
                if first is None:
                    return None
                columns = list(first)
                if metadata.endswith(".csv"):  # all of it: a row that lost the end of its caption shows in its shape
                    for _ in records:
                        pass
        except (RowError, pa.ArrowException) as error:
            raise UserError(f"{where}: {reason(error)}") from error
        if "file_name" not in columns:
            raise UsageError(
                f"{where}: no column 'file_name' to say which image a row is of (its columns: {', '.join(columns)})"
            )
        return choose_text(columns, self.text_column, where)

    def _named_image(self, metadata: str, record: Mapping[str, Any]) -> str:
        """Path of the image that a row names; only what was listed counts, so no row leads out of the folder."""
        name = record.get("file_name")
        if not isinstance(name, str) or not name:
            raise RowError("no image: the metadata row has no file_name")
        for spelled in (name, name.replace("\\", "/")):  # as Windows writes paths
            path = posixpath.normpath(posixpath.join(posixpath.dirname(metadata), spelled))
            place = bisect.bisect_left(self.images, path)
            if place < len(self.images) and self.images[place] == path:
                return path
        raise RowError(f"no image: the metadata row names {printable(name)!r}, which is not in the folder")

    def _records(self, metadata: str) -> Iterator[dict[str, Any] | RowError]:
        """The rows of a metadata file in order; in the place of a row that cannot be read, the reason."""
        path = posixpath.join(self.root, metadata)
        read = _parquet_records if metadata.endswith(".parquet") else _text_records
        try:
            with opened(self.filesystem, path) as file:
                yield from read(file, metadata)
        except RowError as error:
            yield error
        except (pa.ArrowException, UnicodeError) as error:
            yield RowError(f"cannot be read: {reason(error)}")
        except ValueError as error:  # of a table's shape
            raise UserError(f"{posixpath.join(self.url, metadata)}: {error}") from error


def _rank(name: str) -> tuple[int, str]:
    """Of several files beside an image that may hold its caption, the one with the lowest is taken."""
    suffix = posixpath.splitext(name)[1]
    places = [place for place, text in enumerate(_TEXTS) if suffix.lower() == text]
    return (places[0] if places else 0), "" if suffix == suffix.lower() else suffix


def _parquet_records(file: Any, _: str) -> Iterator[dict[str, Any] | RowError]:
    for batch in pq.ParquetFile(file, pre_buffer=False).iter_batches(BATCH_ROWS):
        columns = {name: json_values(batch.column(place)) for place, name in enumerate(batch.schema.names)}
        for row in range(batch.num_rows):
            yield {name: values[row] for name, values in columns.items() if values is not None}


def _text_records(file: Any, name: str) -> Iterator[dict[str, Any] | RowError]:
    # Bytes that are not UTF-8 are kept as lone surrogates: one caption's fault, which leaves the others readable.
    encoding = encoding_of(file.read(4))
    file.seek(0)
    table = name.endswith(".csv")
    text = io.TextIOWrapper(file, encoding, errors="surrogateescape", newline="" if table else "\n")
    if table:
        yield from csv_rows(text)
        return
    for line in text:
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            yield record if isinstance(record, dict) else RowError("cannot be read: the line is not a JSON object")
        except (ValueError, RecursionError) as error:
            yield RowError(f"cannot be read: the line is not JSON: {reason(error)}")


def path_key(name: str) -> str:
    """The key of an image by its path: ``cats/tabby 1.jpg`` → ``cats__tabby_1-`` and 16 hexadecimal digits.

    A path of letters, digits, ``-`` and single ``_`` stays readable as it is, with ``__`` for ``/``, since it can be
    told from every other such path. Any other is cut to length and told apart by a hash. At most MAX_KEY_BYTES bytes.
    """
    parts = posixpath.splitext(name)[0].split("/")
    key = "__".join(map(_slug, parts))
    if key.split("__") == parts and len(key.encode()) <= MAX_KEY_BYTES and not re.search(r"-[0-9a-f]{16}$", key):
        return key
    return hashed_key(name, name)


def hashed_key(name: str, identity: str) -> str:
    """A key that begins like the path ``name`` and is told apart by a hash of ``identity``."""
    begin = "__".join(map(_slug, posixpath.splitext(name)[0].split("/")))
    begin = begin.encode()[: MAX_KEY_BYTES - 17].decode("utf-8", "ignore")
    return f"{begin}-{hashlib.sha256(identity.encode('utf-8', 'surrogateescape')).hexdigest()[:16]}"


def _slug(part: str) -> str:
    normal = unicodedata.normalize("NFC", part)
    return "".join(char if char.isalnum() or char in "-_" else "_" for char in normal)

