"""What the site needs beside Markdown: links out of the docs, lists as GitHub has them, roles in docstrings."""

from __future__ import annotations

import re
from typing import Any

import griffe

_LINK = re.compile(r"\[([^\]]+)\]\((?:\.\./)+(?!docs/)([\w./-]+)(?:#[\w-]+)?\)")
_FENCE = re.compile(r"^(```.*?^```)$", re.MULTILINE | re.DOTALL)
_LIST = re.compile(r"^(?!\s*(?:[-*|]|\d+\.)\s)(?=\S)(.+)\n(?=(?:-|\d+\.) )", re.MULTILINE)
_ROLE = re.compile(r":(?:mod|func|class|meth|data|attr|exc):`~?([^`]+)`")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Name a file outside the docs in place of a link to it, and part a list from the line before it."""
    depth = page.file.src_uri.count("/")
    parts = _FENCE.split(markdown)
    for number in range(0, len(parts), 2):
        text = _LINK.sub(lambda found: _outside(found, depth), parts[number])
        parts[number] = _LIST.sub(r"\1\n\n", text)
    return "".join(parts)


def _outside(found: re.Match[str], depth: int) -> str:
    """The text of a link that leads out of ``docs``, with the file's name where the text is another one."""
    if found[0].count("../") <= depth:
        return found[0]
    return found[1] if "`" in found[1] else f"{found[1]} (`{found[2]}`)"


class PlainRoles(griffe.Extension):
    """Docstrings have roles of reStructuredText for the names of the house: as code in Markdown."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite an object's docstring."""
        if obj.docstring is not None:
            obj.docstring.value = _ROLE.sub(r"`\1`", obj.docstring.value)
