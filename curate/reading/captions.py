"""Captions: how a member becomes one, and when two of them are the same."""

from __future__ import annotations

import json
import unicodedata

MAX_CAPTION_BYTES = 1 << 20
MAX_JSON_BYTES = 1 << 24  # of a json that is read for its caption; parsed, it takes many times its size


def text_caption(data: bytes) -> tuple[str | None, str | None]:
    """The caption that a ``txt`` member holds, or None and why there is none."""
    if len(data) > MAX_CAPTION_BYTES:
        return None, f"caption has {len(data)} bytes, more than {MAX_CAPTION_BYTES}"
    try:
        return data.decode("utf-8-sig").strip(), None
    except UnicodeDecodeError:
        return None, "caption is not UTF-8"


def json_caption(data: bytes) -> tuple[str | None, str | None]:
    """The string ``caption`` of a ``json`` member, or None and why there is none."""
    if len(data) > MAX_JSON_BYTES:
        size = f"{len(data)} bytes, more than {MAX_JSON_BYTES}"
        return None, f"no caption: there is no txt member and the json member has {size}"
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError):
        return None, "no caption: there is no txt member and the json member is not valid JSON"
    caption = fields.get("caption") if isinstance(fields, dict) else None
    if not isinstance(caption, str):
        return None, "no caption: there is no txt member and the json member has no string 'caption'"
    # JSON can spell lone surrogates, which no UTF-8 file can hold.
    return text_caption(caption.encode("utf-8", "replace"))


def normalise_caption(caption: str) -> str:
    """Compatibility forms and letter case unified, runs of white space made one space, none at the ends."""
    return " ".join(unicodedata.normalize("NFKC", caption).casefold().split())

