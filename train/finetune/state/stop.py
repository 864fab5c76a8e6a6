"""Stopping on a signal, at the end of a step."""

from __future__ import annotations

import os
import signal
from typing import Any, Self


class StopOnSignal:
    """Within its block, SIGTERM and SIGUSR1 are a wish (``asked``) that the loop grants at the end of its step.

    So is the file that ``AFRESH_STOP_FILE`` names, once it is there: ``launch.sh`` passes its own signals on that way,
    past launchers that would end the processes over them. It works from before the block.
    """

    def __init__(self) -> None:
        self._signalled = False
        self._file = os.environ.get("AFRESH_STOP_FILE", "")
        self._before: dict[int, Any] = {}

    @property
    def asked(self) -> bool:
        """Whether this process has been asked to stop."""
        return self._signalled or bool(self._file) and os.path.exists(self._file)

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
        self._signalled = True

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

