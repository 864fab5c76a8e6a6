"""What stands beside an image: its caption in a ``.txt``, its caption and other fields in a ``.json``."""

from __future__ import annotations

import posixpath
from typing import TYPE_CHECKING, Any

from afresh.files import text_lines
from curate.importing.rows import RowError, opened, printable
from curate.reading.captions import CAPTION_FIELDS, MAX_JSON_BYTES, field_captions, json_fields, text_caption

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem


def read_beside(
    filesystem: AbstractFileSystem,
    root: str,
    text: str | None,
    table: str | None,
    caption_field: str,
    by_line: bool = False,
) -> tuple[bytes | None, str | None, dict[str, Any]]:
    """Caption, why there is none, and fields, from the files beside an image.

    Args:
        filesystem: where they lie.
        root: of the folder.
        text: path below it of the ``.txt`` (or ``.caption``, ``.cap``); None where there is none.
        table: likewise of the ``.json``.
        caption_field: of the ``.json``, the field with the caption, which goes before the ``.txt``; empty for the
            ``.txt``, else the first of ``CAPTION_FIELDS`` that holds text.
        by_line: each line of the ``.txt`` is a caption: the first is returned, several are the field ``captions``.
    """
    caption: bytes | None = None
    problem: str | None = "no caption: neither a .txt nor a .json stands beside the image"
    fields: dict[str, Any] = {}
    if table is not None:
        try:
            parsed, fault = json_fields(_small_file(filesystem, root, table))
        except RowError as error:
            parsed, fault = None, f"cannot be read: {error}"
        fields = parsed or {}
        if texts := field_captions(fields, caption_field):
            caption, problem = texts[0].encode(), None
        else:
            fault = fault or f"holds no text in {caption_field or ', '.join(CAPTION_FIELDS)}"
            problem = f"no caption: {printable(table)} {fault}"
    if text is not None and (caption is None or not caption_field):
        try:
            caption, problem = _small_file(filesystem, root, text), None
        except RowError as error:
            if caption is None:
                problem = f"no caption: {printable(text)}: {error}"
        else:
            lines = [line.strip() for line in text_lines(text_caption(caption)[0] or "")] if by_line else []
            if lines := list(filter(None, lines)):
                caption = lines[0].encode()
                fields |= {"captions": lines} if len(lines) > 1 else {}
    return caption, problem, fields


def _small_file(filesystem: AbstractFileSystem, root: str, name: str) -> bytes:
    with opened(filesystem, posixpath.join(root, name)) as file:
        data = file.read(MAX_JSON_BYTES + 1)
    if len(data) > MAX_JSON_BYTES:
        raise RowError(f"more than {MAX_JSON_BYTES} bytes")
    return data
