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
class LoRAConfig:
    """Low-rank adapters that are trained in place of the weights.

    Args:
        rank: of each adapter; 0 trains the weights themselves.
        alpha: the adapters' output is scaled by alpha / rank; 0 takes the rank, so that the scale is 1.
        dropout: probability of dropping an adapter's input, in [0, 1).
        targets: names of the UNet's layers that get one, as they end.
    """

    rank: int = 0
    alpha: int = 0
    dropout: float = 0.0
    targets: list[str] = field(default_factory=lambda: ["to_q", "to_k", "to_v", "to_out.0"])


@dataclass
class FinetuneConfig:
    """Settings of a training run.

    Args:
        model: pipeline folder, hub name or single-file checkpoint (.safetensors) to start from.
        revision: branch, tag or commit of a hub name.
        variant: of the weight files, as in model.fp16.safetensors; null takes those without one.
        model_config: of a single file: a pipeline folder of its architecture, for the configs, tokenizer and scheduler
            that a single file lacks; null asks the hub for those of the checkpoint's kind.
        out: folder of the run: ``model/`` (the result), ``checkpoints/``, ``log.jsonl``, ``verdicts.parquet``,
            ``summary.json``.
        shards: tar shards: paths, globs, brace ranges, folders or fsspec URLs.
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
        lora: adapters to train in place of the weights; with train_text_encoder, the text encoder gets them too.
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
        license: of the result, for its model card: an identifier that the hub knows.
        seed: of the order, noise, timesteps, captions and augmentation.
    """

    model: str
    out: str
    shards: list[str]
    revision: str | None = None
    variant: str | None = None
    model_config: str | None = None
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
    lora: LoRAConfig = field(default_factory=LoRAConfig)
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
    license: str = "unknown"
    seed: int = 0
