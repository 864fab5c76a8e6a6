"""What a model draws with neurons blocked, measured beside as many neurons of each layer at random.

Blocking is believable only beside its control.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from afresh.files import write_atomic, write_json
from afresh.progress import get_logger
from train.evaluation.config import LocalizeConfig
from train.evaluation.judging.drawn import Drawn, read_drawn
from train.evaluation.judging.metrics import memorized_share, similarity_among_seeds
from train.memorization.config import MEMORIZED
from train.memorization.neurons.localization import Localized
from train.memorization.neurons.value_neurons import count, random_neurons
from train.prompts import Prompt, write_prompts
from train.sampling.config import SampleConfig
from train.sampling.job.job import run_sample
from train.sampling.pipelines.session import open_index

if TYPE_CHECKING:
    from PIL.Image import Image


log = get_logger(__name__)


def draw_and_compare(
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
    from curate.embed.registry import load_embedder
    from train.evaluation.judging.dual_encoder import DualEncoder
    from train.evaluation.judging.originals import read_originals

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
    from train.evaluation.judging.originals import read_originals
    from train.evaluation.reporting.figure import Cell, Figure, draw_figure

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

