"""``train finetune``: fine-tune Stable Diffusion's UNet, leaving memorized samples out of each batch.

    ./launch.sh configs/finetune.yaml --model DIR --shards OUT/shards --out RUN
    accelerate launch -m train finetune --config configs/finetune.yaml      (the same, by hand)

Read top to bottom: what a step does stands in :func:`train`. Everything random at a step follows from the seed
and the positions of its samples (``data/order.py``, ``model/diffusion.py``), so a run that is killed goes on exactly
where it was.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from afresh.errors import UsageError, UserError
from afresh.files import write_json
from afresh.progress import get_logger, progress
from train.denoising.families.registry import pipeline_family
from train.denoising.latents.scaling import to_network
from train.denoising.network import network_of
from train.denoising.opening.attention import set_attention
from train.finetune.batches.batches import batch_positions, dead_workers_named, make_batches, upcoming_positions
from train.finetune.batches.captions import Captions
from train.finetune.batches.faults import FaultLog
from train.finetune.batches.layout import cache_folder, image_sizes, lay_out
from train.finetune.caches.texts import cache_texts
from train.finetune.config import FinetuneConfig
from train.finetune.data.folders import with_folders_imported
from train.finetune.data.order import derive_seed
from train.finetune.data.scan import scan_once
from train.finetune.data.together import decided, on_first
from train.finetune.data.transfer import to_device
from train.finetune.filter.settings import make_filter
from train.finetune.held_out import HeldOutLoss
from train.finetune.model.diffusion import draw_randomness, sample_posterior, sampling_scheduler, timesteps_of
from train.finetune.model.loss import counted, loss_weights, sample_errors, weighted_loss
from train.finetune.model.speed import of_any_size
from train.finetune.model.trained import load_model
from train.finetune.model_card import write_cards
from train.finetune.preparation import (
    begin,
    check_config,
    keeps_final_state,
    make_accelerator,
    publish,
    resolve_precision,
    say_what_has_no_effect,
    with_numbers,
)
from train.finetune.report import write_report
from train.finetune.state.average import Average
from train.finetune.state.checkpoint import (
    Stateful,
    collect_state,
    keep_last,
    list_checkpoints,
    load_latest,
    remove_partial,
    restore_state,
    save_checkpoint,
)
from train.finetune.state.counts import Counts
from train.finetune.state.log import LossBands, Meter, RunLog, Suspects, Tally, flat_numbers
from train.finetune.state.memory import (
    BATCH_FILE,
    is_out_of_memory,
    memory_advice,
    smaller_batch,
    write_batch,
)
from train.finetune.state.optimizer import learning_rate, make_optimizer, parameter_groups, set_learning_rate
from train.finetune.state.sharding import Spread, SpreadOptimizer, prepare, whole_model
from train.finetune.validation import Validation, send_images
from train.processes import end_training
from train.stopping import StopOnSignal, Stopped

if TYPE_CHECKING:
    from accelerate import Accelerator


log = get_logger(__name__)


def run_finetune(config: FinetuneConfig) -> dict[str, Any]:
    """Train, save the pipeline to ``out/model`` and return the summary.

    A finished run is not repeated; an interrupted one goes on from its newest checkpoint.

    Raises:
        UsageError: the configuration differs from the one that ``out`` was begun with, or is out of range.
        UserError: the model or the shards cannot be read, memory runs out, a checkpoint cannot be written, or the loss
            is not finite several times in a row.
    """
    check_config(config)
    say_what_has_no_effect(config)
    precision = resolve_precision(config.mixed_precision)
    config = dataclasses.replace(config, mixed_precision=precision, filter=config.filter.settled())
    out = Path(config.out)
    while True:
        accelerator = make_accelerator(config)
        summary, attempt = decided(accelerator, partial(begin, out, config, accelerator))
        try:
            if summary is None:
                with StopOnSignal() as stop:
                    summary = train(attempt, config.batch_size, accelerator, stop)
            return publish(out, config, summary) if accelerator.is_main_process else summary
        except Stopped:
            log.info("stopped before the first step; the same command goes on from there")
            end_training(accelerator)
            done = list_checkpoints(out / "checkpoints")
            return {"steps": done[-1][0] if done else 0, "stopped": True, "model": None}
        except UsageError:  # found once the model or the shards were read
            if not (out / "log.jsonl").exists():  # nothing was trained: the folder is free for other settings
                (out / "run.json").unlink(missing_ok=True)
            raise
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if not config.auto_batch_size or attempt.batch_size == 1:
                advice = memory_advice(attempt)
                if list_checkpoints(out / "checkpoints"):
                    advice += " (of these, only auto_batch_size may change in a run that goes on)"
                else:  # nothing to go on from: the folder is free for other settings
                    for name in ("run.json", BATCH_FILE):
                        (out / name).unlink(missing_ok=True)
                raise UserError(f"out of memory; what lowers it: {advice}") from error
            attempt = smaller_batch(attempt)
            write_batch(out, attempt)
            if accelerator.num_processes > 1:
                raise UserError(
                    f"out of memory; started again, the run takes batch_size {attempt.batch_size} and "
                    f"gradient_accumulation {attempt.gradient_accumulation}"
                ) from error
        log.warning(
            "out of memory: going on with batch_size %d and gradient_accumulation %d",
            attempt.batch_size,
            attempt.gradient_accumulation,
        )
        # Here the exception is gone, and with it the tensors that its frames held; what is left goes with these.
        end_training(accelerator)
        accelerator.free_memory()


@dead_workers_named()
def train(config: FinetuneConfig, planned: int, accelerator: Accelerator, stop: StopOnSignal) -> dict[str, Any]:
    """The run from where it stands to its end, or to the step at which it is asked to stop.

    ``planned`` is the batch size that was asked for, of which the one that fits may be a part.
    """
    rank, world, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    out = Path(config.out)
    checkpoints = out / "checkpoints"

    # What is trained.
    model = load_model(config, device, spread=accelerator.is_fsdp2)
    vae = model.pipe.vae
    model.pipe.scheduler = sampling_scheduler(model.pipe.scheduler, config)
    schedule = model.denoiser.schedule_on(model.pipe.scheduler, device)
    optimizer = make_optimizer(parameter_groups(model, config), config, fused=accelerator.scaler is None)
    denoiser, optimizer = prepare(accelerator, model, optimizer)
    trained = model.trained  # only now: where weights are spread, they are others than before
    # Again: what is fastest depends on the device and the precision.
    set_attention(network_of(model.pipe), config.attention, mixed_precision=accelerator.mixed_precision)
    if config.compile:
        network_of(model.pipe).compile()  # in place, so that no name in the state dict changes
    average = Average(trained, config.ema_decay, "cpu" if config.ema_device == "cpu" else None)

    # What it is trained on.
    sizes = image_sizes(config, model.size, model.denoiser.multiple)
    on_first(accelerator, partial(with_folders_imported, config.shards, out, read=True))
    config = dataclasses.replace(config, shards=with_folders_imported(config.shards, out, read=False))
    shard_set = scan_once(config, accelerator)
    config = with_numbers(config, shard_set, world)
    loader, order = lay_out(shard_set, sizes, config, planned)
    texts = cache_texts(model, shard_set, config.cache_text, cache_folder(config), accelerator, stop)
    if texts is not None and not config.validation.every:  # which encodes its prompts each time
        model.encoders_to_cpu()
    dropout, words, tags = config.caption_dropout, config.random_words, config.tags
    captions = Captions(model, shard_set.captions, dropout, texts, words, config.seed, tags)

    def predict_unconditional(x_t: torch.Tensor, t: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
        with accelerator.autocast():
            return model.predict_unconditional(x_t, t, frames)

    nominal = config.batch_size * config.gradient_accumulation  # samples of a step on this process
    samples = world * nominal  # and on all of them
    timestep = timesteps_of(schedule, config)
    memorization = make_filter(
        config, schedule, timestep, predict_unconditional, shard_set, samples, accelerator.is_fsdp2
    )

    # Where it stands: all that a checkpoint holds.
    counts, bands = Counts(), LossBands()
    parts: dict[str, Stateful] = {"model": model, "optimizer": optimizer, "average": average}
    if accelerator.is_fsdp2:
        main = accelerator.is_main_process
        parts = {"model": Spread(model, main), "average": Spread(average, main)}
        parts["optimizer"] = SpreadOptimizer(denoiser, optimizer)
    parts |= {"counts": counts, "bands": bands, "filter": memorization}
    if accelerator.scaler is not None:
        parts["scaler"] = accelerator.scaler
    start = 0
    if (found := load_latest(checkpoints, accelerator)) is not None:
        start = found[0]
        restore_state(found[1], parts)
        log.info("resuming %s after step %d", config.out, start)

    upcoming = upcoming_positions(start, rank, world, config)
    batches = make_batches(loader, order, upcoming, config, vae, accelerator, stop)
    faults = FaultLog(out, rank, batch_positions(start, 0, 0, world, config).start, world)
    if config.trackers:
        accelerator.init_trackers("afresh", config=flat_numbers(dataclasses.asdict(config)))
    writer = draw = held_out = None
    if accelerator.is_main_process:
        remove_partial(checkpoints)
        writer = RunLog(out / "log.jsonl", start)
        if config.validation.every:
            if config.validation.prompts:
                draw = Validation(config.validation, device, accelerator.autocast).draw
            if config.validation.shards:
                held_out = HeldOutLoss(config, model, start, accelerator.autocast).measure
    if config.offload:
        model.offload()
    began, meter = time.monotonic(), Meter()
    bar = progress(total=config.steps, desc="fine-tune", unit="steps")
    bar.update(start)
    step = start
    while step < config.steps:
        set_learning_rate(optimizer, learning_rate(step, config))
        tally, suspects = Tally(device, schedule.timesteps), Suspects()
        for micro in range(config.gradient_accumulation):
            with meter.waiting():
                batch = batches.next()
            faults.add(batch.faults)
            draws = draw_randomness(
                batch.positions,
                batch.latent_shape,
                schedule.timesteps,
                config.seed,
                noise_offset=config.noise_offset,
                input_perturbation=config.input_perturbation,
                timestep=timestep,
            )
            noise, input_noise, t = (to_device(x, device) for x in (draws.noise, draws.input_noise, draws.t))
            readable = batch.weight > 0
            x_0 = to_network(sample_posterior(batch.moments, to_device(draws.posterior, device), 1.0), vae)
            x_0 = torch.where(readable[:, None, None, None], x_0, 0.0)  # what counts nothing may be no number
            x_t = schedule.noised(x_0, input_noise, t)
            x_t = of_any_size(x_t) if config.compile and len(sizes) > 1 else x_t
            prompt, chosen, conditional = captions.choose(batch.rows, draws.uniform, batch.positions)
            prompt = model.denoiser.framed(prompt, batch.frames)

            torch.manual_seed(derive_seed(config.seed, "dropout", batch.positions[0]))  # of adapters' inputs
            last = micro == config.gradient_accumulation - 1
            with contextlib.nullcontext() if last or accelerator.is_fsdp2 else accelerator.no_sync(denoiser):
                with accelerator.autocast():
                    output = denoiser(x_t, t, prompt).float()
                kept, magnitudes = memorization.weigh(
                    output.detach(), x_t, draws.t, batch.rows, chosen, conditional, readable, step, batch.frames
                )
                weights = batch.weight * kept
                target = schedule.target(x_0, noise, t)
                errors = sample_errors(counted(output, weights), target, config.huber_c, batch.mask)
                losses = errors * loss_weights(schedule, t, config)
                loss = weighted_loss(losses, weights, nominal)
                accelerator.backward(loss)
            tally.add(loss, errors, t, readable, weights, kept, magnitudes)
            suspects.add(batch.rows, losses)
        totals, records = tally.exchange(accelerator, memorization.records(), stop.asked)
        memorization.absorb(records, step)

        grad_norm, moved, bad = 0.0, False, totals.not_finite > 0
        if totals.kept and not bad:
            grad_norm = float(accelerator.clip_grad_norm_(trained, config.max_grad_norm or math.inf))
            bad = not math.isfinite(grad_norm) and accelerator.scaler is None
        if totals.kept and not bad:
            optimizer.step()
            moved = not accelerator.optimizer_step_was_skipped  # fp16's overflow: the loss scale is lowered instead
        optimizer.zero_grad()
        overflow = totals.kept > 0 and not bad and not moved  # of fp16
        counts.add(moved, bad or overflow)
        bands.add(totals)
        if moved:
            average.update(counts.updates)
        step += 1

        names: list[str] = []
        if bad or (overflow and counts.bad_in_a_row >= config.max_bad_steps):
            names = ["/".join(shard_set.ids[row]) for row in suspects.rows(accelerator)]
            log.warning("step %d skipped: the loss or its gradient is not finite with %s", step, ", ".join(names[:8]))
            if counts.bad_in_a_row >= config.max_bad_steps:
                raise UserError(
                    f"the loss or its gradient was not finite at {counts.bad_in_a_row} steps in a row, last at step "
                    f"{step} with {', '.join(names[:8])}: lower learning_rate or set mixed_precision to no"
                )
        meter.add(samples)
        if writer is not None and (step % config.log_every == 0 or step == config.steps or bad):
            line = {
                "step": step,
                "loss": totals.loss / world * samples / max(totals.kept, 1),
                "loss_by_band": bands.take() if step % config.log_every == 0 else bands.means(),
                "learning_rate": learning_rate(step - 1, config),
                "grad_norm": grad_norm,
                "kept": int(totals.kept),
                "judged": int(totals.judged),
                "dropped": int(totals.dropped),
                "magnitude": totals.magnitude / totals.judged if totals.judged else None,
                "skipped_steps": counts.skipped,
                **({"not_finite": names} if bad else {}),
                **meter.read(),
            }
            line |= memorization.log_line()
            writer.add(line)
            bar.set_postfix_str(f"loss {line['loss']:.4f}, dropped {line['dropped']} of {samples}")
            accelerator.log(flat_numbers(line), step=step)
        bar.update(1)

        if config.validation.every and step % config.validation.every == 0:
            with average.in_place(), model.brought_back():
                whole = whole_model(config, accelerator, model, device)
                folder = out / "validation" / f"step-{step:06d}"
                if (images := on_first(accelerator, draw, folder, whole.pipe)) is not None:
                    send_images(accelerator.trackers, images, step)
                if (loss_there := on_first(accelerator, held_out, whole, schedule, step)) is not None:
                    accelerator.log({"validation_loss": loss_there}, step=step)
        due = config.checkpoint_every and step % config.checkpoint_every == 0 and step < config.steps
        last = step == config.steps and keeps_final_state(config)
        if totals.asked or due or last:
            state = collect_state(parts)  # by every process: the weights may be spread over them
            on_first(accelerator, save_checkpoint, checkpoints, step, state, config.keep_checkpoints)
            on_first(accelerator, write_report, config, shard_set, memorization.table, step, None)
        if totals.asked:
            bar.close()
            log.info("stopped after step %d of %d; the same command goes on from there", step, config.steps)
            end_training(accelerator)
            return {"steps": step, "stopped": True, "model": None}
    bar.close()
    if not counts.updates and accelerator.is_main_process:
        log.warning("none of the %d steps changed the weights: the model is what it was", step)

    replaced = accelerator.reduce(torch.tensor(faults.count, device=device), reduction="sum")
    average.copy_to_parameters()
    model = whole_model(config, accelerator, model, torch.device("cpu"))
    summary: dict[str, Any] = {}
    save = partial(model.save, half=config.save_dtype == "float16", single_file=config.save_single_file)
    on_first(accelerator, save, out / "model")
    if accelerator.is_main_process:
        judged = memorization.finish(out, shard_set.ids)
        summary = {
            "steps": step,
            **judged,
            "skipped_steps": counts.skipped,
            "replaced": int(replaced),
            "left_out": shard_set.left_out,
            "processes": world,
            "seconds": round(time.monotonic() - began, 1),
            "model": str(out / "model"),
        }
        size = config.resolution or model.size
        family = pipeline_family(model.pipe)
        write_cards(config, summary, shard_set.urls, len(shard_set), size, schedule.space, family)
        write_json(out / "summary.json", summary)
        write_report(config, shard_set, memorization.table, step, summary)
        keep_last(checkpoints, int(keeps_final_state(config)))
    accelerator.wait_for_everyone()
    end_training(accelerator)
    return summary

