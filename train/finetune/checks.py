"""What can be seen to be wrong with a run's settings and files before the model is loaded."""

from __future__ import annotations

import os
from pathlib import Path

from afresh.errors import UsageError
from curate.decisions.sample_lists import read_ids
from curate.index.training_index import check_index
from curate.reading.urls import expand_shards
from train.denoising.opening.files import check_model
from train.denoising.opening.quantized import check_quantize
from train.finetune.config import FinetuneConfig, ShardGroup, ValidationConfig
from train.finetune.data.folders import is_imported
from train.finetune.filter.checks import check_filter


def check_finetune(config: FinetuneConfig) -> None:
    """Check a run: its options, the shards, the lists, the model's files, and fp16's GPU.

    Raises:
        UserError: an option is out of range or excludes another; or a file is missing or malformed.
    """
    check_ranges(config)
    check_filter(config.filter, config.model)
    check_validation(config.validation)
    out = Path(config.out)
    if not (out / "summary.json").is_file():  # finished: nothing is read any more
        check_model(config.model, config.variant)
    if not (out / "samples.arrow").is_file():  # begun: what is lost since then is replaced
        patterns = [one.path if isinstance(one, ShardGroup) else one for one in config.shards]
        patterns = [pattern for pattern in patterns if not is_imported(pattern)]
        if patterns:
            expand_shards([pattern for pattern in patterns if "://" not in pattern] or patterns)
    if config.exclude:
        read_ids(config.exclude)
    if config.mixed_precision == "fp16" and not has_accelerator():  # float32 without a word, otherwise
        raise UsageError("mixed_precision fp16 needs a GPU: take bf16, no, or auto")


def check_ranges(config: FinetuneConfig) -> None:
    """Raise :class:`UsageError` for numbers out of range, and options that exclude each other."""
    counts = ("steps", "batch_size", "gradient_accumulation", "log_every", "lr_cycles", "max_bad_steps")
    for name in (*counts, "caption_chunks", "learning_rate"):
        if getattr(config, name) <= 0:
            raise UsageError(f"{name} must be positive, not {getattr(config, name)}")
    least_0 = ("snr_gamma", "noise_offset", "input_perturbation", "huber_c", "lr_power", "max_grad_norm")
    for name in (*least_0, "epochs", "clip_skip"):
        if getattr(config, name) < 0:
            raise UsageError(f"{name} must be 0 or more, not {getattr(config, name)}")
    for name in ("ema_decay", "caption_dropout"):
        if not 0 <= getattr(config, name) < 1:
            raise UsageError(f"{name} must lie in [0, 1), not {getattr(config, name)}")
    if config.offload and not (config.cache_latents and config.cache_text):
        raise UsageError("offload needs cache_latents and cache_text: what is not cached is encoded at every step")
    if config.cache_text and config.train_text_encoder:
        raise UsageError("cache_text: embeddings change while the text encoder is trained; set one of them to false")
    words = config.random_words
    if words.number < 0 or not 0 <= words.share <= 1:
        raise UsageError(f"random_words: number must be 0 or more and share lie in [0, 1], not {words}")
    if words.number and config.cache_text:
        raise UsageError("random_words: a caption has other words at every visit; set cache_text to false")
    if config.text_encoder_learning_rate is not None:
        if not config.train_text_encoder:
            raise UsageError("text_encoder_learning_rate needs train_text_encoder: true")
        if config.text_encoder_learning_rate < 0:
            raise UsageError("text_encoder_learning_rate must be 0 or more")
    tags, t = config.tags, config.timesteps
    if tags.keep < 0 or not 0 <= tags.dropout < 1 or not tags.separator:
        raise UsageError(f"tags: keep must be 0 or more, dropout lie in [0, 1) and separator not be empty, not {tags}")
    if tags.active and config.cache_text:
        raise UsageError("tags: a caption has other words at every visit; set cache_text to false")
    if not 0 <= t.lowest < t.highest <= 1000 or t.spread <= 0:
        raise UsageError(f"timesteps: 0 ≤ lowest < highest ≤ 1000 and a positive spread are needed, not {t}")
    lora = config.lora
    for name in ("rank", "alpha"):
        if getattr(lora, name) < 0:
            raise UsageError(f"lora.{name} must be 0 or more, not {getattr(lora, name)}")
    if not 0 <= lora.dropout < 1:
        raise UsageError(f"lora.dropout must lie in [0, 1), not {lora.dropout}")
    check_quantize(lora.quantize if lora.rank else "none")
    for name, wrong in (
        ("dora", lora.dora),
        ("dropout", lora.dropout > 0),
        ("quantize", lora.quantize != "none"),
        ("kind", config.train_text_encoder),
    ):
        if lora.kind != "lora" and wrong:
            without = "train_text_encoder false" if name == "kind" else f"{name} left out"
            raise UsageError(f"lora.{name}: lora.kind {lora.kind} goes with {without}, or take lora.kind lora")
    if lora.quantize != "none" and (lora.dora or not lora.rank):
        raise UsageError("lora.quantize needs lora.rank, and lora.dora false: quantised weights are not trained")
    if lora.dora and config.train_text_encoder:
        raise UsageError(
            "lora.dora: diffusers does not load those of a text encoder as they were trained: set train_text_encoder "
            "to false"
        )
    if lora.rank and not lora.targets:
        raise UsageError("lora.targets is empty: name the layers that get adapters")
    if lora.rank and lora.dropout and config.filter.settled().policy != "off":
        raise UsageError(
            "lora.dropout and the filter do not go together, as the magnitude would measure the dropout: set one of "
            "lora.dropout to 0 and filter.preset to none"
        )


def check_validation(config: ValidationConfig) -> None:
    """Raise :class:`UsageError` for options that do not go together."""
    if config.every < 0:
        raise UsageError(f"validation.every must be 0 or more, not {config.every}")
    if config.every and not config.prompts and not config.shards:
        raise UsageError("validation.every needs validation.prompts, texts to draw, or validation.shards")
    if config.every and config.shards:
        expand_shards(config.shards)
        if config.samples <= 0:
            raise UsageError(f"validation.samples must be positive, not {config.samples}")
    if config.every and config.steps <= 0:
        raise UsageError(f"validation.steps must be positive, not {config.steps}")
    for name, value in (("width", config.width), ("height", config.height)):
        if value < 0 or value % 8:
            raise UsageError(f"validation.{name} must be a multiple of 8, not {value}")
    if config.guidance != "none" and not config.index:
        raise UsageError(f"validation.guidance {config.guidance} needs validation.index: the output of curate dedup")
    if config.guidance != "none" and config.every:
        check_index(config.index)


def has_accelerator() -> bool:
    """Whether training may use a GPU or the like; torch is loaded only where the environment leaves that open."""
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "y", "on"):
        return False
    import torch

    return torch.accelerator.is_available()
