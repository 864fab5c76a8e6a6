"""What every job shares with its user: errors worth reading, progress, log lines, and files written whole."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, Self


class UserError(Exception):
    """A failure that its user can mend; the message names the file, sample or option, and what to do.

    The commands print it as one line without a traceback and end with ``exit_code`` (1, or 2 for usage).
    """

    exit_code = 1


class UsageError(UserError):
    """Bad usage or configuration: found before any work is done."""

    exit_code = 2


def is_main_process() -> bool:
    """Whether this process speaks for the job: rank 0 of a launched job, or the only process."""
    return os.environ.get("RANK", "0") == "0"


# Control characters, line and paragraph ends, changes of the writing direction, lone surrogates.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """``text`` with escapes for what would steer a terminal, break a line, or cannot be encoded."""
    return _UNPRINTABLE.sub(lambda match: repr(match[0])[1:-1], text)


# ---------------------------------------------------------------------------------------------- log lines


class _StderrHandler(logging.Handler):
    """Writes to the stderr of the moment, above a progress bar where one stands."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno < logging.WARNING and not is_main_process():
            return
        line = self.format(record)
        if "tqdm" in sys.modules:
            from tqdm import tqdm

            tqdm.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr, flush=True)


def get_logger(name: str) -> logging.Logger:
    """Logger whose lines go to stderr: messages as they are, warnings and errors under their name.

    Of several processes only the first one says INFO; warnings come from every one.
    """
    package = logging.getLogger(name.partition(".")[0])
    if not any(isinstance(handler, _StderrHandler) for handler in package.handlers):
        handler = _StderrHandler()
        handler.setFormatter(_LevelFormatter())
        package.addHandler(handler)
        package.setLevel(logging.INFO)
        package.propagate = False
    return logging.getLogger(name)


class _LevelFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        message = super().format(record)
        return message if record.levelno <= logging.INFO else f"{record.levelname.lower()}: {message}"


# ----------------------------------------------------------------------------------------------- progress


class Progress(Protocol):
    """What :func:`progress` returns; iterate it, or use it as a context manager and call ``update``."""

    n: float

    def __iter__(self) -> Iterator[Any]: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, *exc: object) -> Any: ...
    def update(self, n: float = 1) -> Any: ...
    def set_postfix_str(self, text: str) -> Any: ...
    def close(self) -> Any: ...


LINE_EVERY_SECONDS = 10.0


class _Lines:
    """Progress as plain lines on stderr, for logs: at most one every ten seconds, and one at the end."""

    def __init__(self, iterable: Iterable[Any] | None, total: float | None, desc: str, unit: str) -> None:
        self.iterable, self.total, self.desc, self.unit = iterable, total, desc, unit
        self.n: float = 0
        self.note = ""
        self.start = self.last = time.monotonic()
        self.spoke = self.closed = False

    def __iter__(self) -> Iterator[Any]:
        if self.iterable is None:
            raise TypeError("this progress has no iterable: use it as a context manager, with update(n)")
        try:
            for item in self.iterable:
                yield item
                self.update()
        finally:
            self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def update(self, n: float = 1) -> None:
        self.n += n
        now = time.monotonic()
        if now - self.last >= LINE_EVERY_SECONDS:
            self._say(now)

    def set_postfix_str(self, text: str) -> None:
        self.note = text

    def close(self) -> None:
        now = time.monotonic()
        if not self.closed and (self.spoke or now - self.start >= 1.0):
            self._say(now)
        self.closed = True

    def _say(self, now: float) -> None:
        self.last, self.spoke = now, True
        seconds = now - self.start
        rate = self.n / seconds if seconds > 0 else 0.0
        line = f"{self.desc}: {self.n:g}"
        if self.total:
            line += f"/{self.total:g}"
        line += f" {self.unit}, {rate:.3g}/s, {seconds:.0f} s"
        if self.total and rate > 0 and self.n < self.total:
            line += f", {(self.total - self.n) / rate:.0f} s left"
        if self.note:
            line += f", {self.note}"
        print(line, file=sys.stderr, flush=True)


class _Silent(_Lines):
    """Counts and says nothing: the other processes of a job."""

    def _say(self, now: float) -> None:
        pass


def progress(
    iterable: Iterable[Any] | None = None, *, total: float | None = None, desc: str, unit: str
) -> Progress:
    """Progress of one stage on stderr: a bar on a terminal, a line every ten seconds elsewhere.

    Args:
        iterable: what to go through; without it use ``with progress(total=...) as bar: bar.update(n)``.
        total: number of units, where it is known; taken from ``len(iterable)`` when it has one.
        desc: the stage, in a word or two (``"embedding"``).
        unit: what is counted, in the plural (``"images"``).
    """
    if total is None and iterable is not None:
        try:
            total = len(iterable)  # type: ignore[arg-type]
        except TypeError:
            total = None
    if not is_main_process():
        return _Silent(iterable, total, desc, unit)
    if sys.stderr.isatty():
        from tqdm import tqdm

        return tqdm(
            iterable, total=total, desc=desc, unit=f" {unit}", dynamic_ncols=True, file=sys.stderr
        )
    return _Lines(iterable, total, desc, unit)


# -------------------------------------------------------------------------------------- files written whole

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
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        if error.errno in _NO_ROOM:
            reason = f"{os.strerror(error.errno)}; make room, and the same command goes on there"
            raise UserError(f"{path} cannot be written: {reason}") from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


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


@contextmanager
def locked(folder: str | os.PathLike[str], lock: str | os.PathLike[str]) -> Iterator[None]:
    """One run at a time in ``folder``, by a lock on the file ``lock``, which the system lifts when its holder dies.

    Raises:
        UserError: another run holds the lock.
    """
    with open(lock, "a") as handle:
        try:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # Windows
            pass
        except OSError as error:
            raise UserError(f"{folder}: another run is writing to this folder") from error
        yield


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
        raise UsageError(f"{folder}: cannot be written: {error.strerror or error}") from error


def refuse_other_settings(folder: object, before: dict[str, Any], settings: dict[str, Any]) -> None:
    """Raise ``UsageError`` with the names of the ``settings`` that differ from those that ``folder`` was begun with."""
    settings = json.loads(json.dumps(settings))
    changed = sorted(k for k in before.keys() | settings.keys() if before.get(k) != settings.get(k))
    if changed:
        raise UsageError(
            f"{folder}: was begun with other settings ({', '.join(changed)}): choose another --out or remove it"
        )
