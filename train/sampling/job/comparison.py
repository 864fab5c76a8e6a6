"""Several guidances side by side: the picture and the table of ``--compare``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train.prompts import Prompt
from train.sampling.config import SampleConfig
from train.sampling.job import pictures
from train.sampling.job.folder import Folder
from train.sampling.job.records import SAMPLES, highest, write_table


def write_comparison(
    config: SampleConfig, prompts: Sequence[Prompt], folders: Sequence[Folder], summaries: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """The picture and the table of all guidances, and their summaries side by side."""
    out = Path(config.out)
    columns = [column for column in SAMPLES if column != "file"]
    table = [
        {"file": f"{folder.config.guidance}/{row['file']}"} | {column: row.get(column) for column in columns}
        for folder in folders
        for row in folder.rows()
    ]
    write_table(out / "compare.parquet", table, SAMPLES)

    names = [folder.config.guidance for folder in folders]
    originals = any(prompt.image is not None for prompt in prompts)
    heads = [("training image", "")] if originals else []
    heads += [pictures.table_head(name, one) for name, one in zip(names, summaries, strict=True)]
    seeds = pictures.shown_seeds(len(prompts), config.seeds)
    rows = []
    for i, task in enumerate(folders[0].tasks):
        nth = i % config.seeds
        if nth >= seeds:
            continue
        cells = [pictures.Cell(task.prompt.image if nth == 0 else None)] if originals else []
        for folder in folders:
            record = folder.records[task]
            note, marked = pictures.similarity_note(highest(record))
            withheld = folder.image(task) is None
            cells.append(pictures.Cell(folder.image(task), note, marked and not withheld, withheld))
        rows.append(pictures.Row(task.prompt.caption, f"seed {task.seed}" if seeds > 1 else "", cells))
    legend = f"{config.steps} steps, guidance scale {config.scale:g}; in a row, all begin with one seed."
    if seeds < config.seeds:
        legend += f" The first {seeds} of {config.seeds} seeds." if seeds > 1 else " The first seed of each prompt."
    if config.index:
        legend += (
            " Below an image: similarity to its nearest training image, 0 for unrelated ones; red above 0.5, a copy."
        )
    pictures.draw_comparison(out / "compare.png", heads, rows, legend)
    return {
        "guidances": [
            {"guidance": name} | {key: value for key, value in one.items() if key not in ("made", "out")}
            for name, one in zip(names, summaries, strict=True)
        ],
        "made": sum(one["made"] for one in summaries),
        "picture": str(out / "compare.png"),
        "table": str(out / "compare.parquet"),
        "out": str(out),
    }

