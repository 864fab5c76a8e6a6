"""Before and after the loop: settings that make no sense, the processes and their precision, the folder of the run."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from afresh.errors import UsageError
from afresh.files import write_json
from afresh.progress import get_logger
from afresh.runs import claim
from curate.decisions.sample_lists import ids_digest
from train.finetune.config import FinetuneConfig
from train.finetune.filter.settings import check_filter
from train.finetune.hub import check_hub, push_model
from train.finetune.state.log import check_trackers
from train.finetune.state.optimizer import find_optimizer
from train.finetune.state.sharding import check_parallel, shard_on_cpu
from train.finetune.validation import check_validation

if TYPE_CHECKING:
    from accelerate import Accelerator


log = get_logger(__name__)


FREE = (
    *("log_every", "checkpoint_every", "keep_checkpoints", "max_bad_steps", "auto_batch_size"),
    *("workers", "trackers", "validation", "push_to_hub", "license", "cache"),
)
"""Settings that may change between a run and its resumption: the result does not depend on them."""


def publish(out: Path, config: FinetuneConfig, summary: dict[str, Any]) -> dict[str, Any]:
    """Upload a finished run's model where that is asked for and not done yet, and say so in the summary."""
    if config.push_to_hub and summary["model"] and "hub" not in summary:
        summary = summary | {"hub": push_model(out / "model", config.push_to_hub)}
        write_json(out / "summary.json", summary)
    return summary


def check_config(config: FinetuneConfig) -> None:
    """Raise :class:`UsageError` for what can be seen to be wrong before anything is loaded."""
    counts = ("steps", "batch_size", "gradient_accumulation", "log_every", "lr_cycles", "max_bad_steps")
    for name in (*counts, "learning_rate"):
        if getattr(config, name) <= 0:
            raise UsageError(f"{name} must be positive, not {getattr(config, name)}")
    for name in ("snr_gamma", "noise_offset", "input_perturbation", "lr_power", "max_grad_norm"):
        if getattr(config, name) < 0:
            raise UsageError(f"{name} must be 0 or more, not {getattr(config, name)}")
    for name in ("ema_decay", "caption_dropout"):
        if not 0 <= getattr(config, name) < 1:
            raise UsageError(f"{name} must lie in [0, 1), not {getattr(config, name)}")
    if config.cache_text and config.train_text_encoder:
        raise UsageError("cache_text: embeddings change while the text encoder is trained; set one of them to false")
    words = config.random_words
    if words.number < 0 or not 0 <= words.share <= 1:
        raise UsageError(f"random_words: number must be 0 or more and share lie in [0, 1], not {words}")
    if words.number and config.cache_text:
        raise UsageError("random_words: a caption has other words at every visit; set cache_text to false")
    lora = config.lora
    for name in ("rank", "alpha"):
        if getattr(lora, name) < 0:
            raise UsageError(f"lora.{name} must be 0 or more, not {getattr(lora, name)}")
    if not 0 <= lora.dropout < 1:
        raise UsageError(f"lora.dropout must lie in [0, 1), not {lora.dropout}")
    if lora.rank and not lora.targets:
        raise UsageError("lora.targets is empty: name the layers that get adapters")
    if lora.rank and lora.dropout and config.filter.policy != "off":
        raise UsageError("lora.dropout and the filter do not go together: the magnitude would measure the dropout")
    check_filter(config.filter, config.model)
    find_optimizer(config.optimizer)
    check_trackers(config.trackers)
    check_validation(config.validation)
    if config.push_to_hub:
        check_hub(config.push_to_hub)


def make_accelerator(config: FinetuneConfig) -> Accelerator:
    """Accelerate's view of this process and its precision."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()  # an earlier run in this process may have had another precision
    several = int(os.environ.get("WORLD_SIZE") or 1)
    accelerator = Accelerator(
        # Accelerate takes several processes without accelerators for single ones, unless it is told.
        cpu=several > 1 and not torch.accelerator.is_available(),
        mixed_precision=config.mixed_precision,
        log_with=config.trackers or None,
        project_dir=config.out if config.trackers else None,
    )
    if accelerator.num_processes != several:
        raise UsageError(
            f"{several} processes were started, and Accelerate sees {accelerator.num_processes}: each would be a run "
            "of its own in one folder; start them by launch.sh --processes, torchrun or accelerate launch"
        )
    shard_on_cpu(accelerator)
    check_parallel(accelerator.distributed_type.value, accelerator.is_fsdp2, config)
    if config.mixed_precision == "fp16" and accelerator.device.type == "cpu":  # float32 without a word, otherwise
        raise UsageError("mixed_precision fp16 needs a GPU: take bf16, no, or auto")
    return accelerator


def resolve_precision(name: str) -> Any:
    """The autocast type that ``auto`` stands for on this machine; any other name is itself."""
    if name != "auto":
        return name
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    # CPUs without matrix instructions for it are slower in bf16 than in float32.
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return "bf16" if capabilities.get("amx_bf16") else "no"


def begin(out: Path, config: FinetuneConfig, accelerator: Accelerator) -> dict[str, Any] | None:
    """Claim the folder for this configuration; the summary of the run if it is finished already."""
    run = dataclasses.asdict(config) | {"processes": accelerator.num_processes, "fsdp": accelerator.is_fsdp2}
    for free in FREE:
        run.pop(free)
    if config.exclude:
        run["exclude"] = ids_digest(config.exclude)
    claim(out, run)
    if (out / "summary.json").is_file() and (out / "model" / "model_index.json").is_file():
        log.info("%s is finished already", out)
        return json.loads((out / "summary.json").read_text())
    return None

