"""What a job says while it works: log lines and progress, on stderr, by one of several processes.

The bar on a terminal is tqdm's. Elsewhere it would fill a log with carriage returns, and it has no form of a line now
and then: those lines are made here.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, Protocol, Self

from afresh.errors import printable


def is_main_process() -> bool:
    """Whether this process speaks for the job: rank 0 of a launched job, or the only process."""
    return os.environ.get("RANK", "0") == "0"


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
        # Names and captions stand in it; its own lines (a traceback's) stay lines.
        message = "\n".join(map(printable, super().format(record).split("\n")))
        return message if record.levelno <= logging.INFO else f"{record.levelname.lower()}: {message}"


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
        self.update(0)  # a unit may take minutes: what happens within it is said too

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
        line += f" {self.unit}, {_pace(rate, self.unit)}{seconds:.0f} s"
        if self.total and rate > 0 and self.n < self.total:
            line += f", {(self.total - self.n) / rate:.0f} s left"
        if self.note:
            line += f", {self.note}"
        print(line, file=sys.stderr, flush=True)


def _pace(rate: float, unit: str) -> str:
    """Units a second, or seconds a unit of what takes longer: ``12.5/s, ``, ``54.6 s a step, ``; nothing of no unit."""
    if rate >= 1:
        return f"{rate:.3g}/s, "
    singular = re.sub("ies$", "y", unit).removesuffix("s")
    return f"{1 / rate:.3g} s a{'n' * (singular[0] in 'aeiou')} {singular}, " if rate > 0 else ""


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

