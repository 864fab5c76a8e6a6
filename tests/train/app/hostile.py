"""Captions that mean harm, and a small curated set that has them."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

from curate.config import DedupConfig
from curate.dedup import run_dedup
from curate.reading.writing import write_shard

CAPTIONS = [
    "<img src=x onerror=\"document.title='owned'\">",
    "<script>document.title='owned'</script> a plain cat",
    "{{constructor.constructor(\"document.title='owned'\")()}} ${document.title='owned'} `${document.title='owned'}`",
    "\x1b[31m a \u202ereversed\u202c word \x07 and a tab\tin it",
    "\" onmouseover=\"document.title='owned'\" autofocus onfocus=\"document.title='owned'\" x=\"",
    "</button></div><a href=\"javascript:document.title='owned'\">press</a>",
]


def encoded(image: Image.Image) -> bytes:
    data = io.BytesIO()
    image.convert("RGB").save(data, "PNG")
    return data.getvalue()


def picked(emoji: list[tuple]) -> list[tuple]:
    """18 of them, of which the first six are unlike."""
    return [*emoji[::10][:6], *emoji[52:]]


def made_set(emoji: list[tuple], folder: Path) -> tuple[Path, str]:
    """``(curation, shards)``: 18 emoji, six of them under hostile captions and three times."""
    samples = []
    for number, (image, caption) in enumerate(picked(emoji)):
        caption = CAPTIONS[number] if number < len(CAPTIONS) else caption
        for copy in range(3 if number < len(CAPTIONS) else 1):
            brighter = image.convert("RGB").point(lambda value, copy=copy: min(255, value + 2 * copy))
            samples.append((f"{number:03d}-{copy}", {"png": encoded(brighter), "txt": caption.encode()}))
    shards, out = folder / "raw" / "000000.tar", folder / "curated"
    shards.parent.mkdir(parents=True)
    write_shard(shards, samples)
    run_dedup(DedupConfig([str(shards.parent)], str(out), image_embedder="copy-detector", threshold=0.97, workers=1))
    return out, str(shards.parent)
