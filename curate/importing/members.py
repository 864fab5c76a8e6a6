"""A row's content as the members of a sample: its image, perhaps as PNG, its caption, and everything else as json."""

from __future__ import annotations

import json

from afresh.files import to_json
from curate.config import ImportConfig
from curate.importing.rows import Content, RowError
from curate.reading.captions import CAPTION_FIELDS, text_caption
from curate.reading.images import CONVERTED_FORMATS, ImageError, image_format, to_png
from curate.reading.samples import IMAGE_EXTENSIONS
from curate.reading.tar import MAX_MEMBER_BYTES


def sample_members(source: str, content: Content, config: ImportConfig) -> tuple[dict[str, bytes], str | None]:
    """Members of a sample, and what is to be said of it.

    Args:
        source: where it comes from, for its ``json``.
        content: what stands there.
        config: ``require_caption``, ``convert`` and ``max_pixels``.

    Raises:
        RowError: it is to be skipped.
    """
    caption, remark = content.caption, content.problem
    if caption is not None:
        text, remark = text_caption(caption)
        if text == "":
            remark = "no caption: the text is empty"
        if text and text.encode() not in caption:  # it was UTF-16: UTF-8 is what others read in shards
            caption = text.encode()
    if remark is not None and config.require_caption:
        raise RowError(remark)
    extension, image = str(image_format(content.image)), content.image
    if extension not in IMAGE_EXTENSIONS:
        image = _converted(image, extension, config)
        remark = "; ".join(filter(None, [f"converted from {extension}", remark]))
        extension = "png"
    members = {extension: image}
    if caption is not None:
        members["txt"] = caption
    fields = dict(content.fields)
    # Names that mean something to whoever reads the shard; another's field of that name moves aside.
    taken = ["source"] if caption is not None else ["source", *CAPTION_FIELDS]
    for name in taken:
        if name in fields:
            aside = f"{name}_"
            while aside in fields:
                aside += "_"
            fields[aside] = fields.pop(name)
    text = json.dumps(to_json({**fields, "source": source}), ensure_ascii=False)
    members["json"] = text.encode("utf-8", "backslashreplace")
    if len(members["json"]) > MAX_MEMBER_BYTES or (caption is not None and len(caption) > MAX_MEMBER_BYTES):
        raise RowError(f"too large: its caption or fields have more than {MAX_MEMBER_BYTES} bytes")
    return members, remark


def _converted(image: bytes, extension: str, config: ImportConfig) -> bytes:
    if extension.upper() not in CONVERTED_FORMATS:
        raise RowError(f"format: {extension} images do not stand in shards, and cannot be converted here")
    if not config.convert:
        raise RowError(f"format: {extension} images do not stand in shards; --convert true makes them PNG")
    try:
        return to_png(image, max_pixels=config.max_pixels)
    except ImageError as error:
        raise RowError(f"cannot be converted: {extension}: {error}") from error
