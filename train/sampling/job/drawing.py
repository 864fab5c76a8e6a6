"""Images of one guidance with their records, batch by batch."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from afresh.errors import UserError
from afresh.progress import Progress, progress
from train.memorization.neurons.blocking import blocked
from train.memorization.neurons.files import read_neurons
from train.sampling.config import SampleConfig
from train.sampling.guidance import Guidance
from train.sampling.job import shares
from train.sampling.job.records import Task, batches
from train.sampling.pipelines.session import NEAREST, Opened
from train.sampling.pipelines.stable_diffusion import GuidedOutput
from train.sampling.terms import registry
from train.sampling.terms.judges import Judges
from train.sampling.terms.rejection import Accepted, NeverAbove, Rejection, unjudged

if TYPE_CHECKING:
    from curate.embed.protocol import Embedder
    from curate.index.training_index import TrainingIndex


def draw_images(
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
    guidance, rejection = registry.make(config, index, embedder, opened.views)
    never, (restarts, guided) = None, registry.restarts(config)
    if (guarantee := config.never_above is not None) or restarts:
        assert index is not None  # _check saw to it
        never = NeverAbove(
            index,
            embedder,
            limit=config.never_above,
            tries=config.tries if guarantee else 1 + restarts,
            amg=config.amg,
            judges=opened.judges,
            views=opened.views,
            withhold=guarantee,
            guided=guided,
        )
    seen = Judges(*opened.views)

    with progress(total=len(tasks), desc=f"sampling, {config.guidance}", unit="images") as bar:
        for batch in batches(config, tasks):
            if shares.stop_asked():
                return
            began = time.perf_counter()
            neurons = together if config.neurons_of == "all" else own.get(batch[0].prompt.caption, {})
            with blocked(pipe, neurons) if config.neurons else nullcontext():
                drawn = _draw_batch(pipe, config, batch, guidance, rejection, never, bar)
            seconds = (time.perf_counter() - began) / len(batch)
            images = [one.image for one in drawn if not one.withheld]
            nearest = iter(_nearest(index, embedder, seen, images) if images else [])
            for task, one in zip(batch, drawn, strict=True):
                found = dict.fromkeys(NEAREST) if one.withheld else next(nearest)
                if one.similarities:  # as they were judged, to the last bit
                    found["similarity"] = one.similarities[0]
                    found["judge_similarity"] = one.similarities[1] if opened.judges else None
                    found["highest"], found["judged_by"] = one.similarity, one.judge
                yield task, one.image, _record(config, opened, task, one, seconds, found)
            bar.set_postfix_str("")
            bar.update(len(batch))


def _draw_batch(
    pipe: Any,
    config: SampleConfig,
    batch: Sequence[Task],
    guidance: Sequence[Guidance],
    rejection: Rejection | None,
    never: NeverAbove | None,
    bar: Progress,
) -> list[Accepted]:
    """The images of a batch, each from its seed, and again as rejection and the guarantee ask for."""

    def draw(rows: list[int], seeds: list[int], guidance: Sequence[Guidance]) -> Any:
        def pipeline(some: list[int], seeds: list[int]) -> GuidedOutput:
            return _pipe(pipe, config, [batch[rows[i]].prompt.caption for i in some], seeds, guidance, bar)

        return rejection(pipeline, seeds) if rejection else pipeline(list(range(len(rows))), seeds)

    seeds = [task.seed for task in batch]
    if never is not None:
        return never(draw, seeds, guidance)
    output = draw(list(range(len(batch))), seeds, guidance)
    if rejection:
        return output
    return unjudged(output, seeds)


def _pipe(
    pipe: Any,
    config: SampleConfig,
    prompts: list[str],
    seeds: list[int],
    guidance: Sequence[Guidance],
    bar: Progress,
) -> GuidedOutput:
    def told(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        bar.set_postfix_str(f"{len(prompts)} more at step {i + 1} of {len(pipe.scheduler.timesteps)}")
        return {}

    # The model's own unconditional half where there is no negative prompt: not every family's is the empty prompt.
    negative = [config.negative_prompt] * len(prompts) if config.negative_prompt else None
    output = pipe(
        prompts,
        **pipe.asked(config.scale, negative),
        num_inference_steps=config.steps,
        height=config.height or None,
        width=config.width or None,
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        guidance=guidance,
        callback_on_step_end=told,
    )
    return output


def _with_numbers(config: SampleConfig, opened: Opened) -> SampleConfig:
    """``config`` with the model's threshold at the first timestep in the place of ``auto``."""
    if not registry.automatic(config):
        return config
    scheduler = opened.pipe.scheduler
    scheduler.set_timesteps(config.steps)
    t = float(scheduler.timesteps[0])
    return registry.with_thresholds(config, opened.thresholds, t, scheduler.config.num_train_timesteps)


def _nearest(
    index: TrainingIndex | None, embedder: Embedder | None, views: Judges, images: Sequence[Image.Image]
) -> list[dict[str, Any]]:
    """Of each finished image: its nearest training sample, the similarity to it, and the highest of all views."""
    if index is None or embedder is None:
        return [dict.fromkeys(NEAREST) for _ in images]
    cosine, rows = index.search(embedder.embed(images), 1)
    sigma = index.calibrate(cosine[:, 0])
    by_view = views(images) if views.levels else [()] * len(images)
    names = (embedder.name, *views.names)
    each = [dict(zip(names, (float(s), *view), strict=True)) for s, view in zip(sigma, by_view, strict=True)]
    return [
        {
            "similarity": float(s),
            "highest": max(seen.values()),
            "judged_by": max(seen, key=lambda name: seen[name]),
            "cosine": float(c),
            "nearest_row": row,
            "nearest_shard": str(index.shards[row]),
            "nearest_key": str(index.keys[row]),
            "nearest_caption": index.captions[row],
        }
        for s, c, row, seen in zip(sigma, cosine[:, 0], rows[:, 0].tolist(), each, strict=True)
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
        "steps_fired": len({row["number"] for row in trace if row["fired"]}),
        "max_similarity": max(watched, default=None),
        "magnitude": trace[0]["magnitude"] if trace else None,
        "memorized": trace[0]["memorized"] if trace else None,
        "seconds": seconds,
        **nearest,
        "trace": trace,
    }


def _memorized(row: dict[str, Any], opened: Opened) -> bool | None:
    """Whether the magnitude of a step reaches the model's calibrated threshold; None where there is no such."""
    m = row["magnitude"]
    if opened.thresholds is None or m is None:
        return None
    timesteps = opened.pipe.scheduler.config.num_train_timesteps
    return opened.thresholds.reached(m, "l2", row["t"], opened.elements, timesteps)
