"""Sources of captioned images (a folder, a Hugging Face dataset, parquet files), each as one stream of rows.

A source is listed, and its columns are chosen, before anything is imported. Its rows come in an order that depends
on the source alone, and from any row on, so that a stopped import can be continued.
"""

from __future__ import annotations

import posixpath
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path

from afresh.errors import UsageError
from curate.config import ImportConfig
from curate.importing.folders import Folder
from curate.importing.layouts import IMAGE_SUFFIXES, METADATA_FILES
from curate.importing.listing import list_files
from curate.importing.rows import Content, Row, RowError, Source
from curate.importing.tables import HuggingFaceDataset, ParquetFiles, expand_parquet

__all__ = ["Content", "Row", "RowError", "Source", "open_source"]
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)


def open_source(config: ImportConfig) -> Source:
    """The source that ``config.src`` names, of the kind ``config.kind`` or, when that is ``auto``, as recognised.

    Raises:
        UsageError: there is no such source, it is of no kind that can be imported, or its columns do not tell
            which is the image and which the caption.
        UserError: it cannot be read.
    """
    src = [str(one) for one in config.src]
    if not src:
        raise UsageError("src: name a folder of images, a Hugging Face dataset or parquet files")
    src = [_within(one) for one in src]
    kind = _recognise(src) if config.kind == "auto" else config.kind
    if kind != "dataset" and (config.subset or (config.split and kind != "folder")):
        raise UsageError(
            f"split and subset are for datasets, and {', '.join(src)} is read as {kind}; --kind says otherwise"
        )
    if kind == "parquet":
        return ParquetFiles([url for one in src for url in expand_parquet(one)], config)
    if len(src) > 1:
        raise UsageError(f"src: only parquet files are imported several at a time, got {', '.join(src)}")
    return Folder(src[0], config) if kind == "folder" else HuggingFaceDataset(src[0], config)


def _within(src: str) -> str:
    """A source as it is read: of a zip file what is in it."""
    path = Path(src).expanduser()
    return f"zip://::{path.absolute()}" if "://" not in src and path.is_file() and zipfile.is_zipfile(path) else src


def _recognise(src: Sequence[str]) -> str:
    """What the sources are: by their marks and by the names of the files in them."""
    if all(name.endswith(".parquet") for name in src):  # files, globs and brace ranges among them
        return "parquet"
    name, local = src[0], Path(src[0]).expanduser()
    if "://" not in name:
        if local.is_file():
            raise UsageError(f"src: {name} is neither a folder nor a .parquet file (--kind parquet takes any name)")
        if not local.is_dir():
            if _HUB_NAME.fullmatch(name):
                return "dataset"
            raise UsageError(f"src: {name}: no such file or folder")
        if (local / "state.json").is_file() or (local / "dataset_dict.json").is_file():
            return "dataset"  # as save_to_disk writes it
    tables = tars = False
    for entry in list_files(name):
        suffix = posixpath.splitext(entry.name)[1].lower()
        if suffix in IMAGE_SUFFIXES:
            return "folder"
        tables |= suffix in (".parquet", ".arrow") and posixpath.basename(entry.name) not in METADATA_FILES
        tars |= suffix == ".tar"
    if tables:
        return "parquet" if "://" in name else "dataset"
    if tars:
        raise UsageError(f"src: {name} holds tar shards, which need no import: give them to `curate dedup`")
    return "folder"

