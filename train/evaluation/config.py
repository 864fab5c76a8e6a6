"""Settings of the evaluation and of the audit: the jobs', and the protocol file's. Plain dataclasses."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class ReportsConfig:
    """One page that links every report below a folder.

    Args:
        folder: of runs, drawings, curations; the page is its ``index.html``.
    """

    folder: str = ""


@dataclass
class EvaluateConfig:
    """Sample every setting of a protocol file or a preset and compare them in one table and one figure.

    Args:
        out: folder for the samples, the table (table.csv, .json, .md, .tex), images.parquet, report.html and
            figure.png; images that it already holds are kept.
        protocol: YAML file (see Protocol): what is compared, on which prompts.
        preset: a protocol by name, in the place of the file: quickstart, sample-full, sd14-500 or membench.
        data: folder that holds what the preset names (docs/evaluation.md).
        model: in the place of the preset's model, where it has one.
        verify: at the end, draw a random tenth again and compare bit for bit.
        dual_encoder: folder of the judge's weights; empty takes the carried one.
        batch_size: images drawn together.
        dtype: of the models' weights.
        device: auto, cpu, cuda, …
    """

    out: str
    protocol: str = ""
    preset: Literal["", "quickstart", "sample-full", "sd14-500", "membench"] = ""
    data: str = "."
    model: str = ""
    verify: bool = False
    dual_encoder: str = ""
    batch_size: int = 8
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    device: str = "auto"


@dataclass
class LocalizeConfig:
    """Find the value neurons behind memorized prompts, and compare what the model draws with and without them.

    Args:
        model: Stable Diffusion: a diffusers directory, a hub name or a checkpoint file (.safetensors).
        revision: branch, tag or commit of a hub name.
        variant: of the weight files, as in model.fp16.safetensors; null takes those without one.
        model_config: of a checkpoint file: a diffusers directory of its architecture.
        lora: adapters to add to the weights: a folder, a .safetensors file or a hub name; null adds none.
        prompts: prompt file (.txt, .jsonl, .csv, .parquet); those of label 0 are clean, the others are localized.
            With an ``image`` column the report compares with the originals.
        clean: prompt file of captions that are not memorized; empty takes those of label 0 in ``prompts``.
        clean_captions: how many of them are used, the first.
        out: JSON file to write; the report's images and picture go into a folder of its name without .json. It is
            written after each prompt, and a run that was stopped goes on.
        seeds: initial noises that the first step is judged from.
        first_seed: the first of them.
        criterion: what has to fall below the threshold. similarity is the paper's: MS-SSIM of the first step's
            difference to the unblocked one. magnitude is the text-conditional noise magnitude on pure noise, over
            three timesteps, for models whose memorization is spread over many neurons. selective is the same, but
            prefers neurons that cost the clean captions little.
        threshold: 0 calibrates it on the clean captions: their mean score plus ``deviations`` standard deviations.
        deviations: the paper's one; lower ones block more neurons.
        number: take this many neurons of every memorized prompt, the first by magnitude or selective, instead of
            searching for the fewest that meet the criterion; 0 searches.
        up_blocks: search the up blocks too, which the paper leaves out.
        report: draw the images, and measure them.
        image_seeds: images per prompt in the report, from other noises than the search saw.
        others: clean captions whose images are compared, for what blocking does to them.
        steps: denoising steps of the report's images.
        scale: classifier-free guidance scale of the report's images.
        random_seed: of the random neurons that serve as control.
        index: training-set index (output folder of curate dedup): images are then compared with all training images,
            and similarities are on SSCD's scale; empty compares with the originals, by cosine.
        embedder: image embedder; empty takes the index's own, or else the carried copy detector.
        dual_encoder: folder of the weights that alignment is measured with; empty takes the carried one.
        columns: captions in the report's picture.
        edited_model: folder to write a pipeline to, in whose weights all neurons found are set to zero; what stood
            there is kept in it as removed_rows.safetensors. Empty writes none.
        batch_size: images per UNet pass.
        dtype: of the model's weights.
        device: auto, cpu, cuda, …
    """

    model: str
    prompts: str
    out: str
    revision: str | None = None
    variant: str | None = None
    model_config: str | None = None
    lora: str | None = None
    clean: str = ""
    clean_captions: int = 200
    seeds: int = 10
    first_seed: int = 0
    criterion: Literal["similarity", "magnitude", "selective"] = "similarity"
    threshold: float = 0.0
    deviations: float = 1.0
    number: int = 0
    up_blocks: bool = False
    report: bool = True
    image_seeds: int = 2
    others: int = 32
    steps: int = 50
    scale: float = 7.5
    random_seed: int = 0
    index: str = ""
    embedder: str = ""
    dual_encoder: str = ""
    columns: int = 8
    edited_model: str = ""
    batch_size: int = 32
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
        prompts: prompt files by kind, as ``{repeated: F, held_out: F}``; their ``image`` column, if any, gives the
            originals: the figure's, and the real images that alignment is a share of.
        index: training-set index: the output folder of curate dedup. Guidance by AMG needs it.
        training: shards of the images that the models were trained on; without any, the originals of all prompts.
        held_out: shards of images that no model was trained on: they set the judges' thresholds, and quality is
            measured against them.
        labels: of a kind, only the prompts of this label, as ``{held_out: 0}``.
        originals: folder of the originals of published lists, which name them by number or URL; the prompt files are
            such lists then (docs/evaluation.md).
        metrics: by name, of detector, dual-encoder, imagenet, sscd, pixels, clip, inception, or your own as
            module:Class; empty takes all that are at hand.
        weights: files and folders of metrics, as ``{sscd: F.pt, clip: DIR, inception: F.pt}``.
        resamples: choices of prompts behind the intervals; 0 gives none.
        seeds: images per prompt.
        steps: denoising steps.
        scale: classifier-free guidance scale.
        loras: adapters by the name of the model that they are added to, as ``{tuned: DIR}``; a model may stand under
            several names, with and without.
        neurons: files of ``train localize`` by the name of a model, as ``{blocked: F.json}``: each prompt of the file
            is drawn without its own neurons, and every other prompt with all.
        columns: captions that the figure shows.
        amg: AMG's settings, by field of AMGConfig.
        preset: a preset whose keys these replace.
        data: folder that holds what the preset names.
    """

    models: dict[str, str]
    settings: list[Setting]
    prompts: dict[str, str]
    index: str = ""
    training: list[str] = field(default_factory=list)
    held_out: list[str] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    originals: str = ""
    metrics: list[str] = field(default_factory=list)
    weights: dict[str, str] = field(default_factory=dict)
    resamples: int = 500
    seeds: int = 4
    steps: int = 50
    scale: float = 7.5
    loras: dict[str, str] = field(default_factory=dict)
    neurons: dict[str, str] = field(default_factory=dict)
    columns: int = 8
    amg: dict[str, object] = field(default_factory=dict)
    preset: str = ""
    data: str = ""


@dataclass
class AuditConfig:
    """Search for embeddings that bring training images back, and for others that do so for images never trained on.

    Args:
        model: Stable Diffusion: a diffusers directory, a hub name or a checkpoint file (.safetensors).
        prompts: prompt file with an ``image`` column. Rows of label 1 or without a label are training images, each
            attacked from its prompt (which may be an edited one); rows of label 0 are controls.
        out: folder to write: report.html, curves.png, figure.png, audit.parquet, embeds.safetensors, summary.json.
        revision: branch, tag or commit of a hub name.
        variant: of the weight files, as in model.fp16.safetensors; null takes those without one.
        model_config: of a checkpoint file: a diffusers directory of its architecture, for the configs, tokenizer and
            scheduler that a single file lacks; null asks the hub.
        lora: adapters to add to the weights: a folder, a .safetensors file or a hub name; null adds none.
        control: prompt file of images that were never trained on, all of whose rows are controls.
        neurons: JSON file of neurons that are blocked in the model: {"neurons": {"<name of an attn2.to_v>": [units]}}.
        images: how many images of each kind are attacked, from the first; 0 takes all.
        index: training-set index (the output folder of curate dedup), whose calibration brings similarities onto SSCD's
            scale; empty takes the embedder's cosine as it is.
        embedder: that judges copies; empty takes the index's own, or the carried copy detector.
        search_steps: steps of Adam per search.
        learning_rate: of Adam.
        noises: timesteps and noises per image and step.
        restarts: searches per image: the first from its prompt, the others from random embeddings.
        search_seed: of the search's randomness.
        measure_every: steps of the search after which images are drawn and compared.
        seeds: images drawn per embedding.
        first_seed: seed of the first.
        steps: denoising steps of the drawn images.
        scale: their classifier-free guidance scale.
        batch_size: images per UNet call.
        gradient_checkpointing: keep no activations for the backward pass: less memory, about a third more time.
        bootstrap: resamples behind the confidence intervals.
        dtype: of the model's weights.
        device: auto, cpu, cuda, …
    """

    model: str
    prompts: str
    out: str
    revision: str | None = None
    variant: str | None = None
    model_config: str | None = None
    lora: str | None = None
    control: str = ""
    neurons: str = ""
    images: int = 8
    index: str = ""
    embedder: str = ""
    search_steps: int = 50
    learning_rate: float = 0.1
    noises: int = 8
    restarts: int = 1
    search_seed: int = 0
    measure_every: int = 10
    seeds: int = 4
    first_seed: int = 0
    steps: int = 50
    scale: float = 7.5
    batch_size: int = 8
    gradient_checkpointing: bool = False
    bootstrap: int = 1000
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    device: str = "auto"

