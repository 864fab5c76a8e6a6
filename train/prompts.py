"""Prompt files: one prompt a line (``.txt``), or rows with a ``caption`` column (``.jsonl .csv .parquet``).

Optional columns: ``label`` (1 = known to be memorized, 0 = known not to be), ``image`` (path of the original,
relative to the file) and ``seed``.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from afresh.errors import UserError, printable, reason
from afresh.files import csv_rows, decode_text, text_lines, write_atomic

SUFFIXES = (".txt", ".jsonl", ".csv", ".parquet")


@dataclass(frozen=True)
class Prompt:
    """One prompt: its caption and what is known about it."""

    caption: str
    label: int | None = None
    """1 = known to be memorized, 0 = known not to be."""
    image: Path | None = None
    """The original image."""
    seed: int | None = None


def read_prompts(path: str | Path) -> list[Prompt]:
    """All prompts of a file, in order.

    Blank lines of a text file are left out; ``image`` paths are made relative to the file's folder. An empty
    caption in a table is an error rather than skipped, so that rows keep their numbers.

    Raises:
        UserError: the file is missing, empty, of another kind, or a row is wrong; names the file and the row.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"{path}: a prompt file ends in one of {' '.join(SUFFIXES)}")
    if not path.is_file():
        raise UserError(f"{path}: no such prompt file")
    prompts = [_prompt(path, number, row) for number, row in _rows(path)]
    if not prompts:
        raise UserError(f"{path}: holds no prompt")
    return prompts


def write_prompts(path: str | Path, prompts: Sequence[Prompt]) -> None:
    """Write prompts as ``.jsonl``, images relative to the file where they lie below its folder."""
    path = Path(path)
    if path.suffix.lower() != ".jsonl":
        raise ValueError(f"{path}: prompts are written as .jsonl")
    folder = path.parent.resolve()
    with write_atomic(path) as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as file:
        for prompt in prompts:
            row: dict[str, Any] = {"caption": prompt.caption, "label": prompt.label, "seed": prompt.seed}
            if prompt.image is not None:
                image = Path(prompt.image).resolve()
                row["image"] = (image.relative_to(folder) if image.is_relative_to(folder) else image).as_posix()
            row = {key: value for key, value in row.items() if value is not None}
            file.write(json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n")


def _rows(path: Path) -> Iterable[tuple[int, dict[str, Any]]]:
    """(number from 1, row) pairs; the number is the line of a text file and the row of a table."""
    kind = path.suffix.lower()
    if kind == ".txt":
        for number, line in enumerate(text_lines(_text(path)), 1):
            if line.strip():
                yield number, {"caption": line}
    elif kind == ".jsonl":
        for number, line in enumerate(text_lines(_text(path)), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}: line {number} is not JSON: {reason(error)}") from None
            if not isinstance(row, dict):
                raise UserError(f"{path}: line {number} is not a JSON object")
            yield number, row
    elif kind == ".csv":
        try:
            rows = list(csv_rows(io.StringIO(_text(path), newline="")))
        except ValueError as error:
            raise UserError(f"{path}: {error}") from None
        if rows and "caption" not in rows[0]:
            raise UserError(f"{path}: no column caption, only {printable(', '.join(rows[0]))}")
        yield from enumerate(rows, 1)
    else:
        import pyarrow
        import pyarrow.parquet as parquet

        try:
            table = parquet.read_table(path)
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{path}: not a readable Parquet file ({error})") from None
        if "caption" not in table.column_names:
            raise UserError(f"{path}: no column caption, only {printable(', '.join(table.column_names))}")
        yield from enumerate(table.to_pylist(), 1)


def _text(path: Path) -> str:
    try:
        return decode_text(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path}: not UTF-8 text: {error}") from None


def _prompt(path: Path, number: int, row: dict[str, Any]) -> Prompt:
    caption = row.get("caption")
    if "caption" not in row:
        there = printable(", ".join(row)) or "nothing"
        raise UserError(f"{path}: row {number} has no caption, only {there}: give what holds the prompts that name")
    if not isinstance(caption, str) or not caption.strip():
        raise UserError(f"{path}: row {number} has no caption")
    label = _integer(path, number, "label", row.get("label"))
    if label not in (None, 0, 1):
        raise UserError(f"{path}: row {number}: label is {row['label']!r}, expected 1 (memorized) or 0 (not)")
    seed = _integer(path, number, "seed", row.get("seed"))
    if seed is not None and seed < 0:
        raise UserError(f"{path}: row {number}: seed is {row['seed']!r}, expected a number from 0")
    image = row.get("image")
    if image is not None and not isinstance(image, str):
        raise UserError(f"{path}: row {number}: image is {image!r}, expected a path")
    return Prompt(caption.strip(), label, _image(path.parent, image) if image else None, seed)


def _image(folder: Path, name: str) -> Path:
    """The file that a table names, perhaps as Windows writes paths."""
    named = folder / name
    return named if "\\" not in name or named.exists() else folder / name.replace("\\", "/")


def _integer(path: Path, number: int, column: str, value: Any) -> int | None:
    """A whole number from whatever the format holds (CSV: text; Parquet with gaps: float)."""
    if value is None or value == "" or value != value:
        return None
    try:
        whole = int(float(value)) if isinstance(value, str) else int(value)
        if float(value) == whole:
            return whole
    except (TypeError, ValueError, OverflowError):
        pass
    raise UserError(f"{path}: row {number}: {column} is {value!r}, expected a whole number")

