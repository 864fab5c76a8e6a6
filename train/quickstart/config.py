"""Settings of ``train quickstart``; those of the other jobs stand beside them, in each part's ``config.py``."""

from __future__ import annotations

from dataclasses import dataclass, field

from curate.config import DedupConfig
from train.evaluation.config import LocalizeConfig
from train.finetune.config import FinetuneConfig
from train.sampling.config import AMGConfig
from train.sampling.presets.config import DEFAULT


@dataclass
class MessConfig:
    """The duplicates that the quickstart plants in the fine-tuning part of the sample set.

    Args:
        images: how many images are repeated, chosen at random.
        set: which choice of images: sets 0, 1, 2, … share none as long as the fine-tuning part suffices.
        copies: how often each stands in the raw set; of several numbers, each goes to an equal share of the images.
        exact: share of the copies that keep their bytes; the others are re-encoded, resized, brightened or cropped.
        other_caption: share of the copies that stand under another caption.
        seed: of the edits and the order.
    """

    images: int = 24
    set: int = 0
    copies: int | list[int] = 40
    exact: float = 0.4
    other_caption: float = 0.15
    seed: int = 0


@dataclass
class QuickstartConfig:
    """The whole story on the carried sample set: curate, fine-tune, sample, detect, evaluate.

    Args:
        out: folder of the run; a second start goes on where the first one stopped.
        model: pipeline folder to fine-tune; empty takes the carried sample model.
        mess: the duplicates that are planted.
        dedup: settings of the curation; shards and out are set by the job.
        finetune: settings of all fine-tunings; model, shards and out are set by the job, and the filter is that of
            the third one.
        amg: settings of the guidance, by default those of ``train sample --guidance amg``.
        localize: settings of the search for neurons; its files are set by the job.
        held_out_captions: captions never trained on that images are drawn for.
        seeds: images per caption.
        steps: denoising steps.
        scale: classifier-free guidance scale.
        detect_held_out: captions never trained on that ``train detect`` tells the repeated ones from.
        detect_seeds: trajectories per caption that ``train detect`` watches on the raw model.
        detect_steps: denoising steps that it watches.
        outcome_steps: denoising steps of the images that tell which captions draw a training image.
        columns: captions in the report's figure.
        batch_size: images drawn together.
    """

    out: str = "runs/quickstart"
    model: str = ""
    mess: MessConfig = field(default_factory=MessConfig)
    dedup: DedupConfig = field(default_factory=DedupConfig)
    finetune: FinetuneConfig = field(default_factory=lambda: FinetuneConfig(model="", out="", shards=[]))
    amg: AMGConfig = field(default_factory=lambda: AMGConfig(preset=DEFAULT))
    localize: LocalizeConfig = field(default_factory=lambda: LocalizeConfig(model="", prompts="", out=""))
    held_out_captions: int = 64
    seeds: int = 2
    steps: int = 25
    scale: float = 5.0
    detect_held_out: int = 128
    detect_seeds: int = 4
    detect_steps: int = 5
    outcome_steps: int = 10
    columns: int = 10
    batch_size: int = 32

