"""The model card: what a fine-tuned model was made from and how, as the ``README.md`` that model hubs show.

Everything in it comes from the run's own records: its configuration, its summary, and the summaries that curation left
beside the shards. Names of folders stand for paths, so that a card can be published as it is.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from afresh.errors import printable
from afresh.files import to_json, write_atomic
from train.denoising.kinds import FLUX, STABLE_DIFFUSION, Family
from train.finetune.config import FinetuneConfig

ELSEWHERE = (
    *("model", "model_config", "out", "shards", "license", "push_to_hub", "exclude", "cache"),
    *("trackers", "validation", "workers", "log_every", "checkpoint_every", "keep_checkpoints"),
)
"""Settings that are not listed: paths and names that stand elsewhere, and what does not change the result."""


@dataclass(frozen=True)
class Training:
    """What a run trained on and with, beside its configuration.

    Attributes:
        base: hub name of the base model, or the name of its folder or file.
        base_on_hub: whether ``base`` is a hub name.
        samples: samples in the shards.
        shards: their number.
        size: side of the images, in pixels.
        prediction: ``epsilon``, ``v_prediction`` or ``velocity``.
        family: of the model.
        curations: what :func:`read_curations` found.
    """

    base: str
    base_on_hub: bool
    samples: int
    shards: int
    size: int
    prediction: str
    family: Family = STABLE_DIFFUSION
    curations: Sequence[Mapping[str, Any]] = ()


def read_curations(shards: Sequence[str]) -> list[dict[str, Any]]:
    """Summaries of the curations that wrote the shards (``OUT/summary.json`` beside ``OUT/shards``), each once.

    Args:
        shards: paths of the shards; URLs have no summary that is looked for.

    Returns:
        The summaries, each with the name of its folder under ``name``; in the order of the shards.
    """
    found = []
    for folder in dict.fromkeys(Path(shard).resolve().parent for shard in shards if "://" not in shard):
        if folder.name != "shards":
            continue
        try:
            summary = json.loads((folder.parent / "summary.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(summary, dict) and {"samples", "kept", "dropped"} <= summary.keys():
            found.append(summary | {"name": folder.parent.name})
    return found


def write_cards(
    config: FinetuneConfig,
    summary: Mapping[str, Any],
    shards: Sequence[str],
    samples: int,
    size: int,
    prediction: str,
    family: Family,
) -> None:
    """Write ``README.md`` into the result's folder ``model``, and into ``lora`` where there are adapters.

    Args:
        config: of the run.
        summary: the run's ``summary.json``.
        shards: their paths or URLs.
        samples: in them.
        size: side of the images, in pixels.
        prediction: ``epsilon``, ``v_prediction`` or ``velocity``.
        family: of the model.
    """
    local = Path(config.model).exists()
    training = Training(
        base=Path(config.model).resolve().name if local else config.model,
        base_on_hub=not local,
        samples=samples,
        shards=len(shards),
        size=size,
        prediction=prediction,
        family=family,
        curations=read_curations(shards),
    )
    forms: tuple[Literal["pipeline", "lora"], ...] = ("pipeline", "lora") if config.lora.rank else ("pipeline",)
    for form in forms:
        folder = Path(config.out) / ("model" if form == "pipeline" else "lora")
        with write_atomic(folder / "README.md") as temporary:
            temporary.write_text(model_card(config, training, summary, form=form), encoding="utf-8")


def model_card(
    config: FinetuneConfig,
    training: Training,
    summary: Mapping[str, Any],
    *,
    form: Literal["pipeline", "lora"] = "pipeline",
) -> str:
    """The card's text: YAML front matter, then Markdown.

    Args:
        config: of the run.
        training: what it trained on.
        summary: the run's ``summary.json``.
        form: whether the card stands beside a whole pipeline or beside adapters alone.
    """
    import yaml
    from huggingface_hub import ModelCardData

    kind = "flux" if training.family is FLUX else "stable-diffusion"
    tags = [kind, "text-to-image", "diffusers", "diffusers-training", "afresh"]
    if config.lora.rank:
        tags.append("lora")
    head: dict[str, Any] = {"license": config.license}
    if training.base_on_hub:
        head |= {"base_model": training.base}
        head |= {"base_model_relation": "adapter" if form == "lora" else "finetune"}
    head |= {"library_name": "diffusers", "pipeline_tag": "text-to-image", "tags": tags}
    what = (
        f"Low-rank adapters (rank {config.lora.rank}) for {_code(training.base)}"
        if form == "lora"
        else f"A text-to-image model, fine-tuned from {_code(training.base)}"
    )
    if form == "pipeline" and config.lora.rank:
        what += f", with low-rank adapters (rank {config.lora.rank}) added to its weights"
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in ELSEWHERE}
    parts = [
        f"---\n{ModelCardData(**head).to_yaml()}\n---",
        f"# {PurePosixPath(config.out).name or 'model'}",
        f"{what}. Afresh trained {_trained(config, training.family)} on {_count(training.samples, 'captioned image')}.",
        "## Use",
        _usage(config, training, form),
        "## Data",
        _data(training),
        "## Training",
        _table(_facts(config, training, summary)),
        "## Memorization",
        _memorization(config, training, summary),
        "## Settings",
        "Those of `train finetune`, without paths and what does not change the result:",
        f"```yaml\n{yaml.safe_dump(_without_paths(to_json(settings)), sort_keys=False, allow_unicode=True)}```",
    ]
    return "\n\n".join(parts) + "\n"


def _trained(config: FinetuneConfig, family: Family) -> str:
    parts = "the UNet" if family.network == "unet" else "the transformer"
    if config.train_text_encoder:
        parts += " and the text encoder" + "s" * (len(family.encoders) > 1)
    return f"adapters of {parts}" if config.lora.rank else parts


def _usage(config: FinetuneConfig, training: Training, form: str) -> str:
    pipeline = training.family.pipeline
    lines = ["import torch", f"from diffusers import {pipeline}", ""]
    if form == "lora":
        lines += [
            f"pipe = {pipeline}.from_pretrained({json.dumps(training.base)}, dtype=torch.float16)",
            'pipe.load_lora_weights("FOLDER", weight_name="pytorch_lora_weights.safetensors")',
        ]
        if config.lora.kind != "lora":
            lines[-1] = 'pipe.unet = PeftModel.from_pretrained(pipe.unet, "FOLDER")'
            lines.insert(2, "from peft import PeftModel")
        model = f"{shlex.quote(training.base)} --lora FOLDER"
    else:
        half = config.save_dtype == "float16"
        variant = ', variant="fp16"' if half else ""
        lines += [f'pipe = {pipeline}.from_pretrained("FOLDER", dtype=torch.float16{variant})']
        model = "FOLDER --variant fp16" if half else "FOLDER"
    size = training.size
    lines += [f'image = pipe.to("cuda")("a caption", height={size}, width={size}).images[0]']
    code = "\n".join(lines)
    return (
        f"`FOLDER` is the one that holds this file.\n\n```python\n{code}\n```\n\n"
        f"Or with Afresh, where `--guidance amg --index CURATED` steers away from the training images:\n\n"
        f"    afresh-train sample --model {model} --prompts prompts.txt --out drawn"
    )


def _data(training: Training) -> str:
    lines = [f"{_count(training.samples, 'captioned image')} in {_count(training.shards, 'shard')}."]
    for curation in training.curations:
        settings = curation.get("settings", {})
        of = f"Curation ({_code(curation['name'])}) kept {curation['kept']:,} of "
        of += f"{_count(curation['samples'], 'sample')} and dropped {curation['dropped']:,} as copies"
        if curation.get("reasons"):
            of += f" ({', '.join(f'{reason} {n:,}' for reason, n in curation['reasons'].items())})"
        if "threshold" in settings:
            of += f", at a similarity of {settings['threshold']:g} or more"
            if "image_embedder" in settings:
                of += f" by the embedder {_code(PurePosixPath(settings['image_embedder']).name)}"
        if curation.get("unreadable"):
            of += f"; {curation['unreadable']:,} could not be read"
        if curation.get("recall") is not None:
            of += f". Pairs above its threshold that its search found, measured on a sample: {curation['recall']:.1%}"
        lines.append(of + ".")
    if not training.curations:
        lines.append("No record of a curation stands beside the shards: nothing is known about copies among them.")
    return "\n\n".join(lines)


def _facts(config: FinetuneConfig, training: Training, summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    processes = summary.get("processes", 1)
    batch = config.batch_size * config.gradient_accumulation * processes
    peak = config.optimizer_args.get("lr", config.learning_rate)
    made_of = f"batch {config.batch_size} × accumulation {config.gradient_accumulation} × processes {processes}"
    facts = [
        ("base model", _code(training.base)),
        ("prediction", {"epsilon": "ε", "v_prediction": "v"}.get(training.prediction, training.prediction)),
        ("image size", f"{training.size} × {training.size} pixels"),
        ("steps", f"{summary['steps']:,}"),
        ("samples per step", f"{batch:,} ({made_of})"),
        ("samples seen", f"{summary['samples_seen']:,}"),
        ("learning rate", f"{peak:g}, {config.lr_schedule}, {config.warmup_steps:,} steps of warm-up"),
        ("optimizer", _code(config.optimizer)),
        ("precision", config.mixed_precision),
        ("empty captions", f"{config.caption_dropout:.0%}"),
        ("averaged weights", f"decay {config.ema_decay:g}" if config.ema_decay else "no"),
    ]
    if config.lora.rank:
        targets = ", ".join(config.lora.targets)
        alpha = config.lora.alpha or config.lora.rank
        facts.append(("adapters", f"{config.lora.kind}, rank {config.lora.rank}, alpha {alpha:g}, on {targets}"))
    return facts


def _memorization(config: FinetuneConfig, training: Training, summary: Mapping[str, Any]) -> str:
    lines = []
    if config.filter.policy == "off":
        lines.append(
            "No filter was used in training: a sample that stands in the data several times, or that was seen often, "
            "may be memorized."
        )
    else:
        lines.append(
            f"The memorization filter (policy `{config.filter.policy}`, {_thresholds(summary['thresholds'])}, "
            f"{'raw L2' if config.filter.form == 'l2' else 'RMS'}) left a sample out of a step where its "
            f"text-conditional noise magnitude reached the threshold (Wen et al., ICLR 2024). "
            f"It judged {summary['judged']:,} of {_count(summary['samples_seen'], 'visit')} and left out "
            f"{summary['dropped']:,}, of {_count(summary['samples_dropped_at_least_once'], 'sample')}. "
            f"Steps without any update: {summary['skipped_steps']:,}."
        )
    lines.append(
        "None of this rules out that the model gives back a training image. The base model may have memorized images "
        "of its own training set, which fine-tuning on other data does not remove. Copies below the similarity that "
        "curation looked for, and captions that many images share, can still be learned by heart. Before "
        "publishing, measure it: `afresh-train detect` scores captions, `afresh-train evaluate` compares what is "
        "drawn with the training images."
    )
    return "\n\n".join(lines)


def _thresholds(by_band: Sequence[float | None]) -> str:
    """The filter's thresholds in words: one, or one a timestep band."""
    if len(set(by_band)) == 1 and by_band[0] is not None:
        return f"threshold {by_band[0]:g}"
    bands = ", ".join("none" if threshold is None else f"{threshold:g}" for threshold in by_band)
    return f"thresholds {bands} by timestep band"


def _table(rows: Sequence[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def _code(text: str) -> str:
    """Text as Markdown code that no name can break out of."""
    return f"`{printable(text).replace('`', '').replace('|', '')}`"


def _without_paths(value: Any) -> Any:
    """JSON's types with absolute paths cut down to the name at their end."""
    if isinstance(value, dict):
        return {key: _without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_paths(item) for item in value]
    return PurePosixPath(value).name if isinstance(value, str) and value.startswith(("/", "~")) else value


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}" + ("" if n == 1 else "s")

