"""Captions: how members become them, what a sample's json holds, and when two captions are the same."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping
from typing import Any

from afresh.files import decode_text

MAX_CAPTION_BYTES = 1 << 20
MAX_JSON_BYTES = 1 << 24  # of a json that is read for its fields; parsed, it takes many times its size
TEXT_EXTENSIONS = ("txt", "caption", "cap")  # of files that hold a caption and nothing else
CAPTION_FIELDS = ("caption", "text", "prompt", "captions")  # of a json: the first that holds text


def text_caption(data: bytes) -> tuple[str | None, str | None]:
    """The caption that a ``txt`` member holds, or None and why there is none."""
    if len(data) > MAX_CAPTION_BYTES:
        return None, f"caption has {len(data)} bytes, more than {MAX_CAPTION_BYTES}"
    try:
        return decode_text(data).strip(), None
    except ValueError as error:
        return None, f"caption is not UTF-8: {error}"


def json_fields(data: bytes) -> tuple[dict[str, Any] | None, str | None]:
    """The object that a ``json`` member or file holds, or None and why there is none: the one reader of them."""
    if len(data) > MAX_JSON_BYTES:
        return None, f"has {len(data)} bytes, more than {MAX_JSON_BYTES}"
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError):  # the latter of what is nested too deep
        return None, "is not valid JSON"
    return (fields, None) if isinstance(fields, dict) else (None, "is not a JSON object")


def field_captions(fields: Mapping[str, Any], name: str = "") -> tuple[str, ...]:
    """The texts of the field ``name``, or, without a name, of the first of ``CAPTION_FIELDS`` that holds any.

    A field holds a text, or a list with texts. Lone surrogates, which JSON can spell and no UTF-8 file can hold, are
    replaced.
    """
    for field in (name,) if name else CAPTION_FIELDS:
        if texts := texts_of(fields.get(field)):
            return texts
    return ()


def texts_of(value: Any) -> tuple[str, ...]:
    """The texts that a value of JSON is or, as a list, holds: ``"ab"`` is one, and None holds none."""
    found = value if isinstance(value, list) else [value]
    return tuple(text.encode("utf-8", "replace").decode() for text in found if isinstance(text, str))


def normalise_caption(caption: str) -> str:
    """Compatibility forms and letter case unified, runs of white space made one space, none at the ends."""
    return " ".join(unicodedata.normalize("NFKC", caption).casefold().split())
