"""The engine protocol: where the stages of a curation run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol


class Engine(Protocol):
    """Runs ``function`` on every task and gives the results in the order of the tasks.

    A task may be run again after its worker was lost: it leaves files, each whole or not at all, and begins with what
    is missing. It may say what it is called (``label``), on how many threads it runs (``threads``) and what share of a
    GPU it takes (``gpus``, the same for all tasks of a ``map``). ``tasks`` may make a task when it is asked for. An
    engine with ``workers`` says how many tasks run at a time, one with ``gpus`` how many GPUs there are.
    """

    def map(
        self, function: Callable[[Any], Any], tasks: Sequence[Any], *, desc: str, unit: str = "shards"
    ) -> list[Any]: ...

