"""The record of samples that could not be read in a run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from afresh.files import full_disk_named, write_atomic
from afresh.progress import get_logger
from train.finetune.data.images import Fault
from train.finetune.state.log import kept_lines

log = get_logger(__name__)


class FaultLog:
    """The faults of one process, a line each in ``faults.jsonl`` (of others than the first ``faults-1.jsonl``, …).

    Args:
        out: folder of the run.
        rank: of the process.
        start: position that the run goes on from: lines of later ones are repeated, and cut off first.
        world: how many processes there are; the files of others that the run had before are taken over.

    Attributes:
        count: how many there were.
    """

    def __init__(self, out: Path, rank: int, start: int, world: int = 1) -> None:
        self.path = out / (f"faults-{rank}.jsonl" if rank else "faults.jsonl")
        self._named: set[str] = set()
        mine = [path for path in out.glob("faults*.jsonl") if _rank(path) % world == rank]
        kept = [line for path in mine for line in kept_lines(path, lambda row: row["position"] < start)]
        self.count = len(kept)
        if mine:
            with write_atomic(self.path) as temporary:
                temporary.write_text("".join(kept), "utf-8")
        for path in mine:
            if path != self.path:
                path.unlink()

    def add(self, faults: Sequence[Fault]) -> None:
        """Append them; each shard is named once on stderr."""
        if not faults:
            return
        self.count += len(faults)
        with full_disk_named(self.path), self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(asdict(fault)) + "\n" for fault in faults)
        for fault in faults:
            if fault.shard not in self._named:
                self._named.add(fault.shard)
                stands_in = f"{fault.instead} stands in for it" if fault.instead else "it has weight 0"
                log.warning("%s/%s: %s; %s (more in %s)", fault.shard, fault.key, fault.reason, stands_in, self.path)



def _rank(path: Path) -> int:
    """The process that a file is of."""
    return int(path.stem.partition("-")[2] or 0)
