"""What stands beside an image: its caption in a ``.txt``, its caption and other fields in a ``.json``."""

from __future__ import annotations

import json
import posixpath
from typing import TYPE_CHECKING, Any

from afresh.errors import reason
from curate.importing.rows import RowError, caption_of, opened, printable

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

MAX_SIDECAR_BYTES = 1 << 24


def read_beside(
    filesystem: AbstractFileSystem, root: str, text: str | None, table: str | None, caption_field: str
) -> tuple[bytes | None, str | None, dict[str, Any]]:
    """Caption, why there is none, and fields, from the files beside an image.

    Args:
        filesystem: where they lie.
        root: of the folder.
        text: path below it of the ``.txt``, whose caption goes before the other; None where there is none.
        table: likewise of the ``.json``.
        caption_field: of the ``.json``, the field with the caption.
    """
    caption: bytes | None = None
    problem: str | None = "no caption: neither a .txt nor a .json stands beside the image"
    fields: dict[str, Any] = {}
    if table is not None:
        try:
            parsed = json.loads(_small_file(filesystem, root, table))
            if not isinstance(parsed, dict):
                raise ValueError("it is not an object")
        except RowError as error:
            problem = f"no caption: {printable(table)}: {error}"
        except (ValueError, RecursionError) as error:
            problem = f"no caption: {printable(table)} is no JSON to read: {reason(error)}"
        else:
            fields = parsed
            caption, problem = caption_of(parsed.get(caption_field), caption_field)
    if text is not None:
        try:
            caption, problem = _small_file(filesystem, root, text), None
        except RowError as error:
            if caption is None:
                problem = f"no caption: {printable(text)}: {error}"
    return caption, problem, fields


def _small_file(filesystem: AbstractFileSystem, root: str, name: str) -> bytes:
    with opened(filesystem, posixpath.join(root, name)) as file:
        data = file.read(MAX_SIDECAR_BYTES + 1)
    if len(data) > MAX_SIDECAR_BYTES:
        raise RowError(f"more than {MAX_SIDECAR_BYTES} bytes")
    return data
