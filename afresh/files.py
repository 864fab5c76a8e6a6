"""Files written whole or not at all, and JSON with one spelling."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from afresh.errors import UserError, reason

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def write_atomic(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Temporary path beside ``path``, renamed onto it when the block ends well and removed when it does not.

    A reader sees the old file or the new one, never a part. The folder is made if it is missing; the
    temporary name keeps the suffix, for writers that go by it.

    Raises:
        UserError: the disk is full, or the user's share of it.
    """
    path = Path(path)
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
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

