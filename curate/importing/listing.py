"""What a folder holds: every file below it, local or at a URL."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from afresh.errors import UsageError, reason
from curate.importing.rows import filesystem_of
from curate.reading.members import is_left_behind

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem


class Entry(NamedTuple):
    """A file below a folder: its path there, what changes when it does, and why it cannot be read."""

    name: str
    stamp: str
    problem: str | None = None


def open_folder(url: str) -> tuple[AbstractFileSystem, str]:
    """The file system of a folder, and its path there. Raises ``UsageError`` when it is none."""
    filesystem, root = filesystem_of(url)
    try:
        is_folder = filesystem.isdir(root)
    except Exception as error:
        raise UsageError(f"src: cannot open {url}: {reason(error)}") from error
    if not is_folder:
        raise UsageError(f"src: {url} is not a folder")
    return filesystem, root


def list_files(url: str) -> Iterator[Entry]:
    """Every file below a folder or URL, in no order, hidden ones left out. Raises ``UsageError`` if there is none."""
    if "://" not in url:
        yield from _local_files(open_folder(url)[1])
        return
    filesystem, root = open_folder(url)
    try:
        found = filesystem.find(root, detail=True)
    except Exception as error:  # fsspec's file systems raise their own kinds
        raise UsageError(f"src: cannot list {url}: {reason(error)}") from error
    for path, info in found.items():
        name = path[len(root.rstrip("/")) :].lstrip("/")
        if name and not any(map(_is_hidden, name.split("/"))):
            known = (info.get(key) for key in ("size", "CRC", "ETag", "etag", "mtime", "LastModified", "updated"))
            yield Entry(name, " ".join(str(value) for value in known if value is not None))


def fingerprint(entries: Sequence[Entry]) -> dict[str, Any]:
    """What changes when one of the files does; the entries sorted."""
    digest = hashlib.sha256()
    for entry in entries:
        digest.update(repr(tuple(entry)).encode("utf-8", "backslashreplace"))
    return {"files": len(entries), "listing": digest.hexdigest()}


def _local_files(root: str) -> Iterator[Entry]:
    """Links are followed, but not back into a folder from which they were reached."""
    pending: list[tuple[str, tuple[str, ...]]] = [("", (os.path.realpath(root),))]
    while pending:
        folder, entered = pending.pop()
        try:
            with os.scandir(os.path.join(root, folder)) as listed:
                entries = [entry for entry in listed if not _is_hidden(entry.name)]
        except OSError as error:
            yield Entry(folder or ".", "", f"cannot be read: {reason(error)}")
            continue
        for entry in entries:
            name = f"{folder}/{entry.name}" if folder else entry.name
            try:
                if entry.is_dir():
                    if not entry.is_symlink():
                        pending.append((name, entered))
                        continue
                    real, here = os.path.realpath(entry.path), os.path.realpath(os.path.join(root, folder))
                    if real in entered or f"{here}/".startswith(f"{real}/"):
                        yield Entry(name, "", "cannot be read: the link leads back to a folder above it")
                    else:
                        pending.append((name, (*entered, real)))
                elif entry.is_file():
                    stat = entry.stat()
                    yield Entry(name, f"{stat.st_size} {stat.st_mtime_ns}")
                else:
                    problem = "the link leads nowhere" if entry.is_symlink() else "it is not a file"
                    yield Entry(name, "", f"cannot be read: {problem}")
            except OSError as error:
                yield Entry(name, "", f"cannot be read: {reason(error)}")


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX" or is_left_behind(name)

