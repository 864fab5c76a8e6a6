"""The rows of ``train detect``: written as they come, taken over after a kill, and the table that they end as."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from afresh.errors import UserError, reason
from afresh.files import write_atomic
from afresh.runs import locked, refuse_other_settings
from train.memorization.scoring import PromptScore, Scores
from train.prompts import Prompt


class Journal:
    """Scores of prompts, one JSON line each, in order, behind a first line with the settings that they depend on.

    Open one with :func:`open_journal`.
    """

    def __init__(self, path: Path, file: BinaryIO, done: list[PromptScore]) -> None:
        self.path, self._file = path, file
        self.done = done
        """What was scored, by this run or by one before it."""

    def cut(self, group: int) -> None:
        """Forget the prompts of a last group that is not whole; groups are scored as one."""
        whole = len(self.done) // group * group
        if whole < len(self.done):
            self._file.seek(0)
            for _ in range(whole + 1):
                self._file.readline()
            self._file.truncate()
            del self.done[whole:]

    def add(self, scores: Sequence[PromptScore]) -> None:
        """Append, and see to it that it is on the disk."""
        lines = "".join(json.dumps(dataclasses.asdict(one)) + "\n" for one in scores)
        try:
            self._file.write(lines.encode())
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {reason(error)}") from error
        self.done += scores


@contextmanager
def open_journal(path: Path, settings: dict[str, Any], prompts: int) -> Iterator[Journal]:
    """The journal at ``path``, begun or taken over; it is removed when the block ends well and all prompts are scored.

    Args:
        path: of the file.
        settings: what the scores depend on.
        prompts: how many there are.

    Raises:
        UsageError: it was begun with other settings.
        UserError: another run is writing to it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(f".{path.name}.lock")
    path.touch()
    with locked(path, lock), open(path, "r+b") as file:
        lines = [line for line in file.read().splitlines(keepends=True) if line.endswith(b"\n")]
        done: list[PromptScore] = []
        if len(lines) > 1:
            try:
                before = json.loads(lines[0])
                done = [PromptScore(**json.loads(line)) for line in lines[1:]]
            except (ValueError, TypeError) as error:
                raise UserError(f"{path}: not the rows of a run that goes on ({error}); remove it") from error
            refuse_other_settings(path, before, settings)
        else:
            lines = [json.dumps(settings).encode() + b"\n"]
            file.seek(0)
            file.write(lines[0])
        file.seek(sum(map(len, lines)))
        file.truncate()  # a line that was cut
        journal = Journal(path, file, done)
        ended = False
        try:
            yield journal
            ended = len(journal.done) == prompts
        finally:
            if ended or not journal.done:  # a run that failed before its first score leaves nothing to go on from
                path.unlink()
            lock.unlink(missing_ok=True)


def write_table(
    path: str | Path, prompts: Sequence[Prompt], scores: Scores, outcomes: NDArray[np.float32] | None = None
) -> None:
    """One row a prompt and seed: ``prompt`` (its row in the file), ``caption, label, seed``, each signal's value under
    its name, ``timesteps``, and ``outcome`` (see :func:`train.memorization.detection.separation.read_outcomes`; null
    without).

    What a value comes from stands beside it: ``magnitude_by_step`` and ``attention_entropy_by_step``, one a timestep,
    and ``anisotropy_parts``, the magnitude and the cosine.
    """
    import pyarrow as pa
    import pyarrow.parquet as parquet

    n, s = scores.seeds.shape
    rows = [row for row in range(n) for _ in range(s)]
    columns = {
        "prompt": pa.array(rows, pa.int64()),
        "caption": pa.array([prompts[row].caption for row in rows], pa.string()),
        "label": pa.array([prompts[row].label for row in rows], pa.int8()),
        "seed": pa.array(scores.seeds.ravel(), pa.int64()),
    }
    for name, values in scores.values.items():
        columns[name] = pa.array(values.ravel(), pa.float32())
        if name in scores.observed:
            suffix = "parts" if name == "anisotropy" else "by_step"
            parts = scores.observed[name].reshape(n * s, -1)
            columns[f"{name}_{suffix}"] = pa.array(parts.tolist(), pa.list_(pa.float32()))
    columns["timesteps"] = pa.array([scores.timesteps.tolist()] * (n * s), pa.list_(pa.int64()))
    columns["outcome"] = pa.array([None if outcomes is None else outcomes[row] for row in rows], pa.float32())
    with write_atomic(path) as temporary:
        parquet.write_table(pa.table(columns), temporary)

