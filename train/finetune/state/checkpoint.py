"""Checkpoints of a training run: written aside, renamed when whole, read back exactly.

A checkpoint is one file, ``checkpoints/step-000500.pt``, of tensors and numbers alone, so that it is read with
``weights_only=True``. A file cut short by a kill or a full disk keeps its temporary name and is never picked up.
"""

from __future__ import annotations

import re
import shutil
import zipfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from afresh.errors import UserError, reason
from afresh.files import write_atomic
from afresh.progress import get_logger
from train.finetune.data.together import everyones, together

if TYPE_CHECKING:
    from accelerate import Accelerator


log = get_logger(__name__)
_NAME = re.compile(r"step-(\d+)\.pt$")


class Stateful(Protocol):
    """What owns a part of the run's state: tensors, numbers, and lists and dictionaries of them."""

    def state_dict(self) -> dict[str, Any]:
        """The state."""
        ...

    def load_state_dict(self, state: dict[str, Any], /) -> Any:
        """Take over a state."""
        ...


def collect_state(parts: Mapping[str, Stateful]) -> dict[str, Any]:
    """What a checkpoint holds: the state of every part, which is the same on every process."""
    return {name: part.state_dict() for name, part in parts.items()}


def restore_state(state: dict[str, Any], parts: Mapping[str, Stateful]) -> None:
    """Give the parts of :func:`collect_state` their state back, and let go of it, one after the other."""
    for name, part in parts.items():
        part.load_state_dict(state.pop(name))


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """``(step, path)`` of each whole checkpoint, oldest first."""
    found = [(int(match[1]), path) for path in folder.glob("step-*.pt") if (match := _NAME.search(path.name))]
    return sorted(found)


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write the state of a run after ``step`` optimizer steps, and drop all but the newest ``keep`` checkpoints.

    Raises:
        UserError: the disk is full or the folder cannot be written; older checkpoints stay.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:06d}.pt"
    try:
        with write_atomic(path) as temporary:
            _save(state, temporary)
    except (OSError, UserError) as error:
        why = reason(error.__cause__ or error)
        raise UserError(
            f"{path}: the checkpoint could not be written: {why}; make room, and the same command goes on from "
            f"{f'step {older[-1][0]}' if (older := list_checkpoints(folder)) else 'the beginning'}"
        ) from error
    for _, old in list_checkpoints(folder)[: -max(keep, 1)]:
        old.unlink()
    return path


def _save(state: dict[str, Any], path: Path) -> None:
    """``torch.save``, with the system's own error: torch's writer of files says where it stood, not what went wrong."""
    with open(path, "wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__cause__ or cause.__context__
            raise cause or OSError(str(error).partition("\n")[0]) from error


def keep_last(folder: Path, keep: int) -> None:
    """Leave of a finished run's checkpoints the newest, or nothing where ``keep`` is 0."""
    if not keep:
        shutil.rmtree(folder, ignore_errors=True)
    for _, old in list_checkpoints(folder)[:-1]:
        old.unlink()


def remove_partial(folder: Path) -> None:
    """Remove what writers that were killed left behind; nobody else may be writing there."""
    for path in folder.glob(".tmp-*"):
        path.unlink(missing_ok=True)


def load_latest(folder: Path, accelerator: Accelerator | None = None) -> tuple[int, dict[str, Any]] | None:
    """The newest checkpoint that every process can read, as ``(step, state)``; None if there is none at all.

    Every process calls this, and goes on from the same step as the others, or none does. The state is mapped from the
    file: reading it into a model takes no memory beside the model's.

    Args:
        folder: of the checkpoints.
        accelerator: the processes of the run; None for this one alone.

    Raises:
        UserError: there are checkpoints, and none that every process can read: to begin anew would be to overwrite
            what the run has left.
    """
    known = dict(everyones(accelerator, list_checkpoints(folder)))
    for step, path in sorted(known.items(), reverse=True):
        state, problem = together(accelerator, partial(_read, path))
        problems = [one for one in everyones(accelerator, [problem]) if one]
        if not problems:
            return step, state
        if accelerator is None or accelerator.is_main_process:
            log.warning("%s: unreadable checkpoint left out (%s)", path, "; ".join(dict.fromkeys(problems)))
    if known:
        newest = known[max(known)]
        raise UserError(
            f"{newest}: neither this checkpoint nor an older one can be read: bring one back, or remove {folder} to "
            "begin anew"
        )
    return None


def _read(path: Path) -> tuple[dict[str, Any], str]:
    """A checkpoint's state and nothing, or an empty state and why it cannot be read."""
    try:
        with zipfile.ZipFile(path) as archive:  # every byte once: what is mapped is not checked any more
            if (damaged := archive.testzip()) is not None:
                return {}, f"{damaged} is damaged"
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True), ""
    except Exception as error:  # whatever a damaged file leads the readers to
        return {}, reason(error)
