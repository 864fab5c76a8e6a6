"""What the page says of a folder of runs: curves of fine-tunings as they go, tables and figures of what is finished."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from afresh.errors import UsageError, UserError
from afresh.files import files_in, read_json
from afresh.pages import facts
from curate.reading.images import ImageError, decode_image
from train.finetune.report import thinned

DEPTH, MOST_RUNS, MOST_FIGURES, MOST_BYTES = 4, 200, 12, 64 << 20
LOG_BYTES = 32 << 20
"""Of a log's end, of what is read."""


@dataclass(frozen=True)
class Run:
    """A folder with something to show."""

    name: str
    """Its path below the folder of runs."""
    path: Path


def find_runs(folder: Path) -> list[Run]:
    """The folders that hold a log, a table or a figure; links are not followed.

    Fine-tunings that are not finished come first, then tables, other fine-tunings, and what has figures alone; of each
    kind the one that changed last first.
    """
    found: list[tuple[int, float, Run]] = []
    for path, depth in _folders(folder, 0):
        files = _shown_files(path)
        if files:
            names = {one.name for one in files}
            going = "log.jsonl" in names and not (path / "summary.json").is_file()
            kind = 0 if going else 1 if "table.md" in names else 2 if "log.jsonl" in names else 3
            changed = max(one.stat().st_mtime for one in files)
            found.append((kind, -changed, Run(str(path.relative_to(folder)) if depth else ".", path)))
        if len(found) >= MOST_RUNS:
            break
    return [run for *_, run in sorted(found, key=lambda one: (one[0], one[1], one[2].name))]


def _folders(folder: Path, depth: int) -> Iterator[tuple[Path, int]]:
    yield folder, depth
    if depth < DEPTH:
        with os.scandir(folder) as entries:
            below = sorted(one.name for one in entries if one.is_dir(follow_symlinks=False) and one.name[0] != ".")
        for name in below:
            yield from _folders(folder / name, depth + 1)


def _shown_files(path: Path) -> list[Path]:
    names = [path / name for name in ("log.jsonl", "table.md") if (path / name).is_file()]
    return [*names, *_figures(path)]


def _figures(path: Path) -> list[Path]:
    """Pictures that jobs leave; folders of drawn images have those by the thousand, and a table of them."""
    if (path / "samples.parquet").is_file():
        names = [path / "grid.png", path / "compare.png"]
        return [one for one in names if one.is_file()]
    found = files_in(path, "*.png")
    return found if len(found) <= MOST_FIGURES else []


def chosen(folder: Path, name: str) -> Run:
    """The run of a name that :func:`find_runs` gave.

    Raises:
        UsageError: there is none.
    """
    for run in find_runs(folder):
        if run.name == name:
            return run
    raise UsageError("there is no such run in this folder any more")


def progress_of(run: Run) -> dict[str, Any] | None:
    """How a fine-tuning goes, from its log; None where there is no log.

    Returns:
        ``step`` of ``planned`` (None where the settings are not there), ``finished``; ``facts`` of the last line and
        the summary; the curves ``loss``, ``dropped`` (share of a step's samples) and ``magnitude`` (mean of those that
        were judged) as ``(step, value)``.
    """
    lines = log_lines(run.path / "log.jsonl")
    if lines is None:
        return None
    summary = _json(run.path / "summary.json")
    steps = _json(run.path / "run.json").get("steps")
    last = lines[-1] if lines else {}
    points = {
        "loss": [(line["step"], line["loss"]) for line in lines if _number(line.get("loss"))],
        "dropped": [
            (line["step"], line["dropped"] / max(line["dropped"] + line["kept"], 1))
            for line in lines
            if _number(line.get("dropped")) and _number(line.get("kept"))
        ],
        "magnitude": [(line["step"], line["magnitude"]) for line in lines if _number(line.get("magnitude"))],
    }
    names = ("loss", "learning_rate", "kept", "dropped", "judged", "samples_per_second", "skipped_steps")
    shown = {name: last[name] for name in names if name in last}
    return {
        "step": last.get("step", 0),
        "planned": steps if isinstance(steps, int) else None,
        "finished": bool(summary),
        "facts": facts(shown | {key: value for key, value in summary.items() if key not in shown}),
        **{name: thinned(some) for name, some in points.items()},
    }


def log_lines(path: Path) -> list[dict[str, Any]] | None:
    """The whole lines of a log that is perhaps being written, those of its last LOG_BYTES; None where there is none."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - LOG_BYTES))
            data = file.read(LOG_BYTES)
    except OSError:
        return None
    found = []
    for line in data.split(b"\n")[int(size > LOG_BYTES) : -1]:
        try:
            row = json.loads(line)
        except ValueError:  # a crash cut it short
            continue
        if isinstance(row, dict) and _number(row.get("step")):
            found.append(row)
    return found


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _json(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except UserError:
        return {}


def tables_of(run: Run) -> list[dict[str, Any]]:
    """The tables of ``table.md``: ``title``, ``head`` and ``rows`` of ``(text, bold)``; none where there is no file."""
    try:
        text = (run.path / "table.md").read_text(encoding="utf-8", errors="replace")[:1_000_000]
    except OSError:
        return []
    tables: list[dict[str, Any]] = []
    title = ""
    rows: list[list[tuple[str, bool]]] | None = None  # of the table that the lines are in
    for line in text.split("\n"):
        if not line.startswith("|"):
            title, rows = line.replace("*", "").strip() or title, None
            continue
        cells = [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line.strip())[1:-1]]
        if rows is None:
            rows = []
            tables.append({"title": title, "head": cells, "rows": rows})
        elif not all(re.fullmatch(r":?-+:?", cell) for cell in cells):
            rows.append([(cell.replace("**", ""), cell.startswith("**")) for cell in cells])
    return tables


def figures_of(run: Run) -> list[tuple[str, Image.Image]]:
    """The pictures of a run with their names; those that cannot be read are left out."""
    found = []
    for path in _figures(run.path):
        try:
            if path.stat().st_size <= MOST_BYTES:
                found.append((path.name, decode_image(path.read_bytes())))
        except (OSError, ImageError):
            continue
    return found


