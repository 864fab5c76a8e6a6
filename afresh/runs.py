"""One run at a time in a folder, begun and continued with the same settings."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from inspect import signature
from pathlib import Path
from typing import Any

from afresh.errors import UsageError, UserError, one_line, reason
from afresh.files import write_json


@contextmanager
def locked(folder: str | os.PathLike[str], lock: str | os.PathLike[str]) -> Iterator[None]:
    """One run at a time in ``folder``, by a lock on the file ``lock``, which the system lifts when its holder dies.

    The lock file stays: who removed it would lock out nobody who opened it before.

    Raises:
        UserError: another run holds the lock; or the file system has none.
    """
    held = try_lock(lock)
    if held is None:
        raise UserError(f"{folder}: another run is writing to this folder")
    with held:
        yield


def try_lock(path: str | os.PathLike[str]) -> AbstractContextManager[Any] | None:
    """The lock on a file, held until the end of its ``with``; None where somebody else holds it.

    Raises:
        UserError: it can be neither had nor refused, as on a file system without locks.
    """
    from filelock import FileLock, Timeout

    # Without flock filelock takes the file's mere presence for a lock, which outlives a killed run.
    known = signature(FileLock.__init__).parameters
    strict: dict[str, Any] = {"fallback_to_soft": False} if "fallback_to_soft" in known else {}
    try:
        try:
            return FileLock(path, timeout=0, **strict).acquire()
        except Timeout:
            _see_that_it_is_held(path)
            return None
    except (OSError, NotImplementedError) as error:
        raise UserError(f"{path}: cannot be locked ({one_line(error)}): does its file system have locks?") from error


def _see_that_it_is_held(path: str | os.PathLike[str]) -> None:
    """Raise what the system says of a lock, unless that it is held: filelock before 4 takes any error for that."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    with open(path, "ab") as file, suppress(BlockingIOError, PermissionError):
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)


def claim(folder: str | os.PathLike[str], settings: dict[str, Any]) -> None:
    """Begin or continue a job in ``folder``: its ``run.json`` holds the settings that the result depends on.

    Raises:
        UsageError: the folder was begun with other settings (names them), or cannot be written.
    """
    path = Path(folder) / "run.json"
    if path.is_file():
        refuse_other_settings(folder, json.loads(path.read_text()), settings)
        return
    try:
        write_json(path, settings)
    except OSError as error:
        raise UsageError(f"{folder}: cannot be written: {reason(error)}") from error


def refuse_other_settings(folder: object, before: dict[str, Any], settings: dict[str, Any]) -> None:
    """Raise ``UsageError`` with the names of the ``settings`` that differ from those that ``folder`` was begun with."""
    settings = json.loads(json.dumps(settings))
    changed = sorted(k for k in before.keys() | settings.keys() if before.get(k) != settings.get(k))
    if changed:
        raise UsageError(
            f"{folder}: was begun with other settings ({', '.join(changed)}): choose another --out or remove it"
        )

