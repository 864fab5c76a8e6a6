"""Files written whole or not at all, text as it is meant, and JSON with one spelling."""

from __future__ import annotations

import codecs
import csv
import errno
import hashlib
import json
import math
import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from afresh.errors import UserError, printable, reason

# UTF-32's mark begins with UTF-16's.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_TWO_BYTES = codecs.BOM_UTF16_LE  # alone they are no text
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def write_atomic(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Temporary path beside ``path``, renamed onto it when the block ends well and removed when it does not.

    A reader sees the old file or the new one, never a part, and of several writers the last one's. The folder is made
    if it is missing; the temporary name keeps the suffix, for writers that go by it.

    Raises:
        UserError: the disk is full, or the user's share of it.
    """
    path = Path(path)
    temporary = path.with_name(temporary_name(path.name))
    try:
        with full_disk_named(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
            _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def full_disk_named(path: str | os.PathLike[str]) -> Iterator[None]:
    """Around what writes ``path``: where there is no room for it, that is the error, and says where.

    Raises:
        UserError: the disk is full, or the user's share of it.
    """
    try:
        yield
    except Exception as error:
        if (number := _no_room(error)) is None:
            raise
        why = f"{os.strerror(number)}; make room, and the same command goes on there"
        raise UserError(f"{path} cannot be written: {why}") from error


def _no_room(error: BaseException) -> int | None:
    """The system's number of a write that had no room; compiled writers tell it in their message alone."""
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        return error.errno
    return next((number for number in _NO_ROOM if f"(os error {number})" in str(error)), None)


def decode_text(data: bytes) -> str:
    """The text of a file: UTF-8, or UTF-16 or UTF-32 where a byte order mark says so; the mark is no part of it.

    Raises:
        ValueError: it is none of these; the message says where, and what to do.
    """
    try:
        text = data.decode(encoding_of(data))
    except UnicodeDecodeError as error:
        where = f"byte {error.start} is 0x{data[error.start]:02x}"
        raise ValueError(f"{where}: convert it to UTF-8, as by iconv -f CP1252 -t UTF-8") from error
    if 4 * text.count("\0") > len(text):
        raise ValueError("it is full of NUL bytes, as UTF-16 without its mark would be: convert it to UTF-8")
    return text


def encoding_of(head: bytes) -> str:
    """The encoding of a text by its byte order mark, which is looked for in the first four bytes."""
    return next((name for mark, name in _MARKS if head.startswith(mark) and head != _TWO_BYTES), "utf-8")


def text_lines(text: str) -> list[str]:
    """The lines of a text, without their ends, which are line feeds alone, perhaps behind a carriage return: what else
    ``str.splitlines`` takes for one (U+2028, U+0085, form feeds) stands in captions and in JSON.
    """
    lines = text.split("\n")
    return [line.removesuffix("\r") for line in (lines if lines[-1] else lines[:-1])]


def temporary_name(name: str) -> str:
    """``.tmp-…-NAME``, which nobody else gives: not another thread, nor a machine with the same process numbers."""
    return f".tmp-{secrets.token_hex(8)}-{name}"


def files_in(folder: Path, pattern: str) -> list[Path]:
    """What matches a pattern in a folder, in order, without hidden names: half-written files that a killed job left
    (:func:`temporary_name`) and the ``._NAME`` that a Mac puts beside each file of a copy.

    Args:
        pattern: of names; ``**/`` before it looks into folders too.
    """
    return [Path(name) for name in visible(map(str, folder.glob(pattern)), pattern)]


def visible(names: Iterable[str], pattern: str) -> list[str]:
    """The names or URLs that a pattern found, in order, without hidden ones, as a shell passes them by; all of them
    where the pattern's own name begins with a dot.
    """
    asked_for = PurePosixPath(pattern).name.startswith(".")
    return sorted(name for name in names if asked_for or not PurePosixPath(name).name.startswith("."))


def csv_rows(lines: Iterable[str]) -> Iterator[dict[str, str]]:
    """The rows of comma-separated text with a header, as ``csv.DictReader`` gives them; empty ones are passed over.

    Args:
        lines: with their ends, as a file opened with ``newline=""`` gives them.

    Raises:
        ValueError: a row has not as many values as the header, or a quotation does not end; the message gives its
            number, from 1 behind the header. What an unquoted comma or line end cuts off would be lost otherwise.
    """
    rows = csv.reader(lines, strict=True)
    number, header = 0, None
    while True:
        try:
            row = next(rows, None)
        except csv.Error as error:
            raise ValueError(f"row {number + 1} (line {rows.line_num}) cannot be read: {error}") from error
        if row is None:
            return
        if header is None:
            header = row
            if any("\0" in name for name in header):
                raise ValueError("it is full of NUL bytes, as UTF-16 without its mark would be: convert it to UTF-8")
            if twice := next((name for name in header if name and header.count(name) > 1), None):
                raise ValueError(f"two columns are named {printable(twice)!r}")
        elif row:
            number += 1
            if len(row) < len(header) or any(row[len(header) :]):
                raise ValueError(
                    f"row {number} (line {rows.line_num}) has {len(row)} values where the header has {len(header)} "
                    f"({printable(', '.join(header))}): put text that holds commas or line ends in double quotes"
                )
            yield dict(zip(header, row, strict=False))


def _sync_folder(folder: Path) -> None:
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # some file systems do not open folders
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)


def write_json(path: str | os.PathLike[str], obj: object) -> None:
    """Write ``obj`` as JSON, atomically: sorted keys, two spaces, a newline at the end."""
    text = json.dumps(to_json(obj), indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    with write_atomic(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        UserError: it cannot be read, or is no object.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {reason(error)}") from error
    if not isinstance(fields, dict):
        raise UserError(f"{path} is no JSON object")
    return fields


def to_json(obj: Any) -> Any:
    """``obj`` in JSON's own types: arrays and scalars unwrapped, paths as text, NaN and ±inf as null."""
    if obj is None or isinstance(obj, (bool, str)):
        return obj
    if isinstance(obj, dict):
        return {str(key): to_json(value) for key, value in obj.items()}
    if isinstance(obj, (list, tuple)):
        return [to_json(value) for value in obj]
    if isinstance(obj, (set, frozenset)):
        return sorted(to_json(value) for value in obj)
    if hasattr(obj, "tolist"):  # numpy and torch, scalars among them
        return to_json(obj.tolist())
    if isinstance(obj, int):
        return int(obj)
    if isinstance(obj, float):
        return float(obj) if math.isfinite(obj) else None
    if isinstance(obj, os.PathLike):
        return os.fspath(obj)
    raise TypeError(f"{type(obj).__name__} has no JSON form: {obj!r}")


def digest(parts: object) -> str:
    """What JSON of ``parts`` hashes to: 32 hex characters that are others when a part is."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]

