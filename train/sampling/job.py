"""``train sample``: images for a file of prompts, their record, and pictures to look at.

Each image is drawn from its own seed, so it does not depend on what it was batched with. The PNG itself
carries its record (prompt, seed, guidance, nearest training sample, trace): a run that was stopped goes on
from the files that are there, and ``samples.parquet`` can be written from them alone. Several processes share the
images out and meet in the files too (:mod:`train.sampling.shares`).
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from curate.console import UsageError, UserError, get_logger, is_main_process, progress, to_json
from train.components import chosen_device, open_pipeline
from train.memorization.neurons import blocked, read_neurons
from train.memorization.thresholds import Thresholds, model_thresholds
from train.prompts import Prompt, read_prompts
from train.sampling import picture, shares, terms
from train.sampling.config import SampleConfig
from train.sampling.guidance import Guidance
from train.sampling.pipeline import GuidedOutput, GuidedStableDiffusion
from train.sampling.records import (
    SAMPLES,
    Task,
    check_same,
    read_record,
    save_record,
    summarise,
    write_table,
)
from train.sampling.rejection import Accepted, NeverAbove, Rejection, unjudged
from train.sampling.similarity import check_embedder, check_not_empty

if TYPE_CHECKING:
    from curate.embed import Embedder
    from curate.index import TrainingIndex

log = get_logger(__name__)


def run_sample(config: SampleConfig) -> dict[str, Any]:
    """Draw what ``config`` asks for and is not there yet.

    Writes ``out/*.png``, ``out/samples.parquet`` (a row an image), ``out/trace.parquet`` (a row an image and
    step) and ``out/grid.png`` (rows = prompts, columns = seeds). With ``compare``, all of these into ``out/NAME`` for
    each guidance, and ``out/compare.png`` and ``out/compare.parquet`` (a row an image and guidance).

    Of several processes each draws its share; the first waits for the others and writes tables and pictures.

    Returns:
        What :func:`~train.sampling.records.summarise` counts, ``made``: images that this call drew or withheld, and
        ``out``. With ``compare`` instead ``guidances``, a list of one such summary a guidance, ``made``, ``picture``,
        ``table`` and ``out``. Of a run that ``launch.sh`` was asked to stop, ``made``, ``stopped`` and ``out``. Empty
        in all processes but the first.

    Raises:
        UsageError: options that do not go together.
        UserError: an input is missing or does not fit; ``out`` holds images of other settings; another process stopped
            writing.
    """
    compared = bool(config.compare)
    if compared and config.guidance != "none":
        raise UsageError("--compare names the guidances: leave --guidance out, or put it among them")
    if len(set(config.compare)) < len(config.compare):
        raise UsageError(f"--compare {','.join(config.compare)}: a guidance stands twice")
    configs = [config]
    if compared:
        names = [name or "none" for name in config.compare]
        configs = [replace(config, guidance=n, out=str(Path(config.out) / n), compare=[]) for n in names]
    for one in configs:
        _check(one)
    prompts = read_prompts(config.prompts)
    for prompt in prompts:
        if compared and prompt.image is not None and not prompt.image.is_file():
            raise UserError(f"{prompt.image}: the training image of {prompt.caption!r} is missing")
    opened = Opened(config, prompts)
    folders = [Folder.begin(one, prompts) for one in configs]
    for folder in folders:
        folder.draw(opened)
    rank, _ = shares.process()
    if rank:
        return {}
    for folder in folders:
        folder.collect()
    if any(folder.pending for folder in folders):
        log.info("stopped; the same command goes on from there")
        return {"made": sum(folder.made for folder in folders), "stopped": True, "out": config.out}
    for folder in folders:
        folder.write()
    summaries = [folder.summary() for folder in folders]
    if not compared:
        return summaries[0]
    return _write_comparison(config, prompts, folders, summaries)


@dataclass
class Folder:
    """The images of one guidance: what is there, and what is to be drawn."""

    config: SampleConfig
    settings: str
    tasks: list[Task]
    records: dict[Task, dict[str, Any]] = field(default_factory=dict)
    made: int = 0
    slowest: float = 0.0
    """Seconds that this process's longest batch took."""

    @classmethod
    def begin(cls, config: SampleConfig, prompts: Sequence[Prompt]) -> Folder:
        """See what the folder holds already.

        Raises:
            UserError: it cannot be written, or holds images of other settings.
        """
        tasks = [
            Task(number, prompt, (config.first_seed if prompt.seed is None else prompt.seed) + i)
            for number, prompt in enumerate(prompts)
            for i in range(config.seeds)
        ]
        folder = cls(config, _settings(config), tasks)
        try:
            folder.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{folder.path}: cannot write there ({error.strerror}): choose another --out") from error
        folder._read(tasks)
        if folder.records:
            log.info(f"{folder.path}: {len(folder.records)} of {len(tasks)} images are there already")
        return folder

    @property
    def path(self) -> Path:
        """Of the folder."""
        return Path(self.config.out)

    @property
    def pending(self) -> list[Task]:
        """What is missing."""
        return [task for task in self.tasks if task not in self.records]

    def _read(self, tasks: Sequence[Task]) -> None:
        for task in tasks:
            record = read_record(self.path, task)
            if record is not None:
                check_same(self.path, task, record, self.settings)
                self.records[task] = record

    def draw(self, opened: Opened) -> None:
        """Draw what is missing of this process's share, until that is done or the processes are asked to stop."""
        before = len(self.pending)
        # Shares are of all images, not of those missing: another process may have begun to write by now.
        mine = [task for batch in shares.share(list(_batches(self.config, self.tasks))) for task in batch]
        missing = [task for task in mine if task not in self.records]
        if missing:
            for task, image, record in _draw(self.config, opened, missing):
                record = to_json(record | {"settings": self.settings})
                save_record(self.path, task, image, record)
                self.records[task] = record
                self.slowest = max(self.slowest, record["seconds"] * self.config.batch_size)
        self.made = before  # by all processes, once all are done

    def collect(self) -> None:
        """Wait for what the other processes draw.

        Raises:
            UserError: they have stopped writing.
        """

        def missing() -> int:
            self._read(self.pending)
            return len(self.pending)

        if shares.process()[1] > 1:
            shares.wait_for(missing, max(shares.PATIENCE, 10 * self.slowest))
        self.made -= len(self.pending)

    def rows(self) -> list[dict[str, Any]]:
        """The records, in order."""
        return [self.records[task] for task in self.tasks]

    def write(self) -> None:
        """The tables and the grid, from the records alone."""
        rows = self.rows()
        write_table(self.path / "samples.parquet", rows, SAMPLES)
        trace = [{"file": row["file"], **step} for row in rows for step in row["trace"]]
        write_table(self.path / "trace.parquet", trace)
        lines = [list(group) for _, group in groupby(self.tasks, key=lambda task: task.number)]
        grid = [(line[0].prompt.caption, [self.image(task) for task in line]) for line in lines]
        picture.draw_grid(self.path / "grid.png", grid)

    def image(self, task: Task) -> Path | None:
        """The file of an image; None if it is withheld."""
        return None if self.records[task].get("withheld") else self.path / task.file

    def summary(self) -> dict[str, Any]:
        """See :func:`run_sample`."""
        return {**summarise(self.rows()), "made": self.made, "out": str(self.path)}


class Opened:
    """The model, the index and what else belongs to them, opened when the first image is to be drawn, and once."""

    def __init__(self, config: SampleConfig, prompts: Sequence[Prompt]) -> None:
        self.config, self.prompts = config, prompts

    @cached_property
    def pipe(self) -> GuidedStableDiffusion:
        """The guided pipeline; says which prompts are too long for it."""
        pipe = open_pipeline(self.config)
        guided = GuidedStableDiffusion.from_pipe(pipe, **_scheduler(self.config, pipe))
        guided.set_progress_bar_config(disable=True)
        _say_what_is_cut(guided.tokenizer, self.prompts)
        return guided

    @cached_property
    def index(self) -> tuple[TrainingIndex, Embedder] | tuple[None, None]:
        """The training set, and its embedder on the job's device."""
        return self._open(self.config.index, self.config.embedder) if self.config.index else (None, None)

    @cached_property
    def judges(self) -> list[tuple[Any, Any]]:
        """A second index, if one is to judge too."""
        return [self._open(self.config.judge_index, "")] if self.config.judge_index else []

    @cached_property
    def thresholds(self) -> Thresholds | None:
        """The model's calibrated ones."""
        return model_thresholds(self.config.model)

    @cached_property
    def elements(self) -> int:
        """Numbers in an image's latents."""
        unet, factor = self.pipe.unet.config, self.pipe.vae_scale_factor
        own = (unet.sample_size,) * 2 if isinstance(unet.sample_size, int) else tuple(unet.sample_size)
        given = (self.config.height, self.config.width)
        sides = tuple(length // factor for length in given) if all(given) else own
        return unet.in_channels * sides[0] * sides[1]

    def _open(self, path: str, name: str) -> tuple[TrainingIndex, Embedder]:
        index, embedder = open_index(path, name)
        if hasattr(embedder, "to"):
            embedder.to(chosen_device(self.config.device))
        return index, embedder


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


def _check(config: SampleConfig) -> None:
    for option, least in (("seeds", 1), ("steps", 1), ("batch_size", 1), ("first_seed", 0), ("tries", 1)):
        if getattr(config, option) < least:
            raise UsageError(f"--{option} is {getattr(config, option)}: it is at least {least}")
    terms.check(config)
    terms.automatic(config)
    if terms.needs_index(config.guidance) and not config.index:
        raise UsageError(f"--guidance {config.guidance} needs --index: the output folder of curate dedup")
    if config.embedder and not config.index:
        raise UsageError("--embedder needs --index")
    if config.never_above is not None and not config.index:
        raise UsageError("--never_above needs --index: the output folder of curate dedup")
    if config.never_above is not None and not -1 <= config.never_above <= 1:
        raise UsageError(f"--never_above is {config.never_above}: similarities lie between -1 and 1")
    if config.judge_index and config.never_above is None:
        raise UsageError("--judge_index is of --never_above: give that too")


def _settings(config: SampleConfig) -> str:
    """Digest of everything that decides an image but its prompt and seed: options, weights and index."""
    from curate.index import index_folder

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
        decisive["index"] = fingerprint(index_folder(config.index))
    if config.never_above is not None:
        decisive["never_above"] = [config.never_above, config.tries]
        if config.judge_index:
            decisive["judge_index"] = fingerprint(index_folder(config.judge_index))
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


def _draw(
    config: SampleConfig, opened: Opened, tasks: Sequence[Task]
) -> Iterator[tuple[Task, Image.Image | None, dict[str, Any]]]:
    """Images and their records, batch by batch; no image where it is withheld."""
    together, own = read_neurons(config.neurons) if config.neurons else ({}, {})
    if config.neurons and config.neurons_of == "own":
        for task in tasks:
            if task.prompt.caption not in own:
                raise UserError(f"{config.neurons}: has no neurons of {task.prompt.caption!r}: take --neurons_of all")
    index, embedder = opened.index
    pipe = opened.pipe
    config = _with_numbers(config, opened)
    guidance, rejection = terms.make(config, index, embedder)
    never = None
    if config.never_above is not None:
        assert index is not None  # _check saw to it
        never = NeverAbove(
            index, embedder, limit=config.never_above, tries=config.tries, amg=config.amg, judges=opened.judges
        )

    with progress(total=len(tasks), desc=f"sampling, {config.guidance}", unit="images") as bar:
        for batch in _batches(config, tasks):
            if shares.stop_asked():
                return
            began = time.perf_counter()
            neurons = own[batch[0].prompt.caption] if config.neurons_of == "own" and own else together
            with blocked(pipe, neurons) if config.neurons else nullcontext():
                drawn = _draw_batch(pipe, config, batch, guidance, rejection, never)
            seconds = (time.perf_counter() - began) / len(batch)
            images = [one.image for one in drawn if not one.withheld]
            nearest = iter(_nearest(index, embedder, images) if images else [])
            for task, one in zip(batch, drawn, strict=True):
                found = dict.fromkeys(NEAREST) if one.withheld else next(nearest)
                if one.similarities:  # as they were judged, to the last bit
                    found["similarity"] = one.similarities[0]
                    found["judge_similarity"] = one.similarities[1] if len(one.similarities) > 1 else None
                yield task, one.image, _record(config, opened, task, one, seconds, found)
            bar.update(len(batch))


def _draw_batch(
    pipe: GuidedStableDiffusion,
    config: SampleConfig,
    batch: Sequence[Task],
    guidance: Sequence[Guidance],
    rejection: Rejection | None,
    never: NeverAbove | None,
) -> list[Accepted]:
    """The images of a batch, each from its seed, and again as rejection and the guarantee ask for."""

    def draw(rows: list[int], seeds: list[int], guidance: Sequence[Guidance]) -> Any:
        def pipeline(some: list[int], seeds: list[int]) -> GuidedOutput:
            return _pipe(pipe, config, [batch[rows[i]].prompt.caption for i in some], seeds, guidance)

        return rejection(pipeline, seeds) if rejection else pipeline(list(range(len(rows))), seeds)

    seeds = [task.seed for task in batch]
    if never is not None:
        return never(draw, seeds, guidance)
    output = draw(list(range(len(batch))), seeds, guidance)
    if rejection:
        return output
    return unjudged(output, seeds)


def _pipe(
    pipe: GuidedStableDiffusion,
    config: SampleConfig,
    prompts: list[str],
    seeds: list[int],
    guidance: Sequence[Guidance],
) -> GuidedOutput:
    output = pipe(
        prompts,
        negative_prompt=[config.negative_prompt] * len(prompts),
        num_inference_steps=config.steps,
        guidance_scale=config.scale,
        height=config.height or None,
        width=config.width or None,
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        guidance=guidance,
    )
    assert isinstance(output, GuidedOutput)
    return output


def _with_numbers(config: SampleConfig, opened: Opened) -> SampleConfig:
    """``config`` with the model's threshold at the first timestep in the place of ``auto``."""
    if not terms.automatic(config):
        return config
    scheduler = opened.pipe.scheduler
    scheduler.set_timesteps(config.steps)
    t = float(scheduler.timesteps[0])
    return terms.with_thresholds(config, opened.thresholds, t, scheduler.config.num_train_timesteps)


def _say_what_is_cut(tokenizer: Any, prompts: Sequence[Prompt]) -> None:
    """Warn, once, of prompts with more tokens than the tokenizer's limit."""
    limit = tokenizer.model_max_length
    captions = dict.fromkeys(prompt.caption for prompt in prompts)
    counts = {caption: len(tokenizer(caption).input_ids) for caption in captions}
    long = [caption for caption, count in counts.items() if count > limit]
    if long and is_main_process():
        log.warning(
            f"{len(long)} of {len(captions)} prompts are longer than the {limit} tokens that the model reads, and are "
            f"cut there; the first, of {counts[long[0]]} tokens: {long[0]!r}"
        )


def _batches(config: SampleConfig, tasks: Sequence[Task]) -> Iterator[Sequence[Task]]:
    """What is drawn together; of one prompt only, where each prompt has neurons of its own blocked."""
    groups: list[list[Task]] = [list(tasks)]
    if config.neurons and config.neurons_of == "own":
        groups = [list(group) for _, group in groupby(tasks, key=lambda task: task.prompt.caption)]
    for group in groups:
        for start in range(0, len(group), config.batch_size):
            yield group[start : start + config.batch_size]


def _scheduler(config: SampleConfig, pipe: Any) -> dict[str, Any]:
    if not config.scheduler:
        return {}
    import diffusers

    kind: Any = getattr(diffusers, config.scheduler, None)
    if not hasattr(kind, "from_config") or not issubclass(kind, diffusers.SchedulerMixin):
        raise UsageError(f"--scheduler {config.scheduler}: not a diffusers scheduler class")
    return {"scheduler": kind.from_config(pipe.scheduler.config)}


NEAREST = ("similarity", "cosine", "nearest_row", "nearest_shard", "nearest_key", "nearest_caption")


def _nearest(
    index: TrainingIndex | None, embedder: Embedder | None, images: Sequence[Image.Image]
) -> list[dict[str, Any]]:
    """Of each finished image: its nearest training sample and the similarity to it."""
    if index is None or embedder is None:
        return [dict.fromkeys(NEAREST) for _ in images]
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
    config: SampleConfig, opened: Opened, task: Task, one: Accepted, seconds: float, nearest: dict[str, Any]
) -> dict[str, Any]:
    """What is written of an image."""
    trace = [{name: value for name, value in row.items() if name != "image"} for row in one.trace]
    trace = [row | {"memorized": _memorized(row, opened)} for row in trace]
    watched = [row["similarity"] for row in trace if row.get("similarity") is not None]
    return {
        "file": task.file,
        "prompt": task.prompt.caption,
        "number": task.number,
        "label": task.prompt.label,
        "seed": task.seed,
        "drawn_seed": one.seed,
        "tries": one.tries,
        "strength": one.strength,
        "withheld": one.withheld,
        "guidance": config.guidance,
        "steps": config.steps,
        "scale": config.scale,
        "steps_fired": sum(bool(row["fired"]) for row in trace),
        "max_similarity": max(watched, default=None),
        "magnitude": trace[0]["magnitude"] if trace else None,
        "memorized": trace[0]["memorized"] if trace else None,
        "seconds": seconds,
        **nearest,
        "trace": trace,
    }


def _memorized(row: dict[str, Any], opened: Opened) -> bool | None:
    """Whether the magnitude of a step reaches the model's calibrated threshold; None where there is no such."""
    pipe, thresholds, m = opened.pipe, opened.thresholds, row["magnitude"]
    limit = None if thresholds is None else thresholds.at(row["t"], pipe.scheduler.config.num_train_timesteps)
    if limit is None or m is None:
        return None
    if thresholds.form == "rms":  # type: ignore[union-attr]
        m = m / opened.elements**0.5
    return m >= limit


def _write_comparison(
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
    heads += [picture.table_head(name, one) for name, one in zip(names, summaries, strict=True)]
    seeds = picture.shown_seeds(len(prompts), config.seeds)
    rows = []
    for i, task in enumerate(folders[0].tasks):
        nth = i % config.seeds
        if nth >= seeds:
            continue
        cells = [picture.Cell(task.prompt.image if nth == 0 else None)] if originals else []
        for folder in folders:
            record = folder.records[task]
            note, marked = picture.similarity_note(record["similarity"])
            withheld = folder.image(task) is None
            cells.append(picture.Cell(folder.image(task), note, marked and not withheld, withheld))
        rows.append(picture.Row(task.prompt.caption, f"seed {task.seed}" if seeds > 1 else "", cells))
    legend = f"{config.steps} steps, guidance scale {config.scale:g}; in a row, all begin with one seed."
    if seeds < config.seeds:
        legend += f" The first {seeds} of {config.seeds} seeds." if seeds > 1 else " The first seed of each prompt."
    if config.index:
        legend += (
            " Below an image: similarity to its nearest training image, 0 for unrelated ones; red above 0.5, a copy."
        )
    picture.draw_comparison(out / "compare.png", heads, rows, legend)
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
