"""Parts of one's own by name: the entry points of installed packages, and ``module:name`` from the working folder.

What takes parts of a kind asks here for the names that it does not have itself. A part is a class, a function or an
object that keeps the kind's protocol. Naming one runs its module, as importing it would: name only code you trust.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import re
import sys
from collections.abc import Iterable
from functools import cache
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from afresh.errors import UsageError, one_line

# Groups of entry points, one for each kind.
IMAGE_EMBEDDERS = "afresh.image_embedders"  # curate.embed.protocol.Embedder
CAPTION_EMBEDDERS = "afresh.caption_embedders"  # curate.embed.protocol.CaptionEmbedder
DECISION_RULES = "afresh.decision_rules"  # curate.decisions.rules.OwnRule
FILTERS = "afresh.filters"  # curate.stages.filters.Filter
ENGINES = "afresh.engines"  # curate.engines.protocol.Engine
SIGNALS = "afresh.signals"  # train.memorization.signals.protocol.Signal
GUIDANCE = "afresh.guidance"  # train.sampling.guidance.Guidance
METRICS = "afresh.metrics"  # train.evaluation.metrics.protocol.Metric
_REFERENCE = re.compile(r"(?P<module>[^\W\d]\w*(?:\.[^\W\d]\w*)*):(?P<name>[^\W\d]\w*)")


def find(group: str, name: str, option: str) -> Any | None:
    """The part of a kind that ``name`` means; None where no entry point is called so and it is no ``module:name``.

    Args:
        group: the kind.
        name: of an entry point, or ``module:name``.
        option: that the name was given with, for messages.

    Raises:
        UsageError: it names something that cannot be imported.
    """
    try:
        if (point := _entry_points(group).get(name)) is not None:
            return point.load()
        if (reference := _REFERENCE.fullmatch(name)) is None:
            return None
        _see_working_folder()
        module = import_module(reference["module"])
    except Exception as error:  # whatever the module's own code raises
        raise UsageError(f"{option} {name!r} cannot be imported: {one_line(error)}") from error
    if not hasattr(module, reference["name"]):
        where = getattr(module, "__file__", None) or reference["module"]
        raise UsageError(f"{option} {name!r}: there is no {reference['name']!r} in {where}")
    return getattr(module, reference["name"])


def missing_module(name: str) -> str | None:
    """The module of a ``module:name`` that is nowhere to be found; None where it is there, or ``name`` is no such."""
    reference = _REFERENCE.fullmatch(name)
    if reference is None:
        return None
    top = reference["module"].partition(".")[0]
    _see_working_folder()
    return None if top in sys.modules or find_spec(top) else top


def make(group: str, name: str, option: str, needs: Iterable[str], protocol: str, *arguments: Any) -> Any | None:
    """An object that keeps a kind's protocol, made by calling what ``name`` means with ``arguments``.

    What has the members already is taken as it is. Other arguments are those of :func:`find`.

    Args:
        needs: members that the protocol asks for.
        protocol: where it stands, for messages.

    Raises:
        UsageError: it cannot be imported or called, or lacks a member.
    """
    part = find(group, name, option)
    if part is None:
        return None
    needs = list(needs)
    if inspect.isclass(part) or (callable(part) and _lacking(part, needs)):
        try:
            part = part(*arguments)
        except Exception as error:
            raise UsageError(f"{option} {name!r} cannot be made: {one_line(error)}") from error
    if lacking := _lacking(part, needs):
        raise UsageError(f"{option} {name!r} lacks {', '.join(lacking)}: see {protocol} for what it needs")
    return part


def function(group: str, name: str, option: str, protocol: str) -> Any | None:
    """A function by name, as :func:`find` gives it. Raises ``UsageError`` also where it cannot be called."""
    part = find(group, name, option)
    if part is not None and not callable(part):
        raise UsageError(f"{option} {name!r} is no function: see {protocol} for what it needs")
    return part


def choices(group: str, built_in: Iterable[str]) -> str:
    """What may be given, for a message: the names, and ``module:name``."""
    return ", ".join([*built_in, *names(group)]) + ", or your own as module:name"


def names(group: str) -> list[str]:
    """The entry points of a kind, sorted."""
    return sorted(_entry_points(group))


def identity(part: Any) -> str:
    """Hex or a text of its own that changes when a part does: its ``digest``, or else that of the file it stands in.

    Give a part a ``digest`` where it depends on more than its own file.
    """
    own = getattr(part, "digest", None)
    if isinstance(own, str):
        return own
    named = part if inspect.isclass(part) or inspect.isroutine(part) else type(part)
    try:
        code = _code(inspect.getfile(named))
    except (OSError, TypeError):  # built in, or typed in at a prompt
        code = b""
    return hashlib.sha256(f"{named.__module__}:{named.__qualname__}\0".encode() + code).hexdigest()


@cache
def _code(file: str) -> bytes:
    """As it was when it was first asked for, which is when it was imported: what runs is not what is written later."""
    return Path(file).read_bytes()


@cache
def _entry_points(group: str) -> dict[str, metadata.EntryPoint]:
    return {point.name: point for point in metadata.entry_points(group=group)}


def _see_working_folder() -> None:
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())  # last: a file there stands in for no installed module


def _lacking(part: Any, needs: Iterable[str]) -> list[str]:
    return [member for member in needs if not hasattr(part, member)]
