"""Stopping on a signal, at the end of a step."""

from __future__ import annotations

import contextlib
import signal


class StopOnSignal:
    """Turns SIGTERM and SIGUSR1 into a wish that the loop grants at the end of its step."""

    def __init__(self) -> None:
        self.asked = False
        self._before = {}
        for number in (signal.SIGTERM, signal.SIGUSR1):
            with contextlib.suppress(ValueError):  # not the main thread: a caller's own loop decides
                self._before[number] = signal.signal(number, self._ask)

    def _ask(self, *_: object) -> None:
        self.asked = True

    def restore(self) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
