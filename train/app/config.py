"""Settings of ``train app``. A plain dataclass."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class AppConfig:
    """Open a page on this machine over a model, a curation and a folder of runs; any of them may be missing.

    Args:
        model: Stable Diffusion: a diffusers directory, a hub name or a checkpoint file (.safetensors).
        curated: the output folder of ``curate dedup``.
        runs: a folder of runs: fine-tunings, comparisons.
        shards: what was curated, as it was given to ``curate dedup``: images that were dropped are shown from there.
        review: folder of the lists that the page writes, ``keep.tsv`` and ``exclude.tsv``, for ``curate dedup --keep``
            and ``--exclude``; empty is the curation's folder with ``.review`` behind its name.
        prompts: prompt file (.txt, .jsonl, .csv, .parquet): those of label 0 are the clean prompts of the scale, the
            others are offered as examples. Empty takes captions of the curation: those that occur once, and those of
            the images with most copies.
        clean: most clean prompts that are scored for the scale.
        neurons: file of ``train localize``; the neurons of its prompts need no search.
        revision: branch, tag or commit of a hub name.
        variant: of the weight files, as in model.fp16.safetensors; null takes those without one.
        model_config: of a checkpoint file: a diffusers directory of its architecture; null asks the hub.
        lora: adapters to add to the weights: a folder, a .safetensors file or a hub name; null adds none.
        steps: denoising steps over which magnitude and significance are averaged, from the first.
        num_inference_steps: steps of the whole trajectory that they belong to.
        seeds: initial noises of a prompt's magnitude.
        scale: classifier-free guidance scale.
        image_steps: denoising steps of an image.
        dtype: of the model's weights.
        device: auto, cpu, cuda, …
        host: address that the page listens at. Everybody who reaches it may use the model, see the set and write the
            lists: 127.0.0.1 is this machine alone.
        port: of the page; 0 takes one that is free.
        max_upload_mb: megabytes of an image that is searched for.
    """

    model: str = ""
    curated: str = ""
    runs: str = ""
    shards: list[str] = field(default_factory=list)
    review: str = ""
    prompts: str = ""
    clean: int = 128
    neurons: str = ""
    revision: str | None = None
    variant: str | None = None
    model_config: str | None = None
    lora: str | None = None
    steps: int = 5
    num_inference_steps: int = 50
    seeds: int = 4
    scale: float = 7.5
    image_steps: int = 25
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    device: str = "auto"
    host: str = "127.0.0.1"
    port: int = 7860
    max_upload_mb: int = 32
