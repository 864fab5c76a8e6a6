"""Settings of ``train finetune``: plain dataclasses, read from YAML and the command line."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Augmentation:
    """Ranges of the random changes; zero switches one off.

    Args:
        shift: largest shift, as a share of the image's side.
        scale: largest relative change of size, in both directions.
        flip: probability of a horizontal flip.
        colour: largest change of brightness, contrast and saturation, relative.
        hue: largest rotation of hue, in turns.
        rotate: largest rotation, in degrees.
        variants: how many augmented forms of each image are made in all (their latents can then be cached);
            0 makes a new one at every visit.
    """

    shift: float = 0.0
    scale: float = 0.0
    flip: float = 0.0
    colour: float = 0.0
    hue: float = 0.0
    rotate: float = 0.0
    variants: int = 0

    @property
    def active(self) -> bool:
        """Whether anything is changed at all."""
        return any((self.shift, self.scale, self.flip, self.colour, self.hue, self.rotate))


@dataclass(frozen=True)
class Calibration:
    """How the filter finds its thresholds by itself, from samples that are known to be unique.

    Args:
        steps: optimizer steps in which magnitudes are gathered and nothing is left out; 0 takes ``filter.threshold``.
        quantile: of their magnitudes that becomes the threshold: one minus the share of unique samples left out.
        per_band: one threshold for each timestep band of 100; else one for all.
        window: steps after which an older magnitude counts by a factor e less; the threshold then follows the model to
            the end of the run. 0 fixes it after ``steps``.
        unique: folder of a curation of the shards that are trained on; its ledger tells which samples have no near
            copy. Empty takes all samples, which is right for shards that curation wrote.
    """

    steps: int = 0
    quantile: float = 0.99
    per_band: bool = True
    window: int = 0
    unique: str = ""


@dataclass
class FilterConfig:
    """Which samples of a batch are left out because the model retrieves them from their caption.

    Args:
        policy: ``off``; ``every_step`` judges each sample at each visit (Wen et al.); ``noisy_steps`` only where the
            timestep is at least ``min_timestep``; ``one_in_k`` at one of its visits in ``k``; ``noisy_one_in_k`` where
            both hold. Visits without a caption are never judged, nor left out.
        threshold: smallest text-conditional noise magnitude that is left out: one number; or ten, one for each timestep
            band of 100, null where nothing is judged; or ``auto``, those that ``train detect --calibrate`` left in
            the model's folder; or a file of its or of a run's (``filter.json``).
        form: ``l2`` is the papers' scale (grows with the latent's size), ``rms`` is independent of it.
        min_timestep: of the noisy policies, in [0, 1000).
        k: of the policies one_in_k.
        expires: how many further visits a sample's last verdict stands for, where they are not judged themselves; 0
            leaves a sample out at the very visit only.
        verdict_of: whose last verdict stands in: the ``sample``'s own, or the latest one of any sample under the same
            ``caption``, whose visits it then holds for: copies that stand under one caption are judged by each other,
            as the magnitude is the caption's more than the image's.
        calibrate: thresholds from the run itself.
        warmup_steps: steps before the filter starts.
    """

    policy: Literal["off", "every_step", "noisy_steps", "one_in_k", "noisy_one_in_k"] = "off"
    threshold: float | list[float | None] | str = 2.0
    form: Literal["l2", "rms"] = "l2"
    min_timestep: int = 800
    k: int = 5
    expires: int = 8
    verdict_of: Literal["sample", "caption"] = "sample"
    calibrate: Calibration = field(default_factory=Calibration)
    warmup_steps: int = 0


@dataclass
class FinetuneConfig:
    """Settings of a training run.

    Args:
        model: pipeline folder, hub name or single-file checkpoint to start from.
        out: folder of the run: ``model/`` (the result), ``checkpoints/``, ``log.jsonl``, ``verdicts.parquet``,
            ``filter.json`` (the thresholds), ``summary.json``.
        shards: tar shards: paths, globs, brace ranges, folders or fsspec URLs.
        exclude: a list of samples that are not trained on, as ``train verdicts`` writes it; empty for none.
        steps: optimizer steps.
        batch_size: samples a process takes in one forward pass.
        gradient_accumulation: forward passes per optimizer step.
        learning_rate: peak.
        lr_schedule: shape after the warm-up.
        warmup_steps: linear warm-up.
        adam_beta2: second-moment decay of AdamW.
        weight_decay: of AdamW.
        max_grad_norm: gradient clipping; 0 switches it off.
        ema_decay: decay of the averaged weights that are saved; 0 saves the last weights.
        snr_gamma: weigh timesteps by Min-SNR-γ (5 is usual); 0 weighs all alike.
        caption_dropout: probability of training on the empty caption.
        train_text_encoder: train it along with the UNet.
        mixed_precision: autocast type; auto is bf16 on hardware that is fast in it (GPUs since Ampere, CPUs with AMX),
            else no.
        gradient_checkpointing: recompute activations in the backward pass to save memory.
        attention: how the UNet computes attention (``train.components.set_attention``).
        augmentation: random changes of the images.
        cache_latents: encode every image (and each of ``augmentation.variants``) once, at the start.
        workers: processes that read and decode images, when latents are not cached.
        shuffle_shards: shards that are shuffled together; memory holds their encoded bytes.
        filter: which samples of a batch are left out.
        checkpoint_every: steps between checkpoints; 0 saves one only on a signal.
        keep_checkpoints: how many are kept.
        log_every: steps between lines of the log.
        tracker: an Accelerate tracker by name (tensorboard, wandb, …), or none.
        seed: of the order, noise, timesteps, captions and augmentation.
    """

    model: str
    out: str
    shards: list[str]
    exclude: str = ""
    steps: int = 1000
    batch_size: int = 8
    gradient_accumulation: int = 1
    learning_rate: float = 1e-5
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = 0
    adam_beta2: float = 0.999
    weight_decay: float = 1e-2
    max_grad_norm: float = 1.0
    ema_decay: float = 0.0
    snr_gamma: float = 0.0
    caption_dropout: float = 0.1
    train_text_encoder: bool = False
    mixed_precision: Literal["auto", "no", "fp16", "bf16"] = "no"
    gradient_checkpointing: bool = False
    attention: Literal["auto", "math", "sdpa", "xformers"] = "auto"
    augmentation: Augmentation = field(default_factory=Augmentation)
    cache_latents: bool = False
    workers: int = 2
    shuffle_shards: int = 16
    filter: FilterConfig = field(default_factory=FilterConfig)
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    log_every: int = 20
    tracker: str | None = None
    seed: int = 0


@dataclass
class VerdictsConfig:
    """Which samples of a run are listed as always left out.

    Args:
        run: folder of a finished ``train finetune`` with a filter.
        out: list to write, a line ``shard<TAB>key`` each; ``curate dedup --exclude`` and ``train finetune --exclude``
            read it.
        min_judged: a sample must have been judged at least so often.
        min_share: share of these verdicts that must have been against it.
    """

    run: str = ""
    out: str = ""
    min_judged: int = 3
    min_share: float = 1.0
