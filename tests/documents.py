"""Runs the code of a documentation page: blocks of Python, and what they are said to print."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent.parent / "docs"
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def run_page(name: str) -> int:
    """Run a page's Python blocks one after the other, in one namespace and the working folder; how many there were.

    A block that a ``text`` block follows must print just that.
    """
    blocks = _BLOCK.findall((DOCS / name).read_text(encoding="utf-8"))
    namespace: dict[str, Any] = {"__name__": "page"}
    count = 0
    for number, (language, code) in enumerate(blocks):
        if language != "python":
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, f"{name}, block {number}", "exec"), namespace)
        if number + 1 < len(blocks) and blocks[number + 1][0] == "text":
            said = _trimmed(blocks[number + 1][1])
            assert _trimmed(printed.getvalue()) == said, f"{name}, block {number} printed:\n{printed.getvalue()}"
        count += 1
    return count


def _trimmed(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]
