"""Stopping on a signal, at the end of a step."""

from __future__ import annotations

import signal
from typing import Any, Self


class StopOnSignal:
    """Within its block, SIGTERM and SIGUSR1 are a wish (``asked``) that the loop grants at the end of its step."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for name in ("SIGTERM", "SIGUSR1"):
            number = getattr(signal, name, None)  # Windows has no SIGUSR1
            try:
                if number is not None:
                    self._before[number] = signal.signal(number, self._ask)
            except ValueError:  # not the main thread: a caller's own loop decides
                pass
        return self

    def _ask(self, *_: object) -> None:
        self.asked = True

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
