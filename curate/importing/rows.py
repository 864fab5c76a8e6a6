"""What every source gives: rows that are read one at a time, and reasons why one cannot be."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any, NoReturn, Protocol

from afresh.errors import NOTHING_LEFT, UsageError, UserError, reason
from curate.reading.images import image_format
from curate.reading.tar import MAX_MEMBER_BYTES

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem


_ARCHIVES = ((b"PK\3\4", "zip"), (b"Rar!", "rar"), (b"7z\xbc\xaf\x27\x1c", "7z"), (b"\x1f\x8b", "gzip"))
_HEAD_BYTES = 64  # enough to tell an image from another file, which is then not read on


class RowError(Exception):
    """Why a row cannot be imported. What stands before the first colon says of what kind the reason is."""


@dataclass(frozen=True)
class Content:
    """What a row holds.

    Attributes:
        image: the encoded image, as it is stored.
        caption: the caption's bytes as they are stored, which need not be UTF-8; None when there is none.
        problem: why there is no caption; None when there is one.
        fields: everything else, in JSON's types; text that is not UTF-8 has its bytes as lone surrogates.
    """

    image: bytes = field(repr=False)
    caption: bytes | None
    problem: str | None
    fields: Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """One row of a source, not yet read.

    Attributes:
        source: the path below the folder, or ``table#row``, rows counted from 0.
        key: the sample's key: no other row's, and fit for a member of a tar.
        read: reads the row; raises ``RowError`` when it cannot be imported.
    """

    source: str
    key: str
    read: Callable[[], Content] = field(repr=False)


class Source(Protocol):
    """Rows in a fixed order.

    Attributes:
        total: about how many rows there are; None when nobody knows.
        contents: changes when the source does; in JSON's types.
    """

    total: int | None
    contents: Any

    def rows(self, start: int = 0) -> Iterator[Row]:
        """The rows from number ``start`` on. Raises ``UserError`` when the source stops giving them."""


def failed(source: str, reason: str) -> Row:
    """A row of which it is known beforehand that it cannot be read."""

    def read() -> NoReturn:
        raise RowError(reason)

    return Row(source, "", read)


def filesystem_of(url: str) -> tuple[AbstractFileSystem, str]:
    """The file system of a path or URL, and the path within it. Raises ``UsageError`` when nothing opens it."""
    import fsspec

    if url.lstrip().lower().startswith("pipe:"):
        raise UsageError(f"src {url!r}: pipe: URLs are refused, name files or fsspec URLs instead")
    if "://" not in url:
        return fsspec.filesystem("file"), os.path.abspath(os.path.expanduser(url))
    try:
        return fsspec.core.url_to_fs(url)
    except Exception as error:  # an unknown protocol, or one whose package is missing
        raise UsageError(f"src {url!r}: {reason(error)}") from error


@contextlib.contextmanager
def opened(filesystem: AbstractFileSystem, path: str) -> Iterator[IO[bytes]]:
    """A file of a source, open for reading.

    Raises:
        RowError: this file cannot be opened or read.
        UserError: its store cannot be reached, and the next file would fare no better.
    """
    local = getattr(filesystem, "local_file", False)
    try:
        with open(path, "rb") if local else filesystem.open(path, "rb") as file:
            yield file
    except (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError) as error:
        raise RowError(f"cannot be read: {reason(error)}") from error
    except OSError as error:
        # Arrow says OSError, without a number, of damaged data; file systems have kinds or numbers of their own.
        of_the_file = error.errno not in (*NOTHING_LEFT, errno.EIO)
        if (local and of_the_file) or (type(error) is OSError and error.errno is None):
            raise RowError(f"cannot be read: {reason(error)}") from error
        raise _outage(path, error) from error
    except Exception as error:
        module = type(error).__module__.partition(".")[0]
        if module in ("zipfile", "zlib") or (isinstance(error, RuntimeError) and "zip" in type(filesystem).__module__):
            raise RowError(f"cannot be read: {reason(error)}") from error  # damaged in its archive, or encrypted there
        if module in ("builtins", "pyarrow", "afresh", "curate"):
            raise
        raise _outage(path, error) from error  # botocore, aiohttp and others have kinds that are no OSError


def _outage(path: str, error: Exception) -> UserError:
    why = f"{type(error).__name__}: {reason(error)}"
    return UserError(f"{path} cannot be reached ({why}); run the same command again, it goes on where it was")


def read_image(file: IO[bytes]) -> bytes:
    """All of an image file. Raises ``RowError`` when it is none, or too large for a shard."""
    data = file.read(_HEAD_BYTES)
    if image_format(data) is not None:
        data += file.read(MAX_MEMBER_BYTES + 1 - len(data))
    return checked_image(data)


def checked_image(data: bytes) -> bytes:
    """The same bytes. Raises ``RowError`` when they are no image, or too large for a shard."""
    if not data:
        raise RowError("not an image: it is empty (0 bytes)")
    if image_format(data) is None:
        archive = next((name for magic, name in _ARCHIVES if data.startswith(magic)), None)
        what = "no image format" if archive is None else f"a {archive} archive, which is to be unpacked first"
        raise RowError(f"not an image: its first bytes are those of {what}")
    if len(data) > MAX_MEMBER_BYTES:
        raise RowError(f"too large: the image has more than {MAX_MEMBER_BYTES} bytes")
    return data


def caption_of(value: Any, name: str) -> tuple[bytes | None, str | None]:
    """A stored caption as (bytes, None), or as (None, why there is none); of a list of captions the first."""
    if isinstance(value, list):
        value = next((one for one in value if isinstance(one, (str, bytes))), None)
    if isinstance(value, bytes):
        return value, None
    if isinstance(value, str):
        try:
            return value.encode("utf-8", "surrogateescape"), None
        except UnicodeEncodeError:  # JSON can spell lone surrogates
            return value.encode("utf-8", "replace"), None
    if value is None:
        return None, f"no caption: {name!r} is empty"
    return None, f"no caption: {name!r} holds no text ({type(value).__name__})"


def printable(name: str) -> str:
    """A name that may not be UTF-8, as text that is."""
    return name.encode("utf-8", "backslashreplace").decode()
