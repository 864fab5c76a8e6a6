"""What is computed once for all visits and runs, latents and text embeddings: half-precision numbers in parts.

A part belongs to a shard. In memory it is an array; on disk it is a file named by a digest of all that its numbers
depend on, memory-mapped, which every run that is given the folder finds again. A part is computed by the process that
gets its lock, be it of this run or another, and appears under its name when it is whole. Rows have checksums, so that
a damaged file is noticed when a row is read.
"""

from __future__ import annotations

import hashlib
import shutil
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from afresh.errors import UserError, reason
from afresh.files import write_atomic
from afresh.progress import get_logger, progress
from afresh.runs import try_lock
from train.stopping import StopOnSignal, Stopped

if TYPE_CHECKING:
    from accelerate import Accelerator


log = get_logger(__name__)
MEMORY_BYTES = 8 << 30
EXCHANGED = 1 << 26  # numbers that processes exchange at a time
MISSING = 0  # checksum of a row that could not be computed
Write = Callable[[int, NDArray[np.float16]], None]
"""``write(row, values)``: hand over a row of a part."""
Compute = Callable[[int, Sequence[int], Write], None]
"""``compute(number, rows, write)``: the given rows of a part, in any order; what is not written is missing."""
Count = Callable[[int, Sequence[int], Write, NDArray[np.uint32]], None]
"""The same, which also fills in the checksums of the rows that are written."""


@dataclass(frozen=True)
class Part:
    """What is known of a part before it is computed.

    Attributes:
        key: digest of all that its numbers depend on.
        starts: where each row begins, and the end, in numbers: ``[rows + 1]`` int64.
    """

    key: str
    starts: NDArray[np.int64]

    @property
    def rows(self) -> int:
        """How many rows it has."""
        return len(self.starts) - 1


@dataclass(frozen=True)
class Stored:
    """A computed part: its numbers, flat float16, and a checksum of each row, ``MISSING`` where it has none."""

    part: Part
    values: NDArray[np.float16]
    checksums: NDArray[np.uint32]
    path: Path | None

    def row(self, row: int) -> NDArray[np.float16] | None:
        """The numbers of a row; None if it is missing.

        Raises:
            UserError: the file is damaged there.
        """
        if self.checksums[row] == MISSING:
            return None
        values = np.array(self.values[self.part.starts[row] : self.part.starts[row + 1]])
        if self.path is not None and _checksum(values) != self.checksums[row]:
            raise UserError(f"{self.path}: the file is damaged in row {row}: delete it, and it is computed again")
        return values


def in_memory(
    parts: Sequence[Part],
    compute: Compute,
    accelerator: Accelerator,
    *,
    name: str,
    unit: str,
    stop: StopOnSignal | None = None,
) -> list[Stored]:
    """All parts, in the memory of every process; each computes its share of the rows.

    Raises:
        Stopped: a process was asked to by ``stop``; of several, after a part.
        UserError: they need more than ``MEMORY_BYTES``.
    """
    need = sum(2 * int(part.starts[-1]) for part in parts)
    if need > MEMORY_BYTES:
        raise UserError(
            f"{name}: memory for {need / 1e9:.1f} GB is asked for, more than {MEMORY_BYTES >> 30} GiB: "
            f"set {name} to disk or false, or lower augmentation.variants"
        )
    stored = []
    rank, world = accelerator.process_index, accelerator.num_processes
    mine = sum(len(range(rank, part.rows, world)) for part in parts)
    with _counting(compute, name, unit, mine, stop if world == 1 else None) as count:
        for number, part in enumerate(parts):
            values = np.zeros(int(part.starts[-1]), dtype=np.float16)
            checksums = np.full(part.rows, MISSING, dtype=np.uint32)

            def write(row: int, numbers: NDArray[np.float16], part: Part = part, values: Any = values) -> None:
                values[part.starts[row] : part.starts[row + 1]] = numbers.ravel()

            count(number, range(rank, part.rows, world), write, checksums)
            if world > 1:  # every row was filled by one process: the sum is the whole
                for start in range(0, len(values), EXCHANGED):
                    piece = torch.from_numpy(values[start : start + EXCHANGED])
                    piece.copy_(accelerator.reduce(piece.to(accelerator.device), reduction="sum"))
                sums = accelerator.reduce(
                    torch.from_numpy(checksums.astype(np.int64)).to(accelerator.device), reduction="sum"
                )
                checksums = sums.cpu().numpy().astype(np.uint32)
                wish = torch.tensor(float(stop is not None and stop.asked), device=accelerator.device)
                if accelerator.reduce(wish, reduction="sum"):
                    raise Stopped
            stored.append(Stored(part, values, checksums, None))
    return stored


def gigabytes(size: float) -> str:
    """A size in bytes as ``1,234.5 GB``; below one, with as many digits as it takes to be no zero."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e9:.3g} GB"


def on_disk(
    folder: Path, parts: Sequence[Part], compute: Compute, *, name: str, unit: str, stop: StopOnSignal | None = None
) -> list[Stored]:
    """All parts, mapped from files in ``folder``; those that are missing are computed by whoever comes first.

    Processes, of one run or of several, share the work by locks on the parts, and wait for one another; a part whose
    process dies is taken over. Nothing is exchanged, so nodes may have folders of their own.

    Raises:
        Stopped: the process was asked to by ``stop``; parts that are whole stay.
        UserError: the disk has no room.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stored = [_open(folder, part) for part in parts]
    missing = [number for number, one in enumerate(stored) if one is None]
    need, free = sum(2 * int(parts[number].starts[-1]) for number in missing), shutil.disk_usage(folder).free
    if need > free:
        raise UserError(f"{folder}: {name} needs {gigabytes(need)}, and {gigabytes(free)} are free")
    with _counting(compute, name, unit, sum(parts[number].rows for number in missing), stop) as count:
        while missing:
            if stop is not None:
                stop.check()
            before = len(missing)
            for number in list(missing):
                if (found := _open(folder, parts[number])) is None:
                    with _lock(folder / f"{parts[number].key}.lock") as mine:
                        if mine and (found := _open(folder, parts[number])) is None:
                            found = _compute_file(folder, parts[number], number, count)
                if found is not None:
                    stored[number] = found
                    missing.remove(number)
            if len(missing) == before:
                time.sleep(0.2)  # others are at the rest
    return [one for one in stored if one is not None]


def _compute_file(folder: Path, part: Part, number: int, count: Count) -> Stored:
    for stale in folder.glob(f".tmp-*-{part.key}*"):  # of a process that was killed: the lock is ours
        stale.unlink()
    checksums = np.full(part.rows, MISSING, dtype=np.uint32)
    try:
        with write_atomic(folder / f"{part.key}.npy") as temporary:
            with temporary.open("wb") as file:
                header = {"descr": "<f2", "fortran_order": False, "shape": (int(part.starts[-1]),)}
                np.lib.format.write_array_header_1_0(file, header)
                first = file.tell()

                def write(row: int, values: NDArray[np.float16]) -> None:
                    file.seek(first + 2 * int(part.starts[row]))
                    file.write(np.ascontiguousarray(values).data)

                count(number, range(part.rows), write, checksums)
                file.truncate(first + 2 * int(part.starts[-1]))
            with write_atomic(folder / f"{part.key}.rows.npy") as beside:  # before the numbers, which stand for both
                np.save(beside, checksums)
    except OSError as error:
        raise UserError(f"{folder}: {reason(error)}") from error
    found = _open(folder, part)
    assert found is not None
    return found


def _open(folder: Path, part: Part) -> Stored | None:
    """A part's files; None if they are not there, or not whole, which is said."""
    path = folder / f"{part.key}.npy"
    if not path.is_file():
        return None
    try:
        # An empty file cannot be mapped.
        values = np.load(path, mmap_mode="r" if part.starts[-1] else None)
        checksums = np.load(folder / f"{part.key}.rows.npy")
        if values.dtype == np.float16 and values.shape == (part.starts[-1],) and checksums.shape == (part.rows,):
            return Stored(part, values, checksums, path)
        reason = "it has another shape"
    except (OSError, ValueError, EOFError) as error:
        reason = str(error)
    log.warning("%s: not a whole cache file (%s): computed again", path, reason)
    return None


@contextmanager
def _counting(
    compute: Compute, name: str, unit: str, rows: int, stop: StopOnSignal | None = None
) -> Iterator[Count]:
    """``compute`` with progress and checksums, given up at a row where ``stop`` asks for it."""
    with progress(total=rows, desc=name, unit=unit) as bar:

        def run(number: int, wanted: Sequence[int], write: Write, checksums: NDArray[np.uint32]) -> None:
            def checked(row: int, values: NDArray[np.float16]) -> None:
                if stop is not None:
                    stop.check()
                write(row, values)
                checksums[row] = _checksum(values)
                bar.update(1)

            compute(number, wanted, checked)

        yield run


def _checksum(values: NDArray[np.float16]) -> int:
    return max(zlib.crc32(np.ascontiguousarray(values).data), MISSING + 1)


@contextmanager
def _lock(path: Path) -> Iterator[bool]:
    """Whether this process has the lock; who has it removes the file at the end, and so must look again who gets it."""
    held = try_lock(path)
    if held is None:
        yield False
        return
    with held:
        yield True
        path.unlink(missing_ok=True)


def weights_digest(module: torch.nn.Module) -> str:
    """A digest of a module's weights and their types: 32 hex characters."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]

