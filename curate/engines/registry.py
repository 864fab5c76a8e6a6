"""Engines by name: this machine's processes, Ray, or one of one's own."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

from afresh import plugins
from afresh.errors import UsageError
from curate.engines.local import LocalEngine
from curate.engines.protocol import Engine
from curate.engines.ray import RayEngine

ENGINES = ("local", "ray", "ray:ADDRESS")


def open_engine(name: str, workers: int) -> AbstractContextManager[Engine]:
    """The engine of that name, for a ``with`` block.

    Args:
        name: ``local``, ``ray`` or ``ray:ADDRESS`` (:class:`curate.engines.ray.RayEngine`), an entry point of
            ``afresh.engines``, or ``module:Class``, which is called with ``workers``.
        workers: as in the job's settings; 0 leaves it to the engine.

    Raises:
        UsageError: there is none, or it cannot be made, or has no ``map``.
    """
    if name == "local":
        return LocalEngine(workers)
    kind, _, address = name.partition(":")
    if kind == "ray":
        return RayEngine(workers, name if address.startswith("//") else address)
    made = plugins.make(plugins.ENGINES, name, "engine", ["map"], "curate.engines.protocol.Engine", workers)
    if made is None:
        raise UsageError(f"engine: unknown {name!r}: choose {plugins.choices(plugins.ENGINES, ENGINES)}")
    return made if hasattr(made, "__enter__") else contextlib.nullcontext(made)
