"""What the names of folders say about their images: the split they belong to, and how often they are to be seen."""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Sequence

from afresh.errors import UsageError
from curate.importing.listing import Entry

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".jp2", ".jxl")
METADATA_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
ALL = "all"  # as ``split``: whatever folders are called
_TRAINING = frozenset(("train", "training"))
_HELD_OUT = frozenset(("test", "testing", "val", "valid", "validation", "dev", "eval", "evaluation"))
_REPEATED = re.compile(r"(\d{1,3})_(.+)")


def of_split(entries: Sequence[Entry], split: str | None, url: str) -> Sequence[Entry]:
    """The files of one split, where a folder has some: of training, and of what must not be trained on.

    Args:
        entries: all files of the folder.
        split: its name, ``all`` for all files; None where there is but one.
        url: of the folder, for messages.

    Raises:
        UsageError: there are several and none is named, or none of that name.
    """
    if split == ALL:
        return entries
    images = [entry.name for entry in entries if entry.name.lower().endswith(IMAGE_SUFFIXES)]
    above = os.path.commonpath([posixpath.dirname(name) for name in images]) if images else ""
    above += "/" if above else ""
    tops = {name[len(above) :].split("/")[0] for name in images if "/" in name[len(above) :]}
    named = {top.lower() for top in tops}
    splits = sorted(top for top in tops if top.lower() in _TRAINING | _HELD_OUT)
    if not (named & _TRAINING and named & _HELD_OUT):
        if split is not None:
            raise UsageError(f"split: {url} has no folders of splits; otherwise split and subset are for datasets")
        return entries
    if split not in splits:
        got = "" if split is None else f"; there is no {split!r}"
        raise UsageError(f"split: {url} has {', '.join(splits)}; name one of them (--split), or --split {ALL}{got}")
    return [
        entry
        for entry in entries
        if entry.name.startswith(f"{above}{split}/") or ("/" not in entry.name and entry.name in METADATA_FILES)
    ]


def folder_repeats(images: Sequence[str]) -> dict[str, tuple[int, str]]:
    """How often the images of each folder are to be seen, and what they show, where folders are named ``10_name``.

    So have them the trainers of adapters (kohya's sd-scripts). Nothing is said where other folders hold images, too;
    what trainers keep beside them (``dataset.toml``, latents as ``.npz``, folders of caches) are no images.

    Args:
        images: paths of whatever may be an image.

    Returns:
        Repeats and name by folder.
    """
    folders = {posixpath.dirname(name) for name in images if name.lower().endswith(IMAGE_SUFFIXES)}
    matches = {folder: _REPEATED.fullmatch(posixpath.basename(folder)) for folder in folders}
    if None in matches.values() or len({posixpath.dirname(folder) for folder in folders}) > 1:
        return {}
    return {folder: (int(match[1]), match[2]) for folder, match in matches.items() if match is not None}
