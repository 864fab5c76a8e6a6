"""Settings of ``train finetune``: plain dataclasses, read from YAML and the command line."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class ShardGroup:
    """Shards whose samples stand in an epoch several times.

    Args:
        path: a path, glob, brace range, folder or fsspec URL.
        repeats: how often each of their samples is seen in an epoch.
    """

    path: str
    repeats: int = 1


@dataclass(frozen=True)
class Buckets:
    """Images of several shapes, of which a batch holds one: each goes where the aspect ratio is nearest to its own.

    Args:
        step: sides are multiples of it, in pixels; 64 is usual. 0 brings every image to one square.
        min_side: smallest side; 0 is half the resolution.
        max_side: largest side; 0 is twice the resolution.
    """

    step: int = 0
    min_side: int = 0
    max_side: int = 0


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


@dataclass
class FilterConfig:
    """Which samples of a batch are left out because the model retrieves them from their caption.

    Args:
        policy: ``off``; ``every_step`` judges each sample at each visit (Wen et al.); ``noisy_steps`` only where the
            timestep is at least ``min_timestep``.
        threshold: largest text-conditional noise magnitude a sample may have; a sample at or above it is left out.
        form: ``l2`` is the papers' scale (grows with the latent's size), ``rms`` is independent of it.
        min_timestep: of the policy ``noisy_steps``, in [0, 1000).
        warmup_steps: steps before the filter starts.
    """

    policy: Literal["off", "every_step", "noisy_steps"] = "off"
    threshold: float = 2.0
    form: Literal["l2", "rms"] = "l2"
    min_timestep: int = 500
    warmup_steps: int = 0


@dataclass
class FinetuneConfig:
    """Settings of a training run.

    Args:
        model: pipeline folder, hub name or single-file checkpoint to start from.
        out: folder of the run: ``model/`` (the result), ``checkpoints/``, ``log.jsonl``, ``verdicts.parquet``,
            ``summary.json``.
        shards: tar shards: paths, globs, brace ranges, folders or fsspec URLs; or ``{path: …, repeats: n}``.
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
        resolution: side of the images in pixels; 0 is the model's own. With buckets, its square is their largest area.
        crop: how an image comes to its shape: ``none`` squashes it, ``center`` and ``random`` cut off what is too much.
        buckets: images of several shapes.
        weight_field: field of a sample's json that its loss is multiplied by; samples without it have weight 1.
        augmentation: random changes of the images.
        cache_latents: encode every image (and each of ``augmentation.variants``) once, at the start, and keep the
            latents in memory (``memory`` or true) or in ``cache`` (``disk``).
        cache_text: the same for the captions' embeddings, where the text encoder is not trained; in half precision.
        cache: folder of what is kept on disk, which several runs may share; empty is ``out/cache``.
        workers: processes that read and decode images.
        shuffle_shards: shards that are shuffled together.
        filter: which samples of a batch are left out.
        checkpoint_every: steps between checkpoints; 0 saves one only on a signal.
        keep_checkpoints: how many are kept.
        log_every: steps between lines of the log.
        tracker: an Accelerate tracker by name (tensorboard, wandb, …), or none.
        seed: of the order, noise, timesteps, captions and augmentation.
    """

    model: str
    out: str
    shards: list[str | ShardGroup]
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
    resolution: int = 0
    crop: Literal["none", "center", "random"] = "none"
    buckets: Buckets = field(default_factory=Buckets)
    weight_field: str | None = None
    cache_latents: bool | Literal["memory", "disk"] = False
    cache_text: bool | Literal["memory", "disk"] = False
    cache: str = ""
    workers: int = 2
    shuffle_shards: int = 16
    filter: FilterConfig = field(default_factory=FilterConfig)
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    log_every: int = 20
    tracker: str | None = None
    seed: int = 0
