"""What ``train sample`` writes of each image: a PNG that carries its record, and tables made from the records alone.

A withheld image has no PNG; its record stands beside the others in a JSON file. So a run that was stopped goes on from
the files that are there, and several processes meet in them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from afresh.errors import UserError
from afresh.files import write_atomic, write_json
from train.memorization.config import MEMORIZED
from train.memorization.neurons.files import read_neurons
from train.prompts import Prompt
from train.sampling.config import SampleConfig

RECORD = "afresh"
"""PNG text key of the record; prompt, seed, guidance, nearest and similarity also stand under their own."""
# Columns of samples.parquet. Similarities are None without an index.
SAMPLES = {
    "file": "string",
    "prompt": "string",
    "number": "int64",
    "label": "int64",
    "seed": "int64",
    "drawn_seed": "int64",
    "tries": "int64",
    "strength": "int64",
    "withheld": "bool",
    "guidance": "string",
    "steps": "int64",
    "scale": "float64",
    "steps_fired": "int64",
    "max_similarity": "float64",
    "magnitude": "float64",
    "memorized": "bool",
    "similarity": "float64",
    "judge_similarity": "float64",
    "highest": "float64",
    "judged_by": "string",
    "cosine": "float64",
    "nearest_row": "int64",
    "nearest_shard": "string",
    "nearest_key": "string",
    "nearest_caption": "string",
    "seconds": "float64",
}


@dataclass(frozen=True)
class Task:
    """One image to draw."""

    number: int
    """Of the prompt, in the file, from 0."""
    prompt: Prompt
    seed: int

    @property
    def file(self) -> str:
        """``00007-grinning-face-s3.png``."""
        slug = re.sub(r"[^a-z0-9]+", "-", self.prompt.caption.lower()).strip("-")[:40].rstrip("-")
        return f"{self.number:05d}-{slug or 'prompt'}-s{self.seed}.png"

    @property
    def withheld_file(self) -> str:
        """``00007-grinning-face-s3.withheld.json``, which stands for the image where it is withheld."""
        return self.file.removesuffix(".png") + ".withheld.json"


def read_record(folder: Path, task: Task) -> dict[str, Any] | None:
    """What became of an image, by its PNG or by what was written in its place; None if there is neither, whole."""
    withheld = folder / task.withheld_file
    try:
        with Image.open(folder / task.file) as image:
            image.load()
            return json.loads(image.text[RECORD]) if isinstance(image, PngImagePlugin.PngImageFile) else None
    except FileNotFoundError:
        pass
    except (OSError, SyntaxError, KeyError, ValueError, AttributeError):
        return None
    try:
        return json.loads(withheld.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def save_record(folder: Path, task: Task, image: Image.Image | None, record: dict[str, Any]) -> None:
    """Write an image with its record; the record alone where the image is withheld."""
    if image is None:
        write_json(folder / task.withheld_file, record)
        return
    info = PngImagePlugin.PngInfo()
    for name in ("prompt", "seed", "guidance"):
        info.add_itxt(name, str(record[name]))
    if record["similarity"] is not None:
        info.add_itxt("nearest", f"{record['nearest_shard']}/{record['nearest_key']}")
        info.add_itxt("similarity", f"{record['similarity']:.4f}")
    info.add_itxt(RECORD, json.dumps(record, ensure_ascii=False, sort_keys=True), zip=True)
    with write_atomic(folder / task.file) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)


def check_same(folder: Path, task: Task, record: dict[str, Any], settings: str) -> None:
    """Refuse the record of another prompt, seed or digest of settings.

    Raises:
        UserError: names the file.
    """
    path = folder / (task.withheld_file if record.get("withheld") else task.file)
    if record["prompt"] != task.prompt.caption or record["seed"] != task.seed:
        raise UserError(f"{path}: drawn for another prompt or seed: choose another --out")
    if record["settings"] != settings:
        raise UserError(f"{path}: drawn with other settings: choose another --out, or remove the folder")


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Counts and costs of the images of one guidance.

    Returns:
        ``images`` that were written; ``similarity`` to the nearest training sample, their mean, ``max_similarity``, and
        ``copies`` above 0.5 by the highest of the index and its views (None without an index); ``fired``, how many
        guidance acted on; ``flagged``, how many the calibrated threshold calls memorized at their first step (None
        without one); ``redrawn``, images drawn more than once; ``withheld``; ``drawings_per_image`` and
        ``seconds_per_image``: all drawings, by the images written.
    """
    kept = [row for row in rows if not row.get("withheld")]
    by_any = [one for row in kept if (one := highest(row)) is not None]
    similarities = [row["similarity"] for row in kept if row["similarity"] is not None]
    judged = [row["memorized"] for row in rows if row.get("memorized") is not None]
    return {
        "images": len(kept),
        "similarity": sum(similarities) / len(similarities) if similarities else None,
        "max_similarity": max(similarities, default=None),
        "copies": sum(s > MEMORIZED for s in by_any) if by_any else None,
        "fired": sum(row["steps_fired"] > 0 for row in kept),
        "flagged": sum(judged) if judged else None,
        "redrawn": sum(row["tries"] > 1 for row in rows),
        "withheld": len(rows) - len(kept),
        "drawings_per_image": sum(row["tries"] for row in rows) / len(kept) if kept else None,
        "seconds_per_image": sum(row["seconds"] for row in rows) / len(kept) if kept else None,
    }


def highest(record: dict[str, Any]) -> float | None:
    """The similarity of an image to its nearest training image by the highest of the index and its views."""
    return record["similarity"] if record.get("highest") is None else record["highest"]


def write_table(path: Path, rows: list[dict[str, Any]], types: dict[str, str] | None = None) -> None:
    """Columns of the given types, or else all that any row has, of the types that their values show."""
    import pyarrow
    import pyarrow.parquet

    names = list(types) if types else list(dict.fromkeys(name for row in rows for name in row))
    columns = {name: pyarrow.array([row.get(name) for row in rows], types[name] if types else None) for name in names}
    table = pyarrow.table(columns)
    with write_atomic(path) as temporary:
        pyarrow.parquet.write_table(table, temporary)


def batches(config: SampleConfig, tasks: Sequence[Task]) -> Iterator[Sequence[Task]]:
    """What is drawn together; of one prompt only, where each prompt has neurons of its own blocked."""
    groups: list[list[Task]] = [list(tasks)]
    if config.neurons and config.neurons_of != "all":
        own = read_neurons(config.neurons)[1]
        captions = [task.prompt.caption for task in tasks]
        keys = iter([caption if caption in own else None for caption in captions])
        groups = [list(group) for _, group in groupby(tasks, key=lambda _: next(keys))]
    for group in groups:
        for start in range(0, len(group), config.batch_size):
            yield group[start : start + config.batch_size]
