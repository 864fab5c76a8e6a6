"""Shards by path, folder, glob, brace range or URL: which there are, what they are called, and their bytes."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import IO

from afresh.errors import UsageError, UserError, printable
from afresh.files import files_in, visible
from afresh.storage import version, why


def expand_shards(patterns: Sequence[str] | str) -> list[str]:
    """Shard paths or URLs that the patterns stand for, each once, in the order of the patterns.

    A pattern is a path, a folder (its ``*.tar``, sorted), a glob, a brace range (``{000000..000099}.tar``)
    or a URL that fsspec opens.

    Raises:
        UsageError: a pattern names nothing, or is a ``pipe:`` URL (no shard list is ever run as a command).
    """
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    if not patterns:
        raise UsageError("no shards given: name tar files, a folder of them, or a glob")
    found = dict.fromkeys(url for pattern in patterns for url in _expand(str(pattern)))
    return list(found)


def shard_names(urls: Sequence[str]) -> list[str]:
    """The name under which each shard stands in a ledger: its file name, with as many parent folders in front
    as tell it apart from the others, so that names do not depend on where the set lies.
    """
    parts = [PurePosixPath(_path_of(url)).parts for url in urls]
    names = [path[-1] for path in parts]
    depth = 1
    while len(set(names)) < len(names):
        repeated = {name for name in names if names.count(name) > 1}
        depth += 1
        if depth > max(len(path) for path in parts):
            return list(urls)
        names = [
            "/".join(path[-depth:]) if name in repeated else name
            for name, path in zip(names, parts, strict=True)
        ]
    return names


def find_shards(names: Iterable[str], urls: Sequence[str], source: str) -> dict[str, int]:
    """Which of the shards at ``urls`` each name of :func:`shard_names` means: the one whose path ends with it.

    Args:
        names: of shards, as a ledger or a list has them; perhaps given when the shards stood among others.
        urls: paths or URLs.
        source: where the names come from, for messages.

    Returns:
        Position in ``urls`` by name; names that mean none of them are left out.

    Raises:
        UsageError: a name means several of them.
    """
    found: dict[str, int] = {}
    by_tail: dict[int, dict[str, list[int]]] = {}  # by the number of path components
    for name in dict.fromkeys(names):
        depth = len(PurePosixPath(name).parts)
        if depth not in by_tail:
            tails = by_tail[depth] = {}
            for number, url in enumerate(urls):
                tails.setdefault("/".join(PurePosixPath(_path_of(url)).parts[-depth:]), []).append(number)
        matches = by_tail[depth].get(name) or [number for number, url in enumerate(urls) if url == name]
        if len(matches) > 1:
            several = ", ".join(urls[number] for number in matches[:3])
            raise UsageError(
                f"{source}: the shard {printable(name)} may be any of {several}: put as much of its path in front of "
                "it there as tells them apart"
            )
        if matches:
            found[name] = matches[0]
    return found


def shard_bytes(url: str) -> int | None:
    """Size of a local shard; None for a URL, whose store would have to be asked."""
    try:
        return os.stat(url).st_size if "://" not in url else None
    except OSError:  # who reads the shard will say what is wrong
        return None


@contextlib.contextmanager
def open_shard(url: str) -> Iterator[IO[bytes]]:
    """The bytes of a shard, a local path or an fsspec URL. Raises ``UserError`` when it cannot be opened."""
    _refuse_pipe(url)
    try:
        if "://" in url:
            import fsspec

            opened = fsspec.open(url, "rb").open()
        else:
            opened = open(url, "rb")  # noqa: SIM115  # closed below, where errors are the reader's own
    except Exception as error:  # fsspec's file systems raise their own kinds
        raise UserError(f"cannot open shard {url}: {why(error, url)}") from error
    with opened as stream:
        yield stream


def _refuse_pipe(url: str) -> None:
    if re.match(r"\s*pipe:", url, re.IGNORECASE):
        raise UsageError(f"shards {url!r}: pipe: URLs are refused, name files or fsspec URLs instead")


def _path_of(url: str) -> str:
    return url.split("://", 1)[-1].split("?", 1)[0] if "://" in url else Path(url).as_posix()


def _expand(pattern: str) -> list[str]:
    _refuse_pipe(pattern)
    local = Path(pattern).expanduser()
    if "://" not in pattern and local.is_file():
        return [str(local)]
    from braceexpand import braceexpand

    try:
        patterns = list(braceexpand(pattern))
    except ValueError as error:  # unbalanced braces
        raise UsageError(f"shards {pattern!r}: {error}") from error
    return [
        url for one in patterns for url in (_expand_url(one) if "://" in one else _expand_path(one, pattern))
    ]


def _expand_path(pattern: str, given: str) -> list[str]:
    path = Path(pattern).expanduser()
    if path.is_dir():
        found = [str(file) for file in files_in(path, "*.tar")]
        if not found:
            shards = path / "shards"
            hint = f" (did you mean {shards}?)" if shards.is_dir() else "; curate import makes shards of images"
            raise UsageError(f"shards {given!r}: the folder holds no *.tar file{hint}")
        return found
    if path.exists():
        return [str(path)]
    found = sorted(file for file in glob.glob(str(path), recursive=True) if Path(file).is_file())
    if not found:
        raise UsageError(f"shards {given!r}: no such file" + ("" if pattern == given else f" ({pattern})"))
    return found


def _expand_url(pattern: str) -> list[str]:
    if not glob.has_magic(pattern):
        return [pattern]
    import fsspec

    try:
        filesystem, path = fsspec.core.url_to_fs(pattern)
        found = visible(map(filesystem.unstrip_protocol, filesystem.glob(path)), path)
    except Exception as error:
        raise UsageError(f"shards {pattern!r}: {why(error, pattern)}") from error
    if not found:
        raise UsageError(f"shards {pattern!r}: no such file")
    return found


def fingerprint(url: str) -> list[str | int]:
    """Changes when a shard does: size, time of change, first and last 64 KiB; or what its store says."""
    if "://" in url:
        import fsspec

        try:
            return [version(*fsspec.core.url_to_fs(url))]
        except Exception as error:
            raise UserError(f"cannot open shard {url}: {why(error, url)}") from error
    with open_shard(url) as file:
        stat = os.fstat(file.fileno())
        digest = hashlib.sha256(file.read(1 << 16))
        file.seek(max(0, stat.st_size - (1 << 16)))
        digest.update(file.read(1 << 16))
    return [stat.st_size, stat.st_mtime_ns, digest.hexdigest()]


def refuse_changed(url: str, as_read: Sequence[str | int]) -> None:
    """Raise ``UserError`` when a shard is no longer what its :func:`fingerprint` said."""
    if fingerprint(url) != list(as_read):
        raise changed(url, "its size, time or ends are others")


def changed(url: str, what: str) -> UserError:
    """What ends a job whose input is another one by now than it has judged."""
    return UserError(f"shard {url} changed while it was curated ({what}): run again when nobody writes to it")
