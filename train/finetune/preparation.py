"""Before and after the loop: settings that make no sense, the processes and their precision, the folder of the run."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from afresh.errors import UsageError
from afresh.files import write_json
from afresh.progress import get_logger, is_main_process
from afresh.runs import claim, refuse_other_settings
from curate.decisions.sample_lists import ids_digest
from train.finetune.checks import check_finetune
from train.finetune.config import FinetuneConfig
from train.finetune.hub import check_hub, push_model
from train.finetune.model.speed import set_products
from train.finetune.state.checkpoint import list_checkpoints
from train.finetune.state.log import check_trackers
from train.finetune.state.memory import read_batch
from train.finetune.state.optimizer import find_optimizer, learning_rate
from train.finetune.state.sharding import check_parallel, shard_on_cpu

if TYPE_CHECKING:
    from accelerate import Accelerator

    from train.finetune.data.scan import ShardSet


log = get_logger(__name__)


FREE = (
    *("log_every", "checkpoint_every", "keep_checkpoints", "max_bad_steps", "auto_batch_size"),
    *("workers", "trackers", "validation", "push_to_hub", "license", "cache", "offload"),
)
"""Settings that may change between a run and its resumption: the result does not depend on them."""


def publish(out: Path, config: FinetuneConfig, summary: dict[str, Any]) -> dict[str, Any]:
    """Upload a finished run's model where that is asked for and not done yet, and say so in the summary."""
    if config.push_to_hub and summary["model"] and "hub" not in summary:
        summary = summary | {"hub": push_model(out, config.push_to_hub)}
        write_json(out / "summary.json", summary)
    return summary


def check_config(config: FinetuneConfig) -> None:
    """Raise :class:`UsageError` for what can be seen to be wrong before the model is loaded."""
    check_finetune(config)
    find_optimizer(config.optimizer)
    check_trackers(config.trackers)
    if config.push_to_hub:
        check_hub(config.push_to_hub)


def say_what_has_no_effect(config: FinetuneConfig) -> None:
    """Warn of settings that the run is too short for."""
    if config.epochs or not is_main_process():  # the steps are not known yet
        return
    if config.warmup_steps > config.steps:
        log.warning(
            "warmup_steps is %d, and the run has %d steps: the learning rate never reaches its peak, and ends at %.3g",
            config.warmup_steps,
            config.steps,
            learning_rate(config.steps - 1, config),
        )
    if config.validation.every > config.steps:
        log.warning(
            "validation.every is %d, and the run has %d steps: no image is drawn", config.validation.every, config.steps
        )


def with_numbers(config: FinetuneConfig, shard_set: ShardSet, world: int) -> FinetuneConfig:
    """The settings with ``steps`` for the ``epochs``, and the learning rate for the samples of a step, where asked for;
    and without the filter, where no sample has a caption for it to go by.

    Args:
        config: of the run.
        shard_set: its samples; those of shards with repeats stand in an epoch so often.
        world: processes.
    """
    samples = config.batch_size * config.gradient_accumulation * world
    if config.epochs:
        epoch = sum(int(n) * r for n, r in zip(shard_set.counts, shard_set.repeats, strict=True))
        config = dataclasses.replace(config, steps=max(1, math.ceil(config.epochs * epoch / samples)))
        say_what_has_no_effect(dataclasses.replace(config, epochs=0.0))
    if config.scale_lr:
        config = dataclasses.replace(config, learning_rate=config.learning_rate * samples)
    if config.filter.settled().policy != "off" and not shard_set.captioned():
        if is_main_process():
            log.warning("the filter is off: it goes by captions, and no sample has one")
        config = dataclasses.replace(config, filter=dataclasses.replace(config.filter, policy="off").settled())
    return config


def make_accelerator(config: FinetuneConfig) -> Accelerator:
    """Accelerate's view of this process and its precision."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedDataParallelKwargs

    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA's library is first used
        torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(config.deterministic)
    set_products(config.tf32)
    AcceleratorState._reset_state()  # an earlier run in this process may have had another precision
    several = int(os.environ.get("WORLD_SIZE") or 1)
    accelerator = Accelerator(
        # Accelerate takes several processes without accelerators for single ones, unless it is told.
        cpu=several > 1 and not torch.accelerator.is_available(),
        mixed_precision=resolve_precision(config.mixed_precision),
        log_with=config.trackers or None,
        project_dir=config.out if config.trackers else None,
        # Gradients lie in the buffers that are exchanged: the memory of one copy, and no copying.
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
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


def begin(
    out: Path, config: FinetuneConfig, accelerator: Accelerator
) -> tuple[dict[str, Any] | None, FinetuneConfig]:
    """Claim the folder for this configuration: the summary of the run if it is finished already, and its settings with
    the batch size that an earlier attempt found to fit.

    A run may be given other ``steps`` than before, where those that were made do not depend on them, and another number
    of processes, where a step keeps its samples.

    Raises:
        UsageError: the folder was begun with other settings, or cannot have other steps or processes.
    """
    run = settings_of(config) | {"processes": accelerator.num_processes, "fsdp": accelerator.is_fsdp2}
    if config.exclude:
        run["exclude"] = ids_digest(config.exclude)
    begun = out / "run.json"
    if not begun.is_file():
        claim(out, run)
    # An option that came after the run was begun has its default, which changes nothing.
    before = settings_of(FinetuneConfig(model="", out="", shards=[]))
    for name, value in json.loads(begun.read_text()).items():
        known = before.get(name)
        before[name] = known | value if isinstance(known, dict) and isinstance(value, dict) else value
    check_other_processes(out, before, run)
    kept = {name: before[name] for name in ("steps", "processes", "gradient_accumulation")}
    refuse_other_settings(out, before, run | kept)
    if before["steps"] != config.steps:
        check_other_steps(out, config, before["steps"])
        log.info("%s goes on to step %d, after the %d that it was begun with", out, config.steps, before["steps"])
    if kept != {name: run[name] for name in kept}:
        write_json(begun, run)
    attempt = read_batch(out, config)
    summary = out / "summary.json"
    if summary.is_file() and (out / "model" / "model_index.json").is_file():
        found = json.loads(summary.read_text())
        if config.epochs or found["steps"] == config.steps:
            log.info("%s is finished already", out)
            return found, attempt
        summary.unlink()
    return None, attempt


def settings_of(config: FinetuneConfig) -> dict[str, Any]:
    """What a run's result depends on, of its settings."""
    settings = dataclasses.asdict(dataclasses.replace(config, filter=config.filter.settled()))
    for free in FREE:
        settings.pop(free)
    settings["filter"].pop("preset")  # no more than a name for the others
    return settings


def check_other_processes(out: Path, before: Mapping[str, Any], run: Mapping[str, Any]) -> None:
    """See that a step of a run that goes on has the samples that it had.

    A step takes the positions of ``processes`` times ``gradient_accumulation`` batches, whoever computes them; all that
    is drawn follows from the positions. Sums come together in another order, so weights are equal but for rounding.

    Raises:
        UsageError: it has others; says which settings would keep them.
    """
    passes, processes = before["processes"] * before["gradient_accumulation"], run["processes"]
    if passes == processes * run["gradient_accumulation"]:
        return
    way = f"gradient_accumulation {passes // processes}"
    if passes % processes:
        way = f"another number of processes, of which {passes} is a multiple"
    raise UsageError(
        f"{out}: was begun with processes {before['processes']} and gradient_accumulation "
        f"{before['gradient_accumulation']}, {passes} batches a step: with processes {processes} it goes on under {way}"
    )


def keeps_final_state(config: FinetuneConfig) -> bool:
    """Whether a finished run leaves the state from which more steps go on: where these are exact."""
    return config.keep_checkpoints > 0 and config.lr_schedule == "constant"


def check_other_steps(out: Path, config: FinetuneConfig, before: int) -> None:
    """See that a run of ``before`` steps may have ``config.steps``: that those made are the ones that it would make.

    All else that a step does follows from its number alone; the learning rate may follow from the number of all.

    Raises:
        UsageError: it may not; says why, and what to do.
    """
    change = f"{out}: steps cannot become {config.steps}, after {before}"
    if config.lr_schedule != "constant":
        raise UsageError(
            f"{change}: with lr_schedule {config.lr_schedule} every step's learning rate follows from the number of "
            f"all steps, so those made so far would have been others; start another run with --model {out / 'model'} "
            "and another --out"
        )
    made = [step for step, _ in list_checkpoints(out / "checkpoints")]
    finished = (out / "summary.json").is_file()
    if finished and before not in made:
        raise UsageError(
            f"{change}: the state after the last step was not kept (keep_checkpoints 0); start another run with "
            f"--model {out / 'model'} and another --out"
        )
    if made and config.steps < max(made):
        raise UsageError(f"{change}: {max(made)} are made already; choose another --out")

