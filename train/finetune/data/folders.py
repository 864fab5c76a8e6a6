"""Plain folders of images, tables and datasets among a run's shards: imported once, into the run's own folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from afresh.files import files_in
from curate.config import ImportConfig
from curate.ingest import run_import
from train.finetune.config import ShardGroup


def is_plain_folder(path: str) -> bool:
    """Whether a path is a folder that holds files or folders, and tar shards neither in it nor in ``shards``."""
    folder = Path(path)
    if "://" in path or not folder.is_dir() or not any(folder.iterdir()):
        return False
    return not files_in(folder, "*.tar") and not files_in(folder / "shards", "*.tar")


DATASET = "dataset:"
"""Begins the name of a Hugging Face dataset, of the hub or a folder."""


def is_imported(path: str) -> bool:
    """Whether what a path names is made shards of before it is trained on."""
    return path.startswith(DATASET) or path.endswith(".parquet") or is_plain_folder(path)


def with_folders_imported(
    shards: Sequence[str | ShardGroup], out: Path, *, read: bool
) -> list[str | ShardGroup]:
    """The shards of a run, with what ``curate import`` makes of each plain folder, table and dataset in its place.

    Args:
        shards: as the settings have them.
        out: folder of the run; the n-th of ``shards`` goes to ``imported/n``.
        read: import what is not imported yet; otherwise only say where it lies.

    Raises:
        UserError: a folder holds no images, a dataset cannot be found, or whatever else ``curate import`` refuses.
    """
    found: list[str | ShardGroup] = []
    for number, one in enumerate(shards):
        group = ShardGroup(one) if isinstance(one, str) else one
        if is_imported(group.path):
            target = str(out / "imported" / str(number))
            if read:
                named = group.path.startswith(DATASET)
                kind: Literal["auto", "dataset"] = "dataset" if named else "auto"
                run_import(ImportConfig(src=[group.path.removeprefix(DATASET)], out=target, kind=kind))
            group = dataclasses.replace(group, path=target)
        found.append(group)
    return found
