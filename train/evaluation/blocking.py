"""``train localize``: neurons found prompt by prompt, and what the model draws with and without them.

The search is ``train.memorization.localize``; the images are drawn by ``train sample``. Blocking is believable only
beside its control: as many neurons of each layer at random.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from curate.console import UsageError, UserError, get_logger, progress, refuse_other_settings, write_atomic, write_json
from train.components import open_pipeline
from train.evaluation.config import LocalizeConfig
from train.evaluation.drawn import Drawn, read_drawn
from train.evaluation.metrics import memorized_share, similarity_among_seeds
from train.memorization.config import MEMORIZED
from train.memorization.localize import Localization, Localized, Localizer
from train.memorization.neurons import (
    Neurons,
    count,
    random_neurons,
    save_rows,
    value_layers,
    widths,
    zero_rows,
)
from train.prompts import Prompt, read_prompts, write_prompts
from train.sampling.config import SampleConfig
from train.sampling.job import fingerprint, open_index, run_sample

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline
    from PIL.Image import Image

SEARCH = (
    "model", "revision", "variant", "model_config", "lora", "prompts", "clean", "clean_captions", "seeds", "first_seed",
    "criterion", "threshold", "deviations", "number", "up_blocks", "dtype",
)  # fmt: skip
"""Settings that decide which neurons are found."""
REMOVED = "removed_rows.safetensors"

log = get_logger(__name__)


def run_localize(config: LocalizeConfig) -> dict[str, Any]:
    """Localize what is not localized yet, then draw and compare.

    Writes ``out`` and, beside it, ``out`` without its suffix: a folder with the images, ``report.json`` and
    ``figure.png``.

    Returns:
        ``prompts``; ``memorized`` and ``found`` of them; ``neurons_per_prompt`` (mean of those that have any),
        ``neurons`` of all together and of how many (``neurons_in_model``); ``threshold``; ``evaluations_per_prompt`` of
        the UNet and ``seconds_per_prompt``; ``rows`` of the comparison (see :func:`compare`); ``figure``; ``out``.

    Raises:
        UsageError: options that do not go together, or ``out`` was begun with others.
        UserError: an input is missing or does not fit.
    """
    out = Path(config.out)
    if out.suffix != ".json":
        raise UsageError(f"out is {config.out!r}: expected a file that ends in .json")
    for option, least in (("seeds", 2), ("first_seed", 0), ("image_seeds", 1), ("clean_captions", 2), ("others", 0)):
        if getattr(config, option) < least:
            raise UsageError(f"--{option} is {getattr(config, option)}: it is at least {least}")
    if config.threshold < 0 or (config.criterion == "similarity" and config.threshold >= 1):
        raise UsageError(f"--threshold is {config.threshold}: a similarity is between 0 and 1, a magnitude above 0")
    everything = read_prompts(config.prompts)
    prompts = list({prompt.caption: prompt for prompt in everything if prompt.label != 0}.values())
    clean = read_prompts(config.clean) if config.clean else [prompt for prompt in everything if prompt.label == 0]
    clean = clean[: config.clean_captions]
    if not prompts:
        raise UserError(f"{config.prompts}: every prompt has label 0, so there is none to localize")
    if len(clean) < 2:
        raise UsageError("--clean is needed: a file of captions that are not memorized (or prompts of label 0)")
    if config.edited_model:
        check_edited(Path(config.edited_model))
    settings = {name: getattr(config, name) for name in SEARCH} | {"weights": fingerprint(Path(config.model))}
    for name in ("prompts", "clean"):
        settings[name] = fingerprint(Path(settings[name])) if settings[name] else ""

    pipe = open_pipeline(config)
    found, seconds = _search(config, out, pipe, prompts, clean, settings)
    if config.edited_model:
        write_edited(pipe, found.neurons, Path(config.edited_model))
    sizes = widths(value_layers(pipe.unet, up_blocks=config.up_blocks))
    del pipe  # the report's runs load it themselves
    memorized = [prompt for prompt in found.prompts if prompt.memorized_seeds]
    numbers = [count(prompt.neurons) for prompt in memorized if prompt.neurons]
    summary: dict[str, Any] = {
        "prompts": len(prompts),
        "memorized": len(memorized),
        "found": sum(prompt.found for prompt in memorized),
        "neurons_per_prompt": float(np.mean(numbers)) if numbers else None,
        "neurons": count(found.neurons),
        "neurons_in_model": sum(sizes.values()),
        "threshold": found.threshold,
        "evaluations_per_prompt": float(np.mean([prompt.evaluations for prompt in found.prompts])),
        "seconds_per_prompt": seconds,
        "out": str(out),
    }
    if config.report:
        summary |= _report(config, out.with_suffix(""), prompts, clean[: config.others], found, sizes)
        write_json(out.with_suffix("") / "report.json", summary)
    return summary


def _search(
    config: LocalizeConfig,
    out: Path,
    pipe: StableDiffusionPipeline,
    prompts: Sequence[Prompt],
    clean: Sequence[Prompt],
    settings: dict[str, Any],
) -> tuple[Localized, float]:
    """Every prompt's neurons, and the seconds that a prompt took; the file is written after each."""
    stored: dict[str, Any] = {}
    if out.is_file():
        try:
            stored = json.loads(out.read_text(encoding="utf-8"))
            before = stored["settings"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{out}: not a file of train localize: choose another --out") from None
        refuse_other_settings(out, before, settings)
    localizer = Localizer(
        pipe,
        [prompt.caption for prompt in clean],
        criterion=config.criterion,
        number=config.number,
        up_blocks=config.up_blocks,
        batch_size=config.batch_size,
    )
    seeds = list(range(config.first_seed, config.first_seed + config.seeds))
    if stored:
        threshold = float(stored["threshold"])
    elif config.threshold:
        threshold = config.threshold
    else:
        with progress(total=len(clean), desc="calibrating", unit="captions") as bar:
            threshold = localizer.calibrate(seeds, config.deviations, bar)
    done = {row["caption"]: row for row in stored.get("prompts", ())}
    if done:
        log.info(f"{out}: {len(done)} of {len(prompts)} prompts are localized already")

    spent = float(stored.get("seconds", 0.0))
    found = Localized(threshold)
    with progress(total=len(prompts), desc="localizing", unit="prompts") as bar:
        for number, prompt in enumerate(prompts, 1):
            if prompt.caption in done:
                found.prompts.append(Localization(**done[prompt.caption]))
            else:
                began = time.perf_counter()
                found.prompts.append(localizer.find(prompt.caption, seeds, threshold))
                spent += time.perf_counter() - began
                content = found.to_json() | {"settings": settings, "seconds": spent, "layers": localizer.sizes}
                write_json(out, content | {"unfinished": number < len(prompts)})
            bar.update(1)
    return found, spent / len(prompts)


def check_edited(folder: Path) -> None:
    """See that an edited model can be written there, or was already.

    Raises:
        UserError: the folder holds something else.
    """
    if folder.exists() and any(folder.iterdir()) and not (folder / REMOVED).is_file():
        raise UserError(f"{folder}: holds something else already: choose another --edited_model")


def write_edited(pipe: StableDiffusionPipeline, neurons: Neurons, folder: Path) -> None:
    """Write the pipeline with these neurons' rows of ``to_v`` at zero, and what stood there as
    ``removed_rows.safetensors`` (:func:`~train.memorization.neurons.restore_rows` puts it back). ``pipe`` is edited.

    Raises:
        UserError: the folder holds something else.
    """
    check_edited(folder)
    rows = zero_rows(pipe, neurons)
    pipe.save_pretrained(folder)
    save_rows(folder / REMOVED, rows)


# -------------------------------------------------------------------------------------------------- comparison


def _report(
    config: LocalizeConfig,
    folder: Path,
    prompts: Sequence[Prompt],
    others: Sequence[Prompt],
    found: Localized,
    sizes: Mapping[str, int],
) -> dict[str, Any]:
    """Draw every setting, measure it, and write the picture."""
    files = {"localized": folder / "localized.jsonl", "others": folder / "others.jsonl"}
    for kind, chosen in (("localized", prompts), ("others", others)):
        # without their seeds: the images are drawn from noises that the search did not see
        if chosen:
            write_prompts(files[kind], [dataclasses.replace(prompt, seed=None) for prompt in chosen])
    control = [
        {"caption": prompt.caption, "neurons": random_neurons(prompt.neurons, sizes, config.random_seed + number)}
        for number, prompt in enumerate(found.prompts)
    ]
    together = random_neurons(found.neurons, sizes, config.random_seed)
    write_json(folder / "random.json", {"prompts": control, "neurons": together, "unfinished": False})
    sets = [prompt.neurons for prompt in found.prompts if prompt.neurons] or [{}]
    foreign = [{"caption": p.caption, "neurons": sets[i % len(sets)]} for i, p in enumerate(others)]
    write_json(folder / "foreign.json", {"prompts": foreign, "neurons": {}, "unfinished": False})

    settings = [
        ("localized", "none", "", "all"),
        ("localized", "each prompt's own", config.out, "own"),
        ("localized", "as many at random", str(folder / "random.json"), "own"),
        ("localized", "all together", config.out, "all"),
        ("localized", "as many as all at random", str(folder / "random.json"), "all"),
        ("others", "none", "", "all"),
        ("others", "one localized prompt's", str(folder / "foreign.json"), "own"),
        ("others", "all together", config.out, "all"),
        ("others", "as many as all at random", str(folder / "random.json"), "all"),
    ]
    drawn = []
    for kind, blocking, neurons, neurons_of in settings:
        if kind == "others" and not others:
            continue
        log.info(f"{kind} prompts, blocked: {blocking}")
        into = folder / f"{kind}-{blocking.replace(' ', '-')}".replace("'", "")
        run_sample(_sample_config(config, files[kind], into, neurons, neurons_of))
        own = [count(prompt.neurons) for prompt in found.prompts if (prompt.neurons or kind != "others")]
        blocked = 0 if not neurons else count(found.neurons) if neurons_of == "all" else float(np.mean(own or [0]))
        drawn.append((kind, blocking, float(blocked), read_drawn(into, config.model, blocking, kind)))
    rows, copied = compare(config, drawn, [*prompts, *others])
    picture = folder / "figure.png"
    _draw_picture(picture, config, prompts, drawn, copied)
    return {"rows": rows, "figure": str(picture)}


def _sample_config(config: LocalizeConfig, prompts: Path, out: Path, neurons: str, neurons_of: Any) -> SampleConfig:
    return SampleConfig(
        model=config.model,
        prompts=str(prompts),
        out=str(out),
        revision=config.revision,
        variant=config.variant,
        model_config=config.model_config,
        lora=config.lora,
        neurons=neurons,
        neurons_of=neurons_of,
        seeds=config.image_seeds,
        first_seed=config.first_seed + config.seeds,
        steps=config.steps,
        scale=config.scale,
        batch_size=config.batch_size,
        dtype=config.dtype,
        device=config.device,
    )


def compare(
    config: LocalizeConfig, drawn: Sequence[tuple[str, str, float, Drawn]], prompts: Sequence[Prompt]
) -> tuple[list[dict[str, Any]], list[NDArray[np.bool_] | None]]:
    """Measure every setting.

    Args:
        config: which embedder, index and dual encoder.
        drawn: ``(kind, blocked, neurons, images)``; the first of a kind is the one that others are compared with.
        prompts: with the originals of some of the captions.

    Returns:
        A row a setting: ``prompts``, ``blocked``, ``neurons`` (the mean of a prompt), ``images``; ``memorized_share``,
        the images above 0.5 to the nearest training image with an index, to their original without (None where none
        is known); mean similarity ``to_original``, ``to_unblocked`` (same prompt and seed) and ``among_seeds``; and
        ``alignment`` with the caption. Beside it which images are memorized, where that is known.
    """
    from curate.embed import load_embedder
    from train.evaluation.dual_encoder import DualEncoder
    from train.evaluation.protocol import read_originals

    index, embedder = open_index(config.index, config.embedder) if config.index else (None, None)
    embedder = embedder or load_embedder(config.embedder or "copy-detector")

    def scaled(cosine: NDArray[Any]) -> NDArray[np.float32]:
        return np.asarray(cosine if index is None else index.calibrate(np.asarray(cosine, np.float32)), np.float32)

    originals = read_originals(prompts)
    vectors = dict(zip(originals, embedder.embed(list(originals.values())), strict=True)) if originals else {}
    encoder = DualEncoder.load(config.dual_encoder or None)
    unblocked: dict[str, NDArray[np.float32]] = {}
    rows, copied = [], []
    for kind, blocking, neurons, one in drawn:
        embeddings = embedder.embed(list(one.images))
        reference = unblocked.setdefault(kind, embeddings)
        known = [i for i, caption in enumerate(one.captions) if caption in vectors]
        to_original = scaled(np.array([embeddings[i] @ vectors[one.captions[i]] for i in known], np.float32))
        nearest = to_original
        if index is not None:
            nearest = scaled(index.search(embeddings, 1)[0][:, 0])
        judged = index is not None or len(known) == len(embeddings)
        among = similarity_among_seeds(embeddings, one.captions)
        texts = encoder.embed_texts(one.captions)
        rows.append(
            {
                "prompts": kind,
                "blocked": blocking,
                "neurons": neurons,
                "images": len(embeddings),
                "memorized_share": memorized_share(nearest, MEMORIZED) if len(nearest) else None,
                "to_original": float(to_original.mean()) if known else None,
                "to_unblocked": float(scaled(np.sum(embeddings * reference, axis=1)).mean()),
                "among_seeds": None if np.isnan(among) else float(scaled(np.array([among]))[0]),
                "alignment": float(np.mean(np.sum(encoder.embed_images(one.images) * texts, axis=1))),
            }
        )
        copied.append(nearest > MEMORIZED if judged else None)
    return rows, copied


def _draw_picture(
    path: Path,
    config: LocalizeConfig,
    prompts: Sequence[Prompt],
    drawn: Sequence[tuple[str, str, float, Drawn]],
    copied: Sequence[NDArray[np.bool_] | None],
) -> None:
    """Originals, and the first image of each prompt in every setting; memorized ones have a frame."""
    from train.evaluation.protocol import read_originals
    from train.evaluation.report import Cell, Figure, draw_figure

    captions = [prompt.caption for prompt in prompts][: config.columns]
    originals: dict[str, Image] = read_originals(prompts)
    lines: list[tuple[str, str, list[Cell]]] = []
    if originals:
        lines.append(("training image", "", [Cell(originals.get(caption)) for caption in captions]))
    for (kind, blocking, neurons, one), marks in zip(drawn, copied, strict=True):
        if kind != "localized":
            continue
        first = {caption: i for i, caption in reversed(list(enumerate(one.captions)))}
        cells = [Cell(one.images[first[c]], marks is not None and bool(marks[first[c]])) for c in captions]
        label = "nothing blocked" if blocking == "none" else f"blocked: {blocking}"
        lines.append((label, f"{neurons:.3g} neurons" if blocking != "none" else "", cells))
    picture = draw_figure(Figure("", captions, lines))
    with write_atomic(path) as temporary:
        picture.save(temporary, format="PNG", optimize=True)
