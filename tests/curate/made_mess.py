"""What the tests of ``curate dedup`` share: the job over one folder, and what it promises to write alike."""

from __future__ import annotations

import hashlib
from pathlib import Path

from curate.config import DedupConfig
from curate.reading.samples import Sample, read_samples


def settings(mess: Path, out: Path, **changes) -> DedupConfig:
    base = {"shards": [str(mess)], "out": str(out), "workers": 1, "batch_size": 32}
    return DedupConfig(**{**base, **changes})


def promised(out: Path) -> dict[str, str]:
    """Hashes of all that a curation promises to write alike."""
    files = [path for path in sorted(out.rglob("*")) if path.is_file()]
    return {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if path.relative_to(out).parts[0] != "work"
    }


def everything(folder: Path) -> dict[tuple[str, str], Sample]:
    return {
        (sample.shard, sample.key): sample
        for shard in sorted(folder.glob("*.tar"))
        for sample in read_samples(str(shard))
        if isinstance(sample, Sample)
    }
