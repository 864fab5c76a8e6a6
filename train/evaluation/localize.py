"""``train localize``: neurons found prompt by prompt, and what the model draws with and without them.

The search is ``train.memorization.neurons.search``; the images are drawn by ``train sample``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from afresh.errors import UserError
from afresh.files import write_json
from afresh.progress import get_logger, progress
from afresh.runs import refuse_other_settings
from train.denoising.network import network_of
from train.denoising.opening.loading import open_pipeline
from train.denoising.opening.saving import save_pipeline
from train.evaluation.blocking import draw_and_compare
from train.evaluation.checks import REMOVED, check_edited, check_localize, prompts_to_localize
from train.evaluation.config import LocalizeConfig
from train.memorization.neurons.localization import Localization, Localized, Localizer
from train.memorization.neurons.value_neurons import Neurons, count, value_layers, widths
from train.memorization.neurons.weights import save_rows, zero_rows
from train.prompts import Prompt
from train.sampling.pipelines.session import fingerprint

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline


SEARCH = (
    "model", "revision", "variant", "model_config", "lora", "prompts", "clean", "clean_captions", "seeds", "first_seed",
    "criterion", "threshold", "deviations", "number", "up_blocks", "dtype",
)  # fmt: skip
"""Settings that decide which neurons are found."""
log = get_logger(__name__)


def run_localize(config: LocalizeConfig) -> dict[str, Any]:
    """Localize what is not localized yet, then draw and compare.

    Writes ``out`` and, beside it, ``out`` without its suffix: a folder with the images, ``report.json`` and
    ``figure.png``.

    Returns:
        ``prompts``; ``memorized`` and ``found`` of them; ``neurons_per_prompt`` (mean of those that have any),
        ``neurons`` of all together and of how many (``neurons_in_model``); ``threshold``; ``evaluations_per_prompt`` of
        the UNet and ``seconds_per_prompt``; ``rows`` of the comparison (see
        :func:`~train.evaluation.blocking.compare`); ``figure``; ``out``.

    Raises:
        UsageError: options that do not go together, or ``out`` was begun with others.
        UserError: an input is missing or does not fit.
    """
    out = Path(config.out)
    check_localize(config)
    prompts, clean = prompts_to_localize(config)
    settings = {name: getattr(config, name) for name in SEARCH} | {"weights": fingerprint(Path(config.model))}
    for name in ("prompts", "clean"):
        settings[name] = fingerprint(Path(settings[name])) if settings[name] else ""

    log.info(f"localizing {len(prompts)} prompts, by {len(clean)} captions that are not memorized")
    pipe = open_pipeline(config)
    found, seconds = _search(config, out, pipe, prompts, clean, settings)
    if config.edited_model:
        write_edited(pipe, found.neurons, Path(config.edited_model))
    sizes = widths(value_layers(network_of(pipe), up_blocks=config.up_blocks))
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
        summary |= draw_and_compare(config, out.with_suffix(""), prompts, clean[: config.others], found, sizes)
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
                found.prompts.append(localizer.find(prompt.caption, seeds, threshold, bar))
                bar.set_postfix_str("")
                spent += time.perf_counter() - began
                content = found.to_json() | {"settings": settings, "seconds": spent, "layers": localizer.sizes}
                write_json(out, content | {"unfinished": number < len(prompts)})
            bar.update(1)
    return found, spent / len(prompts)


def write_edited(pipe: StableDiffusionPipeline, neurons: Neurons, folder: Path) -> None:
    """Write the pipeline with these neurons' rows of ``to_v`` at zero, and what stood there as
    ``removed_rows.safetensors`` (:func:`~train.memorization.neurons.weights.restore_rows` puts it back). ``pipe`` is
    edited.

    Raises:
        UserError: the folder holds something else.
    """
    check_edited(folder)
    rows = zero_rows(pipe, neurons)
    save_pipeline(pipe, folder)
    save_rows(folder / REMOVED, rows)

