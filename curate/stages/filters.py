"""Filters: steps of one's own before a curation, each of which sees the samples and says which of them to leave out."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

import numpy as np

from afresh import plugins
from afresh.errors import UsageError, UserError, one_line
from curate.reading.samples import Sample

REASON = "filter:"  # in the ledger, before the filter's name


class Filter(Protocol):
    """Says of a sample whether it stays. A function of the sample alone: it is called on threads, in any order.

    What depends on more than the file it is written in has a ``digest``, a text that changes when it does: what was
    read before is read again then.
    """

    def __call__(self, sample: Sample) -> bool: ...


@lru_cache(maxsize=32)
def load_filter(name: str) -> Filter:
    """The filter of that name: an entry point of ``afresh.filters``, or ``module:function``.

    Raises:
        UsageError: there is none, or it cannot be imported.
    """
    found = plugins.function(plugins.FILTERS, name, "steps", "curate.stages.filters.Filter")
    if found is None:
        raise UsageError(f"steps: unknown {name!r}: choose {plugins.choices(plugins.FILTERS, ())}")
    return found


def left_out_by(sample: Sample, filters: Sequence[str]) -> str | None:
    """The first of the filters that does not keep the sample; None where all do.

    Raises:
        UserError: a filter fails, or says neither True nor False; names it and the sample.
    """
    for name in filters:
        where = f"steps {name!r}: sample {sample.key!r} of {sample.shard}"
        try:
            stays = load_filter(name)(sample)
        except Exception as error:
            raise UserError(f"{where}: {one_line(error)}") from error
        if not isinstance(stays, (bool, np.bool_)):
            raise UserError(f"{where}: a filter gives True to keep it or False to leave it out, not {stays!r}")
        if not stays:
            return name
    return None


def identities(filters: Sequence[str]) -> list[list[str]]:
    """Name and identity of each: what the rows of a shard depend on."""
    return [[name, plugins.identity(load_filter(name))] for name in filters]
