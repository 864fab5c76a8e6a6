"""Values of a table's columns in JSON's types: all that a sample's json can hold."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as kinds

from afresh.progress import get_logger

log = get_logger(__name__)


def without_bytes(fields: Iterable[pa.Field]) -> list[str]:
    """The names of the columns that JSON can hold; what it cannot is said once for all."""
    names = {field.name: json_values(pa.nulls(0, field.type)) is not None for field in fields}
    if lost := [name for name, held in names.items() if not held]:
        _say_lost(", ".join(lost))
    return [name for name, held in names.items() if held]


@lru_cache(maxsize=64)
def _say_lost(columns: str) -> None:
    log.warning("left out, for json holds no bytes: the columns %s", columns)


def json_values(array: pa.Array) -> list[Any] | None:
    """A column's values in JSON's types, structs and lists at any depth; None when it holds bytes and nothing else.

    Text is decoded with bytes that are not UTF-8 as lone surrogates, times and decimals are given as text, durations in
    their unit, a map as an object where its keys are text, else as pairs. Bytes within a struct are left out.
    """
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    if kinds.is_dictionary(array.type):
        array = array.dictionary_decode()
    if kinds.is_run_end_encoded(array.type):
        array = pc.run_end_decode(array)
    kind = array.type
    if kinds.is_struct(kind):
        fields = [(field.name, json_values(column)) for field, column in zip(kind, array.flatten(), strict=True)]
        held = [(name, values) for name, values in fields if values is not None]
        if not held and fields:
            return None
        there = array.is_valid().to_pylist()
        return [{name: values[row] for name, values in held} if there[row] else None for row in range(len(array))]
    if kinds.is_map(kind):
        entries = json_values(array.cast(pa.list_(pa.struct([("key", kind.key_type), ("value", kind.item_type)]))))
        pairs = [one and [tuple(entry.values()) for entry in one] for one in entries or []]
        if any(len(pair) < 2 for one in pairs for pair in one or []):  # keys or values are bytes
            return None
        return [dict(one) if one is not None and _is_text(kind.key_type) else one for one in pairs]
    if kinds.is_nested(kind) and not kinds.is_union(kind):  # some kind of list
        flat = json_values(array.flatten())
        elements = iter(flat or ())
        lengths = pc.list_value_length(array).to_pylist()
        return None if flat is None else [n if n is None else list(itertools.islice(elements, n)) for n in lengths]
    if _is_text(kind):
        return [_decoded(value) for value in array.cast(pa.large_binary()).to_pylist()]
    if kinds.is_decimal(kind) or kinds.is_date(kind) or kinds.is_time(kind) or kinds.is_timestamp(kind):
        return array.cast(pa.string()).to_pylist()
    if kinds.is_duration(kind):
        return array.cast(pa.int64()).to_pylist()
    if kinds.is_null(kind) or kinds.is_boolean(kind) or kinds.is_integer(kind) or kinds.is_floating(kind):
        return array.to_pylist()
    return None


def _is_text(kind: pa.DataType) -> bool:
    return kinds.is_string(kind) or kinds.is_large_string(kind) or kinds.is_string_view(kind)


def _decoded(value: bytes | None) -> str | None:
    return None if value is None else value.decode("utf-8", "surrogateescape")

