"""``train sample``: images for a file of prompts, their record, and a grid to look at.

Each image is drawn from its own seed, so it does not depend on what it was batched with. The PNG itself
carries its record (prompt, seed, guidance, nearest training sample, trace): a run that was stopped goes on
from the files that are there, and ``samples.parquet`` can be written from them alone.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image, ImageDraw, PngImagePlugin

from curate.console import UsageError, UserError, get_logger, progress, to_json, write_atomic
from train.components import chosen_device, open_pipeline
from train.memorization.config import MEMORIZED
from train.memorization.neurons import blocked, read_neurons
from train.prompts import Prompt, read_prompts
from train.sampling import terms
from train.sampling.config import SampleConfig
from train.sampling.guidance import Guidance
from train.sampling.pipeline import GuidedOutput, GuidedStableDiffusion
from train.sampling.similarity import check_embedder, check_not_empty

if TYPE_CHECKING:
    from curate.embed import Embedder
    from curate.index import TrainingIndex

RECORD = "afresh"
"""PNG text key of the record; prompt, seed, guidance, nearest and similarity also stand under their own."""
GRID_PROMPTS, GRID_SEEDS, THUMBNAIL = 40, 8, 128

# Columns of samples.parquet; similarities are None without an index.
SAMPLES = {
    "file": "string",
    "prompt": "string",
    "number": "int64",
    "label": "int64",
    "seed": "int64",
    "drawn_seed": "int64",
    "tries": "int64",
    "guidance": "string",
    "steps": "int64",
    "scale": "float64",
    "steps_fired": "int64",
    "max_similarity": "float64",
    "magnitude": "float64",
    "similarity": "float64",
    "cosine": "float64",
    "nearest_row": "int64",
    "nearest_shard": "string",
    "nearest_key": "string",
    "nearest_caption": "string",
    "seconds": "float64",
}

log = get_logger(__name__)


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


def run_sample(config: SampleConfig) -> dict[str, Any]:
    """Draw what ``config`` asks for and is not there yet.

    Writes ``out/*.png``, ``out/samples.parquet`` (a row an image), ``out/trace.parquet`` (a row an image and
    step) and ``out/grid.png`` (rows = prompts, columns = seeds).

    Returns:
        ``images``; ``made`` by this call; ``seconds_per_image``; ``fired``, how many images guidance acted
        on; ``max_similarity`` to the nearest training sample and ``copies`` above 0.5 (None without an
        index); ``out``.

    Raises:
        UsageError: options that do not go together.
        UserError: an input is missing or does not fit; ``out`` holds images of other settings.
    """
    _check(config)
    prompts = read_prompts(config.prompts)
    tasks = [
        Task(number, prompt, (config.first_seed if prompt.seed is None else prompt.seed) + i)
        for number, prompt in enumerate(prompts)
        for i in range(config.seeds)
    ]
    out = Path(config.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: cannot write there ({error.strerror}): choose another --out") from error
    settings = _settings(config)
    records = {}
    for task in tasks:
        record = read_record(out / task.file)
        if record is not None:
            _check_same(out / task.file, task, record, settings)
            records[task.file] = record
    missing = [task for task in tasks if task.file not in records]
    if records:
        log.info(f"{out}: {len(records)} of {len(tasks)} images are there already")
    if missing:
        for task, image, record in _draw(config, missing):
            record["settings"] = settings
            _save(out / task.file, image, record)
            records[task.file] = record
    rows = [records[task.file] for task in tasks]
    _write_table(out / "samples.parquet", rows, SAMPLES)
    trace = [{"file": row["file"], **step} for row in rows for step in row["trace"]]
    _write_table(out / "trace.parquet", trace)
    _write_grid(out / "grid.png", out, tasks)
    similarities = [row["similarity"] for row in rows if row["similarity"] is not None]
    return {
        "images": len(rows),
        "made": len(missing),
        "seconds_per_image": sum(row["seconds"] for row in rows) / len(rows),
        "fired": sum(row["steps_fired"] > 0 for row in rows),
        "max_similarity": max(similarities, default=None),
        "copies": sum(s > MEMORIZED for s in similarities) if similarities else None,
        "out": str(out),
    }


def open_index(path: str, embedder: str = "") -> tuple[TrainingIndex, Embedder]:
    """A training-set index and the embedder that belongs to it.

    Args:
        path: the output folder of ``curate dedup``, or its ``index`` folder; or the URL of one.
        embedder: name or file; empty takes the index's own.

    Raises:
        UserError: no index there, an empty one, or it was built with another embedder.
    """
    from curate.embed import load_embedder
    from curate.index import TrainingIndex

    index = TrainingIndex.load(path)
    check_not_empty(index, path)
    if embedder:
        check_embedder(index, embedder)
    return index, load_embedder(embedder or index.embedder)


def read_record(path: Path) -> dict[str, Any] | None:
    """What a PNG written by this job says of itself; None if there is no such file, or it is not whole."""
    if not path.is_file():
        return None
    try:
        with Image.open(path) as image:
            image.load()
            return json.loads(image.text[RECORD]) if isinstance(image, PngImagePlugin.PngImageFile) else None
    except (OSError, SyntaxError, KeyError, ValueError, AttributeError):
        return None


def _check(config: SampleConfig) -> None:
    for option, least in (("seeds", 1), ("steps", 1), ("batch_size", 1), ("first_seed", 0)):
        if getattr(config, option) < least:
            raise UsageError(f"--{option} is {getattr(config, option)}: it is at least {least}")
    terms.check(config)
    if terms.needs_index(config.guidance) and not config.index:
        raise UsageError(f"--guidance {config.guidance} needs --index: the output folder of curate dedup")
    if config.embedder and not config.index:
        raise UsageError("--embedder needs --index")


def _settings(config: SampleConfig) -> str:
    """Digest of everything that decides an image but its prompt and seed: options, weights and index."""
    names = [
        "model",
        "guidance",
        "steps",
        "scale",
        "scheduler",
        "negative_prompt",
        "height",
        "width",
        "dtype",
    ]
    decisive: dict[str, Any] = {name: getattr(config, name) for name in names}
    decisive["model"] = [config.model, fingerprint(Path(config.model))]
    for name in ("revision", "variant", "model_config"):
        if getattr(config, name):
            decisive[name] = getattr(config, name)
    if config.lora:
        decisive["lora"] = [config.lora, fingerprint(Path(config.lora))]
    if config.index:
        from curate.index import index_folder

        decisive["index"] = fingerprint(index_folder(config.index))
    if config.neurons:
        decisive["neurons"] = [config.neurons_of, *read_neurons(config.neurons)]
    decisive["settings"] = terms.settings(config)
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:16]


def fingerprint(path: Path) -> str:
    """Of a file or folder: names, sizes, and both ends of each file (weights run to gigabytes)."""
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(path) if file != path else ''}\0{size}\0".encode())
        with open(file, "rb") as stream:
            digest.update(stream.read(1 << 20))
            stream.seek(max(0, size - (1 << 20)))
            digest.update(stream.read())
    return digest.hexdigest()


def _check_same(path: Path, task: Task, record: dict[str, Any], settings: str) -> None:
    if record["prompt"] != task.prompt.caption or record["seed"] != task.seed:
        raise UserError(f"{path}: drawn for another prompt or seed: choose another --out")
    if record["settings"] != settings:
        raise UserError(f"{path}: drawn with other settings: choose another --out, or remove the folder")


def _draw(config: SampleConfig, tasks: Sequence[Task]) -> Iterator[tuple[Task, Image.Image, dict[str, Any]]]:
    """Images and their records, batch by batch."""
    together, own = read_neurons(config.neurons) if config.neurons else ({}, {})
    if config.neurons and config.neurons_of == "own":
        for task in tasks:
            if task.prompt.caption not in own:
                raise UserError(f"{config.neurons}: has no neurons of {task.prompt.caption!r}: take --neurons_of all")
    index = embedder = None
    if config.index:
        index, embedder = open_index(config.index, config.embedder)
        if hasattr(embedder, "to"):
            embedder.to(chosen_device(config.device))
    guidance, rejection = terms.make(config, index, embedder)
    pipe = open_pipeline(config)
    pipe = GuidedStableDiffusion.from_pipe(pipe, **_scheduler(config, pipe))
    pipe.set_progress_bar_config(disable=True)

    with progress(total=len(tasks), desc="sampling", unit="images") as bar:
        for batch in _batches(config, tasks):
            began = time.perf_counter()
            neurons = own[batch[0].prompt.caption] if config.neurons_of == "own" and own else together
            draw = partial(_pipe, pipe, config, batch, guidance)
            seeds = [task.seed for task in batch]
            with blocked(pipe, neurons) if config.neurons else nullcontext():
                if rejection is None:
                    output = draw(list(range(len(batch))), seeds)
                    images, traces, tries = output.images, output.trace, [1] * len(batch)
                else:
                    accepted = rejection(draw, seeds)
                    images, tries = [one.image for one in accepted], [one.tries for one in accepted]
                    traces, seeds = [row for one in accepted for row in one.trace], [one.seed for one in accepted]
            seconds = (time.perf_counter() - began) / len(batch)
            nearest = _nearest(index, embedder, images)
            for i, (task, image) in enumerate(zip(batch, images, strict=True)):
                steps = [{k: v for k, v in row.items() if k != "image"} for row in traces if row["image"] == i]
                record = _record(config, task, steps, seconds, nearest[i])
                yield task, image, {**record, "tries": tries[i], "drawn_seed": seeds[i]}
            bar.update(len(batch))


def _batches(config: SampleConfig, tasks: Sequence[Task]) -> Iterator[Sequence[Task]]:
    """What is drawn together; of one prompt only, where each prompt has neurons of its own blocked."""
    groups: list[list[Task]] = [list(tasks)]
    if config.neurons and config.neurons_of == "own":
        groups = [list(group) for _, group in groupby(tasks, key=lambda task: task.prompt.caption)]
    for group in groups:
        for start in range(0, len(group), config.batch_size):
            yield group[start : start + config.batch_size]


def _pipe(
    pipe: GuidedStableDiffusion,
    config: SampleConfig,
    batch: Sequence[Task],
    guidance: Sequence[Guidance],
    rows: list[int],
    seeds: list[int],
) -> GuidedOutput:
    """Some images of a batch, from their seeds."""
    output = pipe(
        [batch[row].prompt.caption for row in rows],
        negative_prompt=[config.negative_prompt] * len(rows),
        num_inference_steps=config.steps,
        guidance_scale=config.scale,
        height=config.height or None,
        width=config.width or None,
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        guidance=guidance,
    )
    assert isinstance(output, GuidedOutput)
    return output


def _scheduler(config: SampleConfig, pipe: Any) -> dict[str, Any]:
    if not config.scheduler:
        return {}
    import diffusers

    kind: Any = getattr(diffusers, config.scheduler, None)
    if not hasattr(kind, "from_config") or not issubclass(kind, diffusers.SchedulerMixin):
        raise UsageError(f"--scheduler {config.scheduler}: not a diffusers scheduler class")
    return {"scheduler": kind.from_config(pipe.scheduler.config)}


def _nearest(
    index: TrainingIndex | None, embedder: Embedder | None, images: Sequence[Image.Image]
) -> list[dict[str, Any]]:
    """Of each finished image: its nearest training sample and the similarity to it."""
    if index is None or embedder is None:
        names = ("similarity", "cosine", "nearest_row", "nearest_shard", "nearest_key", "nearest_caption")
        return [dict.fromkeys(names) for _ in images]
    cosine, rows = index.search(embedder.embed(images), 1)
    sigma = index.calibrate(cosine[:, 0])
    return [
        {
            "similarity": float(s),
            "cosine": float(c),
            "nearest_row": row,
            "nearest_shard": str(index.shards[row]),
            "nearest_key": str(index.keys[row]),
            "nearest_caption": index.captions[row],
        }
        for s, c, row in zip(sigma, cosine[:, 0], rows[:, 0].tolist(), strict=True)
    ]


def _record(
    config: SampleConfig, task: Task, trace: list[dict[str, Any]], seconds: float, nearest: dict[str, Any]
) -> dict[str, Any]:
    watched = [row["similarity"] for row in trace if row.get("similarity") is not None]
    record = {
        "file": task.file,
        "prompt": task.prompt.caption,
        "number": task.number,
        "label": task.prompt.label,
        "seed": task.seed,
        "guidance": config.guidance,
        "steps": config.steps,
        "scale": config.scale,
        "steps_fired": sum(bool(row["fired"]) for row in trace),
        "max_similarity": max(watched, default=None),
        "magnitude": trace[0]["magnitude"] if trace else None,
        "seconds": seconds,
        **nearest,
        "trace": trace,
    }
    return to_json(record)


def _save(path: Path, image: Image.Image, record: dict[str, Any]) -> None:
    info = PngImagePlugin.PngInfo()
    for name in ("prompt", "seed", "guidance"):
        info.add_itxt(name, str(record[name]))
    if record["similarity"] is not None:
        info.add_itxt("nearest", f"{record['nearest_shard']}/{record['nearest_key']}")
        info.add_itxt("similarity", f"{record['similarity']:.4f}")
    info.add_itxt(RECORD, json.dumps(record, ensure_ascii=False, sort_keys=True), zip=True)
    with write_atomic(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)


def _write_table(path: Path, rows: list[dict[str, Any]], types: dict[str, str] | None = None) -> None:
    """Columns of the given types, or else all that any row has, of the types that their values show."""
    import pyarrow
    import pyarrow.parquet

    names = list(types) if types else list(dict.fromkeys(name for row in rows for name in row))
    columns = {name: pyarrow.array([row.get(name) for row in rows], types[name] if types else None) for name in names}
    table = pyarrow.table(columns)
    with write_atomic(path) as temporary:
        pyarrow.parquet.write_table(table, temporary)


def _write_grid(path: Path, folder: Path, tasks: Sequence[Task]) -> None:
    """Prompts down, seeds across; the first of each where there are many."""
    rows: dict[int, list[Task]] = {}
    for task in tasks:
        rows.setdefault(task.number, []).append(task)
    shown = [row[:GRID_SEEDS] for row in list(rows.values())[:GRID_PROMPTS]]
    label, gap = 200, 4
    side = THUMBNAIL + gap
    grid = Image.new("RGB", (label + side * max(map(len, shown)), side * len(shown)), "white")
    draw = ImageDraw.Draw(grid)
    for y, row in enumerate(shown):
        draw.multiline_text((gap, y * side + gap), _wrapped(row[0].prompt.caption, 32, 8), fill="black")
        for x, task in enumerate(row):
            with Image.open(folder / task.file) as image:
                thumbnail = image.convert("RGB")
            scale = THUMBNAIL / max(thumbnail.size)
            size = [max(1, round(length * scale)) for length in thumbnail.size]
            grid.paste(thumbnail.resize(size, Image.Resampling.LANCZOS), (label + x * side, y * side))
    with write_atomic(path) as temporary:
        grid.save(temporary, format="PNG")


def _wrapped(text: str, width: int, lines: int) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, width, max_lines=lines, placeholder=" …"))
