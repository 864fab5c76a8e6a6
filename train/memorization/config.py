"""Settings of the memorization jobs. Plain dataclasses."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

MEMORIZED = 0.5
"""Similarity to the nearest training image, on SSCD's scale, above which an image counts as memorized: the
literature's replication threshold."""


@dataclass
class DetectConfig:
    """Score prompts by how strongly a model has memorized them.

    Args:
        model: Stable Diffusion: a diffusers directory, a hub name or a checkpoint file (.safetensors); of the output
            folder of a trainer, the checkpoint that it made.
        revision: branch, tag or commit of a hub name.
        variant: of the weight files, as in model.fp16.safetensors; null takes those without one.
        model_config: of a checkpoint file: a diffusers directory of its architecture, for the configs, tokenizer and
            scheduler that a single file lacks; null asks the hub.
        lora: adapters to add to the weights: a folder (of a trainer's output, those that the run ended with), a
            .safetensors file or a hub name; null adds none.
        prompts: prompt file (.txt, .jsonl, .csv, .parquet); with labels 1 and 0 the scores are judged. Or what
            ``curate dedup`` wrote (its folder, its index, or the URL of one): the captions that occur most often in the
            training set.
        out: Parquet file to write, one row a prompt and seed; a summary (.json), a page (.html) and, with labels, a
            chart (.png) are written beside it, over several steps also the trajectories (.trajectories.png). While it
            runs, scores stand in .rows.jsonl, from where a run that was killed goes on.
        negatives: prompt file of prompts known not to be memorized, added with label 0; prompts without a label then
            have label 1, as those of published lists of memorized prompts.
        limit: most captions taken from a curation's output.
        steps: denoising steps that are scored, from the first.
        num_inference_steps: steps of the whole DDIM trajectory that they belong to.
        seeds: initial noises per prompt; their seeds are counted from the prompt's own, or from first_seed.
        first_seed: seed of each prompt's first noise.
        scale: classifier-free guidance scale of the trajectory.
        negative_prompt: in the place of the empty prompt, as images are drawn with it; thresholds then hold against it.
        outcomes: what the model draws for these prompts: the folder that ``train sample --index`` wrote for them. A
            prompt is memorized in outcome when an image of its own lies above 0.5 (SSCD's scale) to a training image;
            the scores are then judged by that too.
        signals: scores to compute: magnitude (the text-conditional noise magnitude, averaged over the steps),
            consistency (MS-SSIM of the first step among seeds), agreement (the same of the predicted images, at the
            last step), joint (magnitude times agreement), joint_on_noise (the same from pure noise taken for a latent
            of t = 0.8 T, without a step), anisotropy (magnitude, and an angle at low noise, both on pure noise),
            attention_entropy (of the cross-attention, averaged over the steps), masked_magnitude (the magnitude where
            the last step scored attends to the end token: score all steps). docs/detection.md compares them. One of
            your own is module:Class (docs/library.md).
        form: of the magnitude: l2, the papers' scale, or rms, which does not depend on the size of the latents.
        batch_size: prompt and seed pairs per UNet call, which then holds up to twice as many images.
        calibrate: share of prompts known not to be memorized that a threshold may call so, as 0.01; the threshold is
            then found from the prompts of label 0 (from all, where none has a label) and written to the model's
            folder, as ``memorization.json``, where the training filter reads it (``filter.threshold: auto``). A model
            that is no local folder has it beside ``out``. 0 leaves it out.
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
    negatives: str = ""
    limit: int = 500
    steps: int = 1
    num_inference_steps: int = 50
    seeds: int = 4
    first_seed: int = 0
    scale: float = 7.5
    negative_prompt: str = ""
    outcomes: str = ""
    signals: list[str] = field(default_factory=lambda: ["magnitude"])
    form: Literal["l2", "rms"] = "l2"
    batch_size: int = 32
    calibrate: float = 0.0
    bootstrap: int = 1000
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    device: str = "auto"


@dataclass
class ExplainConfig:
    """Say which words of a prompt its memorization hangs on, and what the magnitude becomes without them.

    Args:
        model: Stable Diffusion: a diffusers directory, a hub name or a checkpoint file (.safetensors).
        revision: branch, tag or commit of a hub name.
        variant: of the weight files, as in model.fp16.safetensors; null takes those without one.
        model_config: of a checkpoint file: a diffusers directory of its architecture, for the configs, tokenizer and
            scheduler that a single file lacks; null asks the hub.
        lora: adapters to add to the weights: a folder, a .safetensors file or a hub name; null adds none.
        prompt: the prompt to explain.
        prompts: prompt file (.txt, .jsonl, .csv, .parquet), instead of one prompt.
        instead: a changed prompt, whose magnitude is measured beside that of ``prompt``.
        out: HTML file to write; the numbers are written beside it (.json). Empty writes nothing.
        steps: denoising steps over which the significance is averaged, from the first.
        num_inference_steps: steps of the whole DDIM trajectory that they belong to.
        seeds: initial noises per prompt; their seeds are counted from the prompt's own, or from first_seed.
        first_seed: seed of each prompt's first noise.
        scale: classifier-free guidance scale of the trajectory.
        form: of the magnitude: l2, the papers' scale, or rms, which does not depend on the size of the latents.
        words: how many of the most significant words are taken out and replaced, one at a time, to see what the
            magnitude becomes; 0 tries none.
        replacements: common words, drawn at random, that are put in the place of each.
        batch_size: prompt and seed pairs per UNet call.
        gradient_checkpointing: keep no activations for the backward pass: less memory, about a third more time.
        dtype: of the model's weights.
        device: auto, cpu, cuda, …
    """

    model: str
    prompt: str = ""
    prompts: str = ""
    instead: str = ""
    out: str = ""
    revision: str | None = None
    variant: str | None = None
    model_config: str | None = None
    lora: str | None = None
    steps: int = 10
    num_inference_steps: int = 50
    seeds: int = 4
    first_seed: int = 0
    scale: float = 7.5
    form: Literal["l2", "rms"] = "l2"
    words: int = 3
    replacements: int = 3
    batch_size: int = 8
    gradient_checkpointing: bool = False
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    device: str = "auto"

