"""Published lists of memorized prompts, whose originals are named by number or URL: which of them are at hand.

Read as they are published: rows with a ``caption`` or a ``prompt``, and with ``index`` (Wen et al.:
``sdv1_500_memorized.jsonl``), ``url`` or ``urls`` (MemBench: ``SD1_final.csv``, a list in text). An original lies in
the folder as ``INDEX.jpg``, or several as ``INDEX/*``, as in Wen et al.'s ``gt_images``; without an index as the first
16 hexadecimal digits of the URL's SHA-256. Nothing is downloaded here: what is missing is listed with its URL.
"""

from __future__ import annotations

import ast
import csv
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from afresh.errors import UserError
from afresh.files import write_atomic

IMAGES = (".jpg", ".jpeg", ".png", ".webp")


@dataclass(frozen=True)
class Listed:
    """One prompt of a list."""

    caption: str
    originals: tuple[Path, ...]
    """Those that are at hand."""
    missing: tuple[tuple[str, str], ...]
    """Of the others: the name that the folder lacks, without its suffix, and the URL (empty where none is given)."""


def read_list(path: str | Path, folder: str | Path) -> list[Listed]:
    """All prompts of a list, in order.

    Args:
        path: the list: ``.jsonl``, ``.csv`` or ``.parquet``.
        folder: of the originals.

    Raises:
        UserError: a file or folder is missing, or a row is of no known form; names it.
    """
    path, folder = Path(path), Path(folder)
    if not path.is_file():
        raise UserError(f"{path}: no such list of prompts")
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of originals")
    at_hand: dict[str, list[Path]] = {}
    for file in sorted(folder.iterdir()):
        if file.is_dir():
            at_hand[file.name] = sorted(one for one in file.iterdir() if one.suffix.lower() in IMAGES)
        elif file.suffix.lower() in IMAGES:
            at_hand.setdefault(file.stem, []).append(file)
    listed = [_listed(f"{path}: row {number}", row, at_hand) for number, row in enumerate(_rows(path), 1)]
    if not listed:
        raise UserError(f"{path}: holds no prompt")
    return listed


def name_of(url: str) -> str:
    """What the original at a URL is called in the folder, without its suffix."""
    return hashlib.sha256(url.encode()).hexdigest()[:16]


def write_missing(path: str | Path, listed: Sequence[Listed]) -> int:
    """A line ``name<TAB>URL<TAB>caption`` for every original that is not at hand, each once; how many there are."""
    lines: dict[str, str] = {}
    for one in listed:
        for name, url in one.missing:
            lines.setdefault(name, "\t".join([name, url, " ".join(one.caption.split())]))
    with write_atomic(path) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in lines.values()), encoding="utf-8")
    return len(lines)


def _listed(where: str, row: Mapping[str, Any], at_hand: Mapping[str, Sequence[Path]]) -> Listed:
    caption = row.get("caption") or row.get("prompt")
    if not isinstance(caption, str) or not caption.strip():
        raise UserError(f"{where}: neither caption nor prompt")
    urls = _urls(where, row)
    index = row.get("index")
    if index not in (None, ""):
        names = {str(index): urls[0] if urls else ""}
    elif urls:
        names = {name_of(url): url for url in urls}
    else:
        raise UserError(f"{where}: neither index nor url nor urls says which image is the original")
    found = [file for name in names for file in at_hand.get(name, ())]
    missing = [(name, url) for name, url in names.items() if not at_hand.get(name)]
    return Listed(caption.strip(), tuple(found), tuple(missing))


def _urls(where: str, row: Mapping[str, Any]) -> list[str]:
    value = row.get("urls") or row.get("url") or []
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            raise UserError(f"{where}: urls are no list: {value[:60]!r}") from None
    urls = [value] if isinstance(value, str) else list(value)
    if not all(isinstance(url, str) for url in urls):
        raise UserError(f"{where}: urls hold something else than text")
    return urls


def _rows(path: Path) -> Iterator[Mapping[str, Any]]:
    kind = path.suffix.lower()
    if kind == ".parquet":
        import pyarrow.parquet as parquet

        try:
            yield from parquet.read_table(path).to_pylist()
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: not a readable Parquet file ({error})") from None
        return
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            if kind == ".csv":
                yield from csv.DictReader(file)
            elif kind == ".jsonl":
                yield from (json.loads(line) for line in file if line.strip())
            else:
                raise UserError(f"{path}: a list of prompts ends in .jsonl, .csv or .parquet")
    except (UnicodeDecodeError, json.JSONDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
