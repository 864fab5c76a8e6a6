"""Stopping on a signal, at the end of a step."""

from __future__ import annotations

import os
import signal
from typing import Any, Self

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))  # not on Windows
_early: list[int] = []


def listen() -> None:
    """Take SIGTERM and SIGUSR1 from now on, for the run that is being started: it saves and stops after its first step.

    Loading takes a while, and a signal that comes then would end the process at once.
    """
    for number in SIGNALS:
        try:
            signal.signal(number, lambda number, frame: _early.append(number))
        except ValueError:  # not the main thread: a caller's own loop decides
            return


class Stopped(Exception):
    """Work was given up because its process was asked to stop; what is finished of it stays."""


class StopOnSignal:
    """Within its block, SIGTERM and SIGUSR1 are a wish (``asked``) that the loop grants at the end of its step.

    So is the file that ``AFRESH_STOP_FILE`` names, once it is there: ``launch.sh`` passes its own signals on that way,
    past launchers that would end the processes over them. It works from before the block, and so do signals where
    :func:`listen` was called; a wish is granted once.
    """

    def __init__(self) -> None:
        self._signalled = bool(_early)
        _early.clear()
        self._file = os.environ.get("AFRESH_STOP_FILE", "")
        self._before: dict[int, Any] = {}

    @property
    def asked(self) -> bool:
        """Whether this process has been asked to stop."""
        return self._signalled or bool(self._file) and os.path.exists(self._file)

    def ask(self) -> None:
        """Ask it to stop, as a signal does."""
        self._signalled = True

    def check(self) -> None:
        """Give up what is under way, where this process has been asked to stop.

        Raises:
            Stopped: it has been.
        """
        if self.asked:
            raise Stopped

    def __enter__(self) -> Self:
        for number in SIGNALS:
            try:
                self._before[number] = signal.signal(number, self._ask)
            except ValueError:  # not the main thread: a caller's own loop decides
                break
        self._signalled |= bool(_early)  # what came since
        _early.clear()
        return self

    def _ask(self, *_: object) -> None:
        self.ask()

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

