"""Small tar shards, written member by member, and what reading makes of them."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

from curate.reading.samples import BadSample, Sample, read_samples

IMAGE = b"not decoded here"


def tar_bytes(*members: tuple[str, bytes] | tarfile.TarInfo, **options) -> bytes:
    """An archive of these members; ``options`` are those of :func:`tarfile.open`."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **options) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    return buffer.getvalue()


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def read(tmp_path: Path, data: bytes) -> list[Sample | BadSample]:
    path = tmp_path / "shard.tar"
    path.write_bytes(data)
    return list(read_samples(str(path)))


def kinds(items: list[Sample | BadSample]) -> list[tuple[str, str]]:
    return [(item.key, "ok" if isinstance(item, Sample) else item.kind) for item in items]


def three_samples() -> bytes:
    return tar_bytes(
        *(
            (f"{key}.{ext}", data)
            for key in ("a", "b", "c")
            for ext, data in (("jpg", IMAGE), ("txt", b"words"))
        )
    )
