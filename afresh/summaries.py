"""A job's summary, as aligned lines and tables on a terminal, or as JSON."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from afresh.errors import UNPRINTABLE, printable
from afresh.files import to_json


def as_text(summary: Any) -> str:
    """A summary's own view, where it has one; it may be coloured on a terminal."""
    view = getattr(summary, "view", None)
    if view is None:
        return format_summary(summary)
    return view(colour=sys.stdout.isatty() and not os.environ.get("NO_COLOR"))


def as_json(summary: Any) -> str:
    """A summary as one line of JSON, which says the same with escapes for what would steer a terminal."""
    text = json.dumps(to_json(summary), ensure_ascii=False)
    return UNPRINTABLE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)  # outside of strings there is none


def format_summary(summary: Mapping[str, Any]) -> str:
    """A summary as aligned lines ``key  value``, and a table for every list of rows."""
    lines: list[tuple[str, str]] = []
    tables: list[str] = []

    def add(prefix: str, items: Mapping[str, Any]) -> None:
        for key, value in items.items():
            if isinstance(value, Mapping):
                add(f"{prefix}{key}.", value)
            elif isinstance(value, list) and value and all(isinstance(row, Mapping) for row in value):
                tables.append(_table(value))
            else:
                lines.append((f"{prefix}{key}", _cell(value)))

    add("", summary)
    width = max((len(key) for key, _ in lines), default=0)
    block = "\n".join(f"{key:<{width}}  {value}".rstrip() for key, value in lines)
    return "\n\n".join([*tables, block] if block else tables)


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns, *([_cell(row.get(column)) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    numeric = [all(isinstance(row.get(c), (int, float, type(None))) for row in rows) for c in columns]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, numeric, strict=True)
        ).rstrip()
        for line in cells
    )


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if value != value:
            return "–"
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    if isinstance(value, (list, tuple)):
        return ", ".join(_cell(item) for item in value)
    return _cell(value.item()) if hasattr(value, "item") else printable(str(value))

