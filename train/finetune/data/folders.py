"""Plain folders of images among a run's shards: imported once, into the run's own folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

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


def with_folders_imported(
    shards: Sequence[str | ShardGroup], out: Path, *, read: bool
) -> list[str | ShardGroup]:
    """The shards of a run, with what ``curate import`` makes of each plain folder in its place.

    Args:
        shards: as the settings have them.
        out: folder of the run; the n-th of ``shards`` goes to ``imported/n``.
        read: import what is not imported yet; otherwise only say where it lies.

    Raises:
        UserError: a folder holds no images, or something else that ``curate import`` refuses.
    """
    found: list[str | ShardGroup] = []
    for number, one in enumerate(shards):
        group = ShardGroup(one) if isinstance(one, str) else one
        if is_plain_folder(group.path):
            target = str(out / "imported" / str(number))
            if read:
                run_import(ImportConfig(src=[group.path], out=target))
            group = dataclasses.replace(group, path=target)
        found.append(group)
    return found
