"""Settings of the evaluation: the job's, and the protocol file's. Plain dataclasses."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class EvaluateConfig:
    """Sample every setting of a protocol file and compare them in one table and one figure.

    Args:
        protocol: YAML file (see Protocol): what is compared, on which prompts.
        out: folder for the samples, table.csv, table.json, report.html and figure.png; images that it
            already holds are kept.
        dual_encoder: folder of the judge's weights; empty takes the carried one.
        batch_size: images drawn together.
        dtype: of the models' weights.
        device: auto, cpu, cuda, …
    """

    protocol: str
    out: str
    dual_encoder: str = ""
    batch_size: int = 8
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    device: str = "auto"


@dataclass
class Setting:
    """One model with one guidance.

    Args:
        model: name of a model of the protocol.
        guidance: as ``train sample`` takes it: none, amg, amg-strong.
    """

    model: str
    guidance: str = "none"


@dataclass
class Protocol:
    """What is compared. Paths are relative to the protocol file.

    Args:
        models: pipelines by name, as ``{raw: DIR, curated: DIR}``.
        settings: what is compared, in the order of the table.
        prompts: prompt files by kind, as ``{repeated: F, held_out: F}``; their ``image`` column, if any,
            gives the figure's originals.
        index: training-set index: the output folder of curate dedup.
        training: shards of the images that the models were trained on, for the independent judge.
        held_out: shards of images that no model was trained on: they set the judge's threshold, and quality
            is measured against them.
        seeds: images per prompt.
        steps: denoising steps.
        scale: classifier-free guidance scale.
        loras: adapters by the name of the model that they are added to, as ``{tuned: DIR}``; a model may stand under
            several names, with and without.
        columns: captions that the figure shows.
        amg: AMG's settings, by field of AMGConfig.
    """

    models: dict[str, str]
    settings: list[Setting]
    prompts: dict[str, str]
    index: str
    training: list[str]
    held_out: list[str]
    seeds: int = 4
    steps: int = 50
    scale: float = 7.5
    loras: dict[str, str] = field(default_factory=dict)
    columns: int = 8
    amg: dict[str, object] = field(default_factory=dict)
