"""``train finetune``: fine-tune Stable Diffusion's UNet, leaving memorized samples out of each batch.

    ./launch.sh configs/finetune.yaml --model DIR --shards OUT/shards --out RUN
    accelerate launch -m train finetune --config configs/finetune.yaml      (the same, by hand)

Read top to bottom: what a step does stands in :func:`run_finetune`. Everything random at a step follows from the seed
and the positions of its samples (``data.py``, ``diffusion.py``), so a run that is killed goes on exactly where it was.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from curate.console import UsageError, UserError, claim, get_logger, progress, write_json
from curate.idlist import ids_digest
from train.components import set_attention
from train.finetune.average import Average
from train.finetune.captions import Captions
from train.finetune.checkpoint import (
    Stateful,
    collect_state,
    load_latest,
    restore_state,
    save_checkpoint,
)
from train.finetune.config import FinetuneConfig
from train.finetune.data import Positions, ShardOrder, make_batches, scan, upcoming_positions
from train.finetune.diffusion import Diffusion, draw_randomness, sample_posterior
from train.finetune.filter import MemorizationFilter, check_filter, chosen_thresholds, reference_samples
from train.finetune.log import RunLog, Tally
from train.finetune.loss import min_snr_weights, squared_errors, weighted_loss
from train.finetune.model import load_model
from train.finetune.optimizer import learning_rate, make_optimizer, set_learning_rate
from train.finetune.stop import StopOnSignal

log = get_logger(__name__)


def run_finetune(config: FinetuneConfig) -> dict[str, Any]:
    """Train, save the pipeline to ``out/model`` and return the summary.

    A finished run is not repeated; an interrupted one goes on from its newest checkpoint.

    Raises:
        UsageError: the configuration differs from the one that ``out`` was begun with, or is out of range.
        UserError: the model or the shards cannot be read, or the loss is not finite several times in a row.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    check_config(config)
    thresholds = chosen_thresholds(config.filter, config.model)
    config = dataclasses.replace(config, mixed_precision=resolve_precision(config.mixed_precision))
    out = Path(config.out)
    AcceleratorState._reset_state()  # an earlier run in this process may have had another precision
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        log_with=config.tracker,
        project_dir=config.out if config.tracker else None,
    )
    rank, world, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    with accelerator.main_process_first():
        done = begin(out, config, world)
    if done is not None:
        return done

    # What is trained.
    model = load_model(config, device)
    vae = model.pipe.vae
    diffusion = Diffusion(model.pipe.scheduler, device)
    optimizer = make_optimizer(model.trained, config, fused=accelerator.scaler is None)
    denoiser, optimizer = accelerator.prepare(model.denoiser, optimizer)
    set_attention(model.pipe.unet, config.attention)  # again: what is fastest depends on the device
    average = Average(model.trained, config.ema_decay)

    # What it is trained on.
    shard_set = scan(config.shards, config.exclude)
    order = ShardOrder(shard_set.counts, config.shuffle_shards, config.seed)
    captions = Captions(model, shard_set.captions, config.caption_dropout)

    def predict_unconditional(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        with accelerator.autocast():
            return model.predict_unconditional(x_t, t)

    memorization = MemorizationFilter(
        config.filter,
        diffusion,
        predict_unconditional,
        order.size,
        config.seed,
        thresholds,
        reference_samples(config.filter, shard_set),
        together=accelerator.distributed_type == DistributedType.FSDP,
    )

    # Where it stands: all that a checkpoint holds.
    counts = Counts()
    shared: dict[str, Stateful] = {
        "model": model,
        "optimizer": optimizer,
        "average": average,
        "counts": counts,
        "filter": memorization,
    }
    if accelerator.scaler is not None:
        shared["scaler"] = accelerator.scaler
    own: dict[str, Stateful] = {}
    start = 0
    checkpoints = out / "checkpoints"
    if (found := load_latest(checkpoints)) is not None:
        start, state = found
        restore_state(state, rank, shared, own)
        log.info("resuming %s after step %d", config.out, start)

    dataset = Positions(shard_set, order, model.size, config.seed, config.augmentation)
    batches = make_batches(dataset, upcoming_positions(start, rank, world, config), config, vae, accelerator)
    if config.tracker:
        accelerator.init_trackers("afresh")
    writer = RunLog(out / "log.jsonl", start) if accelerator.is_main_process else None
    stop = StopOnSignal()
    nominal = config.batch_size * config.gradient_accumulation
    began, broken = time.monotonic(), 0
    bar = progress(total=config.steps, desc="fine-tune", unit="steps")
    bar.update(start)
    step = start
    while step < config.steps:
        set_learning_rate(optimizer, learning_rate(step, config))
        tally = Tally(device)
        for micro in range(config.gradient_accumulation):
            batch = batches.next()
            draws = draw_randomness(batch.positions, batch.latent_shape, diffusion.timesteps, config.seed)
            noise, t = draws.noise.to(device), draws.t.to(device)
            x_0 = sample_posterior(batch.moments, draws.posterior.to(device), vae.config.scaling_factor)
            x_t = diffusion.noised(x_0, noise, t)
            ids, texts, conditional = captions.choose(batch.rows, draws.uniform)

            last = micro == config.gradient_accumulation - 1
            with contextlib.nullcontext() if last else accelerator.no_sync(denoiser):
                output = denoiser(x_t, t, ids).float()
                kept, magnitudes = memorization.weigh(
                    output.detach(), x_t, draws.t, batch.rows, texts, conditional, batch.weight > 0, step
                )
                weights = batch.weight * kept
                losses = squared_errors(output, diffusion.target(x_0, noise, t))
                losses = losses * min_snr_weights(diffusion.alpha_bar[t], diffusion.prediction_type, config.snr_gamma)
                loss = weighted_loss(losses, weights, nominal)
                accelerator.backward(loss)
            tally.add(loss, weights, kept, magnitudes, stop.asked)
        totals, records = tally.exchange(accelerator, memorization.records())
        memorization.absorb(records, step)

        grad_norm = 0.0
        moved = totals.kept > 0 and not totals.not_finite
        if moved:
            if config.max_grad_norm:
                grad_norm = float(accelerator.clip_grad_norm_(model.trained, config.max_grad_norm))
            optimizer.step()
            moved = not accelerator.optimizer_step_was_skipped  # fp16's overflow: the loss scale is lowered instead
        optimizer.zero_grad()
        counts.add(moved)
        if moved:
            average.update(counts.updates)
        step += 1

        broken = broken + 1 if totals.not_finite else 0
        if broken >= 5:
            names = ", ".join("/".join(shard_set.ids[row]) for row in batch.rows[:8].tolist())
            raise UserError(
                f"the loss was not finite at five steps in a row, last at step {step} with {names}: "
                "lower learning_rate or set mixed_precision to no"
            )
        if writer is not None and (step % config.log_every == 0 or step == config.steps or totals.not_finite):
            seen = world * nominal
            line = {
                "step": step,
                "loss": totals.loss / world * seen / max(totals.kept, 1),
                "learning_rate": learning_rate(step - 1, config),
                "grad_norm": grad_norm,
                "kept": int(totals.kept),
                "judged": int(totals.judged),
                "dropped": int(totals.dropped),
                "skipped_steps": counts.skipped,
                "samples_per_second": (step - start) * seen / (time.monotonic() - began),
            }
            writer.add(line | memorization.log_line())
            bar.set_postfix_str(f"loss {line['loss']:.4f}, dropped {line['dropped']} of {seen}")
            if config.tracker:
                accelerator.log({name: value for name, value in line.items() if name != "step"}, step=step)
        bar.update(1)

        due = config.checkpoint_every and step % config.checkpoint_every == 0 and step < config.steps
        if totals.asked or due:
            state = collect_state(accelerator, shared, own)
            if accelerator.is_main_process:
                save_checkpoint(checkpoints, step, state, config.keep_checkpoints)
            accelerator.wait_for_everyone()
        if totals.asked:
            bar.close()
            log.info("stopped after step %d of %d; the same command goes on from there", step, config.steps)
            stop.restore()
            accelerator.end_training()
            return {"steps": step, "stopped": True, "model": None}
    bar.close()
    stop.restore()

    average.copy_to_parameters()
    summary: dict[str, Any] = {}
    if accelerator.is_main_process:
        judged = memorization.finish(out, shard_set.ids)
        model.save(out / "model")
        summary = {
            "steps": step,
            **judged,
            "skipped_steps": counts.skipped,
            "processes": world,
            "seconds": round(time.monotonic() - began, 1),
            "model": str(out / "model"),
        }
        write_json(out / "summary.json", summary)
        shutil.rmtree(checkpoints, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return summary


@dataclass
class Counts:
    """How many optimizer steps changed the weights, and how many were skipped."""

    updates: int = 0
    skipped: int = 0

    def add(self, moved: bool) -> None:
        """Count one step."""
        self.updates += moved
        self.skipped += not moved

    def state_dict(self) -> dict[str, int]:
        """What a checkpoint stores."""
        return dataclasses.asdict(self)

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Take over what :meth:`state_dict` gave."""
        vars(self).update(state)


def check_config(config: FinetuneConfig) -> None:
    """Raise :class:`UsageError` for what can be seen to be wrong before anything is loaded."""
    for name in ("steps", "batch_size", "gradient_accumulation", "learning_rate", "log_every"):
        if getattr(config, name) <= 0:
            raise UsageError(f"{name} must be positive, not {getattr(config, name)}")
    if config.snr_gamma < 0:
        raise UsageError(f"snr_gamma must be 0 or more, not {config.snr_gamma}")
    for name in ("ema_decay", "caption_dropout"):
        if not 0 <= getattr(config, name) < 1:
            raise UsageError(f"{name} must lie in [0, 1), not {getattr(config, name)}")
    check_filter(config.filter)


def resolve_precision(name: str) -> Any:
    """The autocast type that ``auto`` stands for on this machine; any other name is itself."""
    if name != "auto":
        return name
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    # CPUs without matrix instructions for it are slower in bf16 than in float32.
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return "bf16" if capabilities.get("amx_bf16") else "no"


def begin(out: Path, config: FinetuneConfig, world: int) -> dict[str, Any] | None:
    """Claim the folder for this configuration; the summary of the run if it is finished already."""
    run = dataclasses.asdict(config) | {"processes": world}
    for free in ("log_every", "checkpoint_every", "keep_checkpoints", "workers", "tracker"):
        run.pop(free)  # these may change between a run and its resumption: the result does not depend on them
    if config.exclude:
        run["exclude"] = ids_digest(config.exclude)
    claim(out, run)
    if (out / "summary.json").is_file() and (out / "model" / "model_index.json").is_file():
        log.info("%s is finished already", out)
        return json.loads((out / "summary.json").read_text())
    return None
