"""What the tests of ``curate import`` share: small sources, the job, and what it wrote."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from curate.config import ImportConfig
from curate.ingest import run_import
from curate.reading.samples import Sample, read_samples


def encode(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def picture(number: int, size: int = 8) -> Image.Image:
    pixels = np.random.default_rng(number).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def png(number: int) -> bytes:
    return encode(picture(number), "PNG")


def lay_out(folder: Path, files: dict[str, bytes | str]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def ingest(src: object, out: Path, **settings) -> dict:
    names = [str(one) for one in src] if isinstance(src, list) else [str(src)]
    return run_import(ImportConfig(src=names, out=str(out), **settings))


def samples_of(out: Path) -> list[Sample]:
    items = [item for shard in sorted(out.glob("*.tar")) for item in read_samples(str(shard))]
    assert all(isinstance(item, Sample) for item in items)
    return items


def accounts(out: Path) -> dict[str, tuple[str, str | None]]:
    rows = pq.read_table(out / "import.parquet").to_pylist()
    return {row["source"]: (row["status"], row["reason"]) for row in rows}


def fields(sample: Sample) -> dict:
    return json.loads(sample.members["json"])


def written(out: Path) -> dict[str, str]:
    files = [path for path in sorted(out.rglob("*")) if path.is_file()]
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
