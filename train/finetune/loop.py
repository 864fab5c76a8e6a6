"""``train finetune``: fine-tune Stable Diffusion's UNet, leaving memorized samples out of each batch.

    ./launch.sh configs/finetune.yaml --model DIR --shards OUT/shards --out RUN
    accelerate launch -m train finetune --config configs/finetune.yaml      (the same, by hand)

Read top to bottom: what a step does stands in :func:`run_finetune`. Everything random at a step follows from the seed
and the positions of its samples (``train.finetune.data``), so a run that is killed goes on exactly where it was.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from curate.console import UsageError, UserError, claim, get_logger, progress, write_json
from train.components import load_pipeline, pixel_size, set_attention, tokenize
from train.finetune.checkpoint import load_latest, save_checkpoint
from train.finetune.config import FinetuneConfig
from train.finetune.data import CachedBatches, CachedLatents, Positions, ShardOrder, StreamedBatches, generator, scan
from train.finetune.filter import VerdictTable, filter_weights, is_judged
from train.finetune.loss import min_snr_weights, weighted_loss
from train.memorization.magnitude import to_eps

if TYPE_CHECKING:
    from accelerate import Accelerator
    from diffusers import StableDiffusionPipeline

log = get_logger(__name__)


class Denoiser(torch.nn.Module):
    """Text encoder and UNet as one module, so that both train under one data-parallel wrapper."""

    def __init__(self, unet: torch.nn.Module, text_encoder: torch.nn.Module) -> None:
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def encode(self, ids: torch.Tensor) -> torch.Tensor:
        """Prompt embeddings ``[n, tokens, width]`` of token ids ``[n, tokens]``."""
        trained = any(parameter.requires_grad for parameter in self.text_encoder.parameters())
        with contextlib.nullcontext() if trained else torch.no_grad():
            return self.text_encoder(ids)[0]

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """The UNet's output for noised latents ``[n, 4, h, w]``, timesteps ``[n]`` and token ids ``[n, tokens]``."""
        embeddings = self.encode(ids)
        return self.unet(x_t, t, embeddings.expand(len(x_t), -1, -1)).sample


def learning_rate(step: int, config: FinetuneConfig) -> float:
    """The learning rate at an optimizer step: linear warm-up, then the schedule; a pure function of the step."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(config.steps - config.warmup_steps, 1)
    shape = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
    return config.learning_rate * shape[config.lr_schedule]


def batch_positions(step: int, micro: int, rank: int, world: int, config: FinetuneConfig) -> range:
    """Positions of the samples that a process takes in one forward pass."""
    start = ((step * config.gradient_accumulation + micro) * world + rank) * config.batch_size
    return range(start, start + config.batch_size)


def draw_randomness(
    positions: range, shape: tuple[int, ...], timesteps: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """All random numbers of a batch, one generator a sample.

    Returns:
        posterior noise ``[n, *shape]``, diffusion noise ``[n, *shape]``, timesteps ``[n]`` int64 in
        [0, ``timesteps``), and two uniform numbers ``[n, 2]`` for the caption and its dropout.
    """
    posterior, noise, times, uniform = [], [], [], []
    for position in positions:
        g = generator(seed, "step", position)
        posterior.append(torch.randn(shape, generator=g))
        noise.append(torch.randn(shape, generator=g))
        times.append(torch.randint(timesteps, (), generator=g))
        uniform.append(torch.rand(2, generator=g))
    return torch.stack(posterior), torch.stack(noise), torch.stack(times), torch.stack(uniform)


def choose_caption(captions: tuple[str, ...], uniform: torch.Tensor, dropout: float) -> tuple[str, bool]:
    """One of a sample's captions, or the empty one; and whether the sample is conditional."""
    if uniform[1] < dropout:
        return "", False
    text = captions[min(int(uniform[0] * len(captions)), len(captions) - 1)]
    return text, bool(text)


def run_finetune(config: FinetuneConfig) -> dict[str, Any]:
    """Train, save the pipeline to ``out/model`` and return the summary.

    A finished run is not repeated; an interrupted one goes on from its newest checkpoint.

    Raises:
        UsageError: the configuration differs from the one that ``out`` was begun with, or is out of range.
        UserError: the model or the shards cannot be read, or the loss is not finite several times in a row.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    check_config(config)
    config = dataclasses.replace(config, mixed_precision=resolve_precision(config.mixed_precision))
    out = Path(config.out)
    AcceleratorState._reset_state()  # an earlier run in this process may have had another precision
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        log_with=config.tracker,
        project_dir=config.out if config.tracker else None,
    )
    rank, world = accelerator.process_index, accelerator.num_processes
    with accelerator.main_process_first():
        done = begin(out, config, world)
    if done is not None:
        return done

    pipe = load_pipeline(config.model, attention=config.attention)
    size = pixel_size(pipe)
    scheduler = pipe.scheduler
    prediction_type = scheduler.config.prediction_type
    if prediction_type not in ("epsilon", "v_prediction"):
        raise UserError(f"{config.model}: a model that predicts {prediction_type!r} cannot be trained here")
    alpha_bar = scheduler.alphas_cumprod.to(accelerator.device)
    vae = pipe.vae.to(accelerator.device).requires_grad_(False)
    denoiser = Denoiser(pipe.unet.requires_grad_(True), pipe.text_encoder.requires_grad_(config.train_text_encoder))
    denoiser.train()
    if config.gradient_checkpointing:
        pipe.unet.enable_gradient_checkpointing()
    trained = [p for p in denoiser.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained,
        lr=config.learning_rate,
        betas=(0.9, config.adam_beta2),
        weight_decay=config.weight_decay,
        # One pass over the weights. With fp16's loss scaling a fused step hides whether an overflow skipped it, which
        # the count of updates and the average must know.
        fused=accelerator.scaler is None,
    )
    denoiser, optimizer = accelerator.prepare(denoiser, optimizer)
    set_attention(pipe.unet, config.attention)
    bare = accelerator.unwrap_model(denoiser)
    trained = [p for p in bare.parameters() if p.requires_grad]
    average = [p.detach().clone() for p in trained] if config.ema_decay else []

    shard_set = scan(config.shards)
    order = ShardOrder(shard_set.counts, config.shuffle_shards, config.seed)
    table = VerdictTable(order.size)
    empty_ids = tokenize(pipe, [""]).to(accelerator.device)
    token_ids = tokenize(pipe, [text for texts in shard_set.captions for text in texts])
    first_caption = torch.tensor([0, *[len(texts) for texts in shard_set.captions]]).cumsum(0)

    start, skipped, updates = 0, 0, 0
    checkpoints = out / "checkpoints"
    if (found := load_latest(checkpoints)) is not None:
        start, state = found
        bare.load_state_dict(state["model"], strict=False)
        optimizer.load_state_dict(state["optimizer"])
        for mine, saved in zip(average, state["average"], strict=True):
            mine.copy_(saved)
        table.load_state_dict(state["tables"][rank])
        skipped, updates = state["skipped"], state["updates"]
        if accelerator.scaler is not None and state["scaler"]:
            accelerator.scaler.load_state_dict(state["scaler"])
        log.info("resuming %s after step %d", config.out, start)

    dataset = Positions(shard_set, order, size, config.seed, config.augmentation)
    upcoming = [
        batch_positions(step, micro, rank, world, config)
        for step in range(start, config.steps)
        for micro in range(config.gradient_accumulation)
    ]
    batches: CachedBatches | StreamedBatches
    if config.cache_latents:
        batches = CachedLatents(dataset, vae, accelerator).batches(upcoming)
    else:
        batches = StreamedBatches(dataset, upcoming, config.workers)
    if config.tracker:
        accelerator.init_trackers("afresh")

    nominal = config.batch_size * config.gradient_accumulation
    writer = RunLog(out / "log.jsonl", start) if accelerator.is_main_process else None
    stop = StopOnSignal()
    began, broken = time.monotonic(), 0
    bar = progress(total=config.steps, desc="fine-tune", unit="steps")
    bar.update(start)
    step = start
    while step < config.steps:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        # [kept samples, judged, dropped, summed loss, finite?, asked to stop] over micro-steps, then ranks.
        tally = torch.zeros(6, device=accelerator.device)
        for micro in range(config.gradient_accumulation):
            positions = batch_positions(step, micro, rank, world, config)
            batch = batches.next(vae, accelerator.device)
            rows = batch["row"]
            mean, logvar = batch["moments"].chunk(2, dim=1)
            posterior, noise, t, uniform = draw_randomness(
                positions, tuple(mean.shape[1:]), scheduler.config.num_train_timesteps, config.seed
            )
            posterior, noise, t = (x.to(accelerator.device) for x in (posterior, noise, t))
            x_0 = (mean + (0.5 * logvar.clamp(-30, 20)).exp() * posterior) * vae.config.scaling_factor
            x_t = scheduler.add_noise(x_0, noise, t)
            ids, conditional = gather_captions(
                rows, shard_set.captions, token_ids, first_caption, empty_ids, uniform, config.caption_dropout
            )
            judged = is_judged(t, conditional, config.filter, step) & batch["readable"]
            weights = batch["readable"].float()

            last = micro == config.gradient_accumulation - 1
            with contextlib.nullcontext() if last else accelerator.no_sync(denoiser):
                eps_uncond = None
                if config.filter.policy != "off":
                    # Outside the data-parallel wrapper and without gradients: ranks need not agree on whether.
                    with torch.no_grad(), accelerator.autocast():
                        eps_uncond = bare(x_t, t, empty_ids)
                output = denoiser(x_t, t, ids).float()
                magnitudes = torch.full((len(t),), float("nan"), device=accelerator.device)
                if eps_uncond is not None:
                    eps_cond = to_eps(output.detach(), x_t, alpha_bar[t], prediction_type)
                    eps_uncond = to_eps(eps_uncond.float(), x_t, alpha_bar[t], prediction_type)
                    kept, magnitudes = filter_weights(eps_cond, eps_uncond, judged, config.filter)
                    weights = weights * kept
                target = noise if prediction_type == "epsilon" else scheduler.get_velocity(x_0, noise, t)
                losses = F.mse_loss(output, target, reduction="none").flatten(1).mean(dim=1)
                losses = losses * min_snr_weights(alpha_bar[t], prediction_type, config.snr_gamma)
                loss = weighted_loss(losses, weights, nominal)
                accelerator.backward(loss)
            table.record(rows, t, weights, magnitudes)
            finite = bool(torch.isfinite(loss))
            tally += torch.tensor(
                [
                    float((weights > 0).sum()),
                    float((~magnitudes.isnan()).sum()),
                    float((judged & (weights == 0)).sum()),
                    float(loss.detach()) if finite else 0.0,
                    float(not finite),
                    float(stop.asked),
                ],
                device=accelerator.device,
            )
        tally = accelerator.reduce(tally, reduction="sum")  # the one exchange beside the gradients'
        kept_samples, judged_samples, dropped_samples, loss_sum, not_finite, asked = tally.tolist()
        if kept_samples and not not_finite:
            norm = (
                float(accelerator.clip_grad_norm_(trained, config.max_grad_norm)) if config.max_grad_norm else 0.0
            )
            optimizer.step()
            overflow = accelerator.optimizer_step_was_skipped  # fp16: the loss scale is lowered instead
            updates += not overflow
            skipped += overflow
            if average and not overflow:
                # Warm-up as in the literature: the average follows closely while the weights still move fast.
                decay = min(config.ema_decay, (1 + updates) / (10 + updates))
                torch._foreach_lerp_(average, [p.detach() for p in trained], 1 - decay)
        else:
            norm = 0.0
            skipped += 1
        optimizer.zero_grad()
        step += 1
        broken = broken + 1 if not_finite else 0
        if broken >= 5:
            names = ", ".join("/".join(shard_set.ids[row]) for row in rows[:8].tolist())
            raise UserError(
                f"the loss was not finite at five steps in a row, last at step {step} with {names}: "
                "lower learning_rate or set mixed_precision to no"
            )
        if writer is not None and (step % config.log_every == 0 or step == config.steps or not_finite):
            seen = world * nominal
            line = {
                "step": step,
                "loss": loss_sum / world * seen / max(kept_samples, 1),
                "learning_rate": learning_rate(step - 1, config),
                "grad_norm": norm,
                "kept": int(kept_samples),
                "judged": int(judged_samples),
                "dropped": int(dropped_samples),
                "skipped_steps": skipped,
                "samples_per_second": (step - start) * seen / (time.monotonic() - began),
            }
            writer.add(line)
            bar.set_postfix_str(f"loss {line['loss']:.4f}, dropped {int(dropped_samples)} of {seen}")
            if config.tracker:
                accelerator.log({name: value for name, value in line.items() if name != "step"}, step=step)
        bar.update(1)
        due = config.checkpoint_every and step % config.checkpoint_every == 0 and step < config.steps
        if asked or due:
            tables = gather_tables(accelerator, table)
            if accelerator.is_main_process:
                state = {
                    "model": {k: v for k, v in bare.state_dict().items() if config.train_text_encoder or "unet" in k},
                    "optimizer": optimizer.state_dict(),
                    "average": average,
                    "tables": tables,
                    "scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else {},
                    "skipped": skipped,
                    "updates": updates,
                }
                save_checkpoint(checkpoints, step, state, config.keep_checkpoints)
            accelerator.wait_for_everyone()
        if asked:
            bar.close()
            log.info("stopped after step %d of %d; the same command goes on from there", step, config.steps)
            stop.restore()
            accelerator.end_training()
            return {"steps": step, "stopped": True, "model": None}
    bar.close()
    stop.restore()

    if average:
        for parameter, mean_weight in zip(trained, average, strict=True):
            parameter.data.copy_(mean_weight)
    tables = gather_tables(accelerator, table)
    summary: dict[str, Any] = {}
    if accelerator.is_main_process:
        whole = VerdictTable(order.size)
        whole.load_state_dict({k: torch.stack([t[k] for t in tables]).sum(0) for k in tables[0]})
        whole.write(out / "verdicts.parquet", shard_set.ids)
        save_model(pipe, bare, out / "model")
        summary = {
            "steps": step,
            "samples_seen": int(whole.seen.sum()),
            "judged": int(whole.judged_by_band.sum()),
            "dropped": int(whole.dropped.sum()),
            "samples_dropped_at_least_once": int((whole.dropped > 0).sum()),
            "skipped_steps": skipped,
            "processes": world,
            "seconds": round(time.monotonic() - began, 1),
            "model": str(out / "model"),
        }
        write_json(out / "summary.json", summary)
        shutil.rmtree(checkpoints, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return summary


def gather_captions(
    rows: torch.Tensor,
    captions: list[tuple[str, ...]],
    token_ids: torch.Tensor,
    first_caption: torch.Tensor,
    empty_ids: torch.Tensor,
    uniform: torch.Tensor,
    dropout: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids ``[n, tokens]`` of each row's chosen caption, and whether it is conditional ``[n]`` bool."""
    ids, conditional = [], []
    for row, numbers in zip(rows.tolist(), uniform, strict=True):
        texts = captions[row]
        text, is_conditional = choose_caption(texts, numbers, dropout)
        conditional.append(is_conditional)
        ids.append(token_ids[first_caption[row] + texts.index(text)] if is_conditional else empty_ids[0].cpu())
    return torch.stack(ids).to(empty_ids.device), torch.tensor(conditional, device=empty_ids.device)


def gather_tables(accelerator: Accelerator, table: VerdictTable) -> list[dict[str, torch.Tensor]]:
    """Every rank's verdict table, on each rank."""
    from accelerate.utils import gather_object

    return gather_object([table.state_dict()]) if accelerator.num_processes > 1 else [table.state_dict()]


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
    if config.filter.policy != "off" and config.filter.threshold <= 0:
        raise UsageError(f"filter.threshold must be positive, not {config.filter.threshold}")


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
    claim(out, run)
    if (out / "summary.json").is_file() and (out / "model" / "model_index.json").is_file():
        log.info("%s is finished already", out)
        return json.loads((out / "summary.json").read_text())
    return None


def save_model(pipe: StableDiffusionPipeline, denoiser: Denoiser, folder: Path) -> None:
    """Write the pipeline aside and rename it, so that a model folder is never half a model."""
    pipe.unet, pipe.text_encoder = denoiser.unet.eval(), denoiser.text_encoder.eval()
    aside = folder.with_name(folder.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    pipe.save_pretrained(aside)
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)


class RunLog:
    """``log.jsonl``, a line per logged step; lines of steps that a resumed run repeats are cut off first."""

    def __init__(self, path: Path, start: int) -> None:
        self.path = path
        kept = [line for line in self._lines() if json.loads(line)["step"] <= start]
        path.write_text("".join(kept))

    def _lines(self) -> Iterator[str]:
        if self.path.is_file():
            for line in self.path.read_text().splitlines(keepends=True):
                if line.endswith("\n"):
                    yield line

    def add(self, line: dict[str, Any]) -> None:
        """Append one line."""
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


class StopOnSignal:
    """Turns SIGTERM and SIGUSR1 into a wish that the loop grants at the end of its step."""

    def __init__(self) -> None:
        self.asked = False
        self._before = {}
        for number in (signal.SIGTERM, signal.SIGUSR1):
            with contextlib.suppress(ValueError):  # not the main thread: a caller's own loop decides
                self._before[number] = signal.signal(number, self._ask)

    def _ask(self, *_: object) -> None:
        self.asked = True

    def restore(self) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
