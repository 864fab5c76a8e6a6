"""Detection: how strongly the prompt, rather than the noise, decides the first denoising steps.

Wen et al., "Detecting, Explaining, and Mitigating Memorization in Diffusion Models" (ICLR 2024), §4: the
detection score of a prompt is its text-conditional noise magnitude, averaged over steps and initial noises;
the first step of one noise already tells much.

    pipe = load_pipeline("train/assets/sample_model")
    scores = score(pipe, ["grinning face, face smiling"], steps=5)
    scores.per_prompt()                    # [prompts]
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from curate.console import Progress, UsageError, UserError, get_logger, progress, write_atomic, write_json
from train.components import encode_captions, load_pipeline
from train.memorization.config import MEMORIZED, DetectConfig
from train.memorization.magnitude import Form, magnitude, to_eps
from train.memorization.roc import bootstrap_interval, roc_auc, roc_curve, tpr_at_fpr
from train.memorization.thresholds import FILE, calibrate
from train.prompts import Prompt, read_prompts

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

SIGNALS = ("magnitude",)


@dataclass(frozen=True)
class Scores:
    """What :func:`score` found."""

    seeds: NDArray[np.int64]
    """``[prompts, seeds]``: the seed of every initial noise."""
    timesteps: NDArray[np.int64]
    """``[steps]``: where the magnitudes were taken."""
    magnitudes: NDArray[np.float32]
    """``[prompts, seeds, steps]``: the magnitude along the trajectory."""
    evaluations: int
    """Denoiser evaluations spent, counted in single images."""

    def signal(self, name: str = "magnitude") -> NDArray[np.float32]:
        """``[prompts, seeds]``; the magnitude is averaged over the steps."""
        if name not in SIGNALS:
            raise UsageError(f"unknown signal {name!r}: choose from {', '.join(SIGNALS)}")
        return self.magnitudes.mean(axis=2)

    def per_prompt(self, name: str = "magnitude") -> NDArray[np.float32]:
        """``[prompts]``: the signal averaged over the seeds; higher = more likely memorized."""
        return self.signal(name).mean(axis=1)


@torch.no_grad()
def score(
    pipe: StableDiffusionPipeline,
    prompts: Sequence[str],
    *,
    steps: int = 1,
    num_inference_steps: int = 50,
    seeds: int | Sequence[int] | NDArray[np.int64] = 4,
    guidance_scale: float = 7.5,
    signals: Sequence[str] = SIGNALS,
    form: Form = "l2",
    batch_size: int = 32,
    bar: Progress | None = None,
) -> Scores:
    """Follow the guided DDIM trajectory of every prompt and seed for its first ``steps`` steps.

    Each step is one UNet call on the batch's unconditional and conditional halves together; the last step
    needs no update of the latents. A seed gives the same initial noise whatever the prompt, batch or device.

    Args:
        pipe: any Stable Diffusion pipeline; its scheduler's noise schedule and prediction type are taken
            over, and neither it nor any other part is changed.
        prompts: captions.
        steps: steps to score, from the first (t near T).
        num_inference_steps: steps of the whole trajectory.
        seeds: how many (0, 1, …), or which ones; ``[prompts, seeds]`` gives each prompt its own.
        guidance_scale: classifier-free guidance scale that the trajectory follows.
        signals: what is to be computed.
        form: of the magnitude.
        batch_size: prompt and seed pairs per UNet call (which then holds twice as many images).
        bar: told of each pair that is done.

    Raises:
        UsageError: no prompt, no seed, an unknown signal, or ``steps`` out of range.
    """
    from diffusers import DDIMScheduler

    _check(steps, num_inference_steps, signals, batch_size)
    table = np.arange(seeds) if isinstance(seeds, int) else np.asarray(seeds, np.int64)
    table = np.broadcast_to(table, (len(prompts), table.shape[-1]))
    if table.size == 0:
        raise UsageError("nothing to score: there must be at least one prompt and one seed")

    unet, device, dtype = pipe.unet, pipe.unet.device, pipe.unet.dtype
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(num_inference_steps)
    timesteps = scheduler.timesteps[:steps].tolist()
    prediction_type = scheduler.config.prediction_type
    side = unet.config.sample_size
    shape = (unet.config.in_channels, *((side, side) if isinstance(side, int) else side))
    empty = encode_captions(pipe, [""])

    pairs = [(row, column) for row in range(len(prompts)) for column in range(table.shape[1])]
    magnitudes = np.empty((*table.shape, steps), np.float32)
    for start in range(0, len(pairs), batch_size):
        batch = pairs[start : start + batch_size]
        x_t = torch.stack([_noise(shape, int(table[pair])) for pair in batch]).to(device, dtype)
        x_t = x_t * scheduler.init_noise_sigma
        embeds = _embed(pipe, prompts, [row for row, _ in batch])
        embeds = torch.cat([empty.expand_as(embeds), embeds])
        for step, t in enumerate(timesteps):
            output = unet(torch.cat([x_t, x_t]), t, encoder_hidden_states=embeds, return_dict=False)[0]
            output_uncond, output_cond = output.float().chunk(2)
            alpha_bar = scheduler.alphas_cumprod[t]
            m = magnitude(
                to_eps(output_cond, x_t.float(), alpha_bar, prediction_type),
                to_eps(output_uncond, x_t.float(), alpha_bar, prediction_type),
                form=form,
            )
            for pair, value in zip(batch, m.tolist(), strict=True):
                magnitudes[(*pair, step)] = value
            if step + 1 < steps:
                guided = output_uncond + guidance_scale * (output_cond - output_uncond)
                x_t = scheduler.step(guided, t, x_t.float(), return_dict=False)[0].to(dtype)
        if bar is not None:
            bar.update(len(batch))
    if not np.isfinite(magnitudes).all():
        row = int(np.argwhere(~np.isfinite(magnitudes))[0][0])
        raise UserError(f"prompt {prompts[row]!r}: the model's predictions are not finite; try dtype float32")
    return Scores(table.copy(), np.array(timesteps, np.int64), magnitudes, 2 * len(pairs) * steps)


def _check(steps: int, num_inference_steps: int, signals: Sequence[str], batch_size: int) -> None:
    unknown = [name for name in signals if name not in SIGNALS]
    if unknown or not signals:
        raise UsageError(f"unknown signal {', '.join(unknown) or 'list []'}: choose from {', '.join(SIGNALS)}")
    if not 1 <= steps <= num_inference_steps:
        raise UsageError(f"steps is {steps}: expected 1 to num_inference_steps, which is {num_inference_steps}")
    if batch_size < 1:
        raise UsageError(f"batch_size is {batch_size}: expected at least 1")


def _noise(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Drawn on the CPU in float32, so that a seed means one noise on every device and in every dtype."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _embed(pipe: StableDiffusionPipeline, prompts: Sequence[str], rows: Sequence[int]) -> torch.Tensor:
    """The prompts of a batch, each encoded once."""
    unique = list(dict.fromkeys(rows))
    return encode_captions(pipe, [prompts[row] for row in unique])[[unique.index(row) for row in rows]]


def run_detect(config: DetectConfig) -> dict[str, Any]:
    """The job behind ``train detect``: read prompts, score, write the table, summary and chart.

    Returns: The summary; with labels of both kinds it holds ``auc`` and ``tpr_at_1pct_fpr`` (strict) of each
        signal, with bootstrap intervals.

    Raises:
        UserError: the prompts or the model cannot be used.
    """
    if Path(config.out).suffix != ".parquet":
        raise UsageError(f"out is {config.out!r}: expected a file that ends in .parquet")
    if config.seeds < 1:
        raise UsageError(f"seeds is {config.seeds}: expected at least 1")
    if not 0 <= config.calibrate < 1:
        raise UsageError(f"calibrate is {config.calibrate}: expected a share in [0, 1)")
    _check(config.steps, config.num_inference_steps, config.signals, config.batch_size)
    prompts = read_prompts(config.prompts)
    if config.calibrate:
        clean_prompts(prompts)  # so that a file without any is refused at once
    first = [config.first_seed if prompt.seed is None else prompt.seed for prompt in prompts]
    seeds = np.array(first)[:, None] + np.arange(config.seeds)
    outcomes = read_outcomes(config.outcomes, prompts) if config.outcomes else None
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = load_pipeline(
        config.model,
        dtype=getattr(torch, config.dtype),
        device=device,
        revision=config.revision,
        variant=config.variant,
        model_config=config.model_config,
        lora=config.lora,
    )

    start = time.perf_counter()
    with progress(total=seeds.size, desc="detect", unit="trajectories") as bar:
        scores = score(
            pipe,
            [prompt.caption for prompt in prompts],
            steps=config.steps,
            num_inference_steps=config.num_inference_steps,
            seeds=seeds,
            guidance_scale=config.scale,
            signals=config.signals,
            form=config.form,
            batch_size=config.batch_size,
            bar=bar,
        )
    seconds = time.perf_counter() - start
    write_rows(config.out, prompts, scores, outcomes)
    summary = summarise(prompts, scores, config.signals, outcomes, bootstrap=config.bootstrap)
    summary |= {
        "out": config.out,
        "form": config.form,
        "scale": config.scale,
        "num_inference_steps": config.num_inference_steps,
        "seconds_per_prompt": seconds / len(prompts),
    }
    if config.calibrate:
        summary["calibrated"] = write_thresholds(config, prompts, scores, pipe.scheduler.config.num_train_timesteps)
    out = Path(config.out)
    if "auc" in summary:
        chart = out.with_suffix(".png")
        draw_chart(chart, prompts, scores, config.signals)
        summary["chart"] = str(chart)
    write_json(out.with_suffix(".json"), summary)
    get_logger(__name__).info(f"wrote {out}")
    return summary


def clean_prompts(prompts: Sequence[Prompt]) -> list[int]:
    """The prompts that are known not to be memorized: those of label 0, or all where none has a label.

    Raises:
        UserError: there are none.
    """
    labels = [prompt.label for prompt in prompts]
    clean = [row for row, label in enumerate(labels) if label == 0 or set(labels) == {None}]
    if not clean:
        raise UserError("calibrate needs prompts known not to be memorized: none has label 0")
    return clean


def write_thresholds(
    config: DetectConfig, prompts: Sequence[Prompt], scores: Scores, train_timesteps: int
) -> dict[str, Any]:
    """Find the thresholds of ``config.calibrate``, write them with the model, and return them and their file."""
    clean = clean_prompts(prompts)
    found = {"form": config.form, "false_positive_rate": config.calibrate, "prompts": len(clean)}
    found |= calibrate(scores.magnitudes[clean], scores.timesteps, config.calibrate, train_timesteps)
    found |= {name: getattr(config, name) for name in ("steps", "num_inference_steps", "seeds", "scale")}
    folder = Path(config.model)
    path = folder / FILE if folder.is_dir() else Path(config.out).with_suffix(f".{FILE}")
    write_json(path, found)
    return {"threshold": found["threshold"], "file": str(path)}


def read_outcomes(path: str | Path, prompts: Sequence[Prompt]) -> NDArray[np.float32]:
    """``[prompts]``: the highest similarity to a training image among the images drawn for each prompt.

    Args:
        path: folder of ``train sample --index``, or its ``samples.parquet``.
        prompts: what is asked for, found by caption.

    Raises:
        UserError: there is no such table, it was written without an index, or it lacks a prompt.
    """
    import pyarrow.parquet as parquet

    path = Path(path)
    table = path / "samples.parquet" if path.is_dir() else path
    if not table.is_file():
        raise UserError(f"{table}: missing; train sample --index writes it")
    highest: dict[str, float] = {}
    for row in parquet.read_table(table, columns=["prompt", "similarity"]).to_pylist():
        if row["similarity"] is None:
            raise UserError(f"{table}: holds no similarities; draw with train sample --index")
        highest[row["prompt"]] = max(row["similarity"], highest.get(row["prompt"], -1.0))
    missing = [prompt.caption for prompt in prompts if prompt.caption not in highest]
    if missing:
        raise UserError(f"{table}: no image of {missing[0]!r}; draw every prompt of the file")
    return np.array([highest[prompt.caption] for prompt in prompts], np.float32)


def write_rows(
    path: str | Path, prompts: Sequence[Prompt], scores: Scores, outcomes: NDArray[np.float32] | None = None
) -> None:
    """One row a prompt and seed: ``prompt`` (its row in the file), ``caption, label, seed, magnitude``, the
    magnitude of every step in ``magnitude_by_step`` with its ``timesteps``, and ``outcome`` (see
    :func:`read_outcomes`; null without).
    """
    import pyarrow as pa
    import pyarrow.parquet as parquet

    n, s = scores.seeds.shape
    rows = [row for row in range(n) for _ in range(s)]
    table = pa.table(
        {
            "prompt": pa.array(rows, pa.int64()),
            "caption": pa.array([prompts[row].caption for row in rows], pa.string()),
            "label": pa.array([prompts[row].label for row in rows], pa.int8()),
            "seed": pa.array(scores.seeds.ravel(), pa.int64()),
            "magnitude": pa.array(scores.signal("magnitude").ravel(), pa.float32()),
            "magnitude_by_step": pa.array(scores.magnitudes.reshape(n * s, -1).tolist(), pa.list_(pa.float32())),
            "timesteps": pa.array([scores.timesteps.tolist()] * (n * s), pa.list_(pa.int64())),
            "outcome": pa.array([None if outcomes is None else outcomes[row] for row in rows], pa.float32()),
        }
    )
    with write_atomic(path) as temporary:
        parquet.write_table(table, temporary)


def summarise(
    prompts: Sequence[Prompt],
    scores: Scores,
    signals: Sequence[str] = SIGNALS,
    outcomes: NDArray[np.float32] | None = None,
    *,
    bootstrap: int = 1000,
) -> dict[str, Any]:
    """Counts, the prompts that score highest, and how well each signal separates: with labels of both kinds by
    label, and with outcomes by outcome, in ``by_outcome``.

    The two differ where a caption that was never trained on is near enough to a memorized one to draw its image
    (labelled 0, memorized in outcome), or a repeated caption draws something else. ``less_contradicted`` goes by
    label, without the prompts of label 0 that draw a copy.
    """
    labels = np.array([-1 if prompt.label is None else prompt.label for prompt in prompts])
    values = {name: scores.per_prompt(name) for name in signals}
    summary: dict[str, Any] = {
        "prompts": len(prompts),
        "seeds": scores.seeds.shape[1],
        "steps": len(scores.timesteps),
        "timesteps": scores.timesteps.tolist(),
        "signals": list(signals),
        "evaluations": scores.evaluations,
        **separation(values, labels, bootstrap=bootstrap),
    }
    if outcomes is not None:
        drawn = (outcomes > MEMORIZED).astype(np.int64)
        contradicted = (labels == 0) & (drawn == 1)
        summary["by_outcome"] = separation(values, drawn, bootstrap=bootstrap) | {
            "label_0_memorized": int(contradicted.sum()),
            "label_1_not_memorized": int(((labels == 1) & (drawn == 0)).sum()),
        }
        # 0 says that a prompt is known not to be memorized, which one that draws a copy is not.
        summary["less_contradicted"] = separation(values, np.where(contradicted, -1, labels), bootstrap=bootstrap)
    first = signals[0]
    summary["highest"] = [
        {first: float(values[first][row]), "label": prompts[row].label, "caption": prompts[row].caption}
        for row in np.argsort(-values[first], kind="stable")[:5]
    ]
    return summary


def separation(
    values: Mapping[str, NDArray[np.float32]], labels: NDArray[np.int64], *, bootstrap: int = 1000
) -> dict[str, Any]:
    """How well signals tell 1 from 0; empty unless both occur.

    Args:
        values: signal → ``[n]``, higher = more likely memorized.
        labels: ``[n]``, 1 memorized, 0 not, -1 unknown (left out).
        bootstrap: resamples behind the 95 % intervals; 0 leaves them out.

    Returns:
        ``memorized`` and ``not_memorized`` (counts); by signal ``auc``, ``tpr_at_1pct_fpr`` (strict), and their
        ``…_interval``.
    """
    known = labels >= 0
    if not {0, 1} <= set(labels.tolist()):
        return {}
    result: dict[str, Any] = {"memorized": int((labels == 1).sum()), "not_memorized": int((labels == 0).sum())}
    for key, statistic in (("auc", roc_auc), ("tpr_at_1pct_fpr", tpr_at_fpr)):
        result[key] = {name: statistic(column[known], labels[known]) for name, column in values.items()}
        result[f"{key}_interval"] = {
            name: bootstrap_interval(statistic, column[known], labels[known], samples=bootstrap)
            for name, column in values.items()
            if bootstrap
        }
    return result


def draw_chart(path: str | Path, prompts: Sequence[Prompt], scores: Scores, signals: Sequence[str] = SIGNALS) -> None:
    """A PNG with, for every signal, the histogram of both labels' prompts and the ROC."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    labels = np.array([-1 if prompt.label is None else prompt.label for prompt in prompts])
    figure = Figure(figsize=(9, 3.4 * len(signals)), layout="constrained", dpi=130)
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(signals), 2, squeeze=False)
    for (histogram, roc), name in zip(axes, signals, strict=True):
        values = scores.per_prompt(name)
        bins = np.linspace(values.min(), values.max() + 1e-9, 31)
        for label, colour, words in ((0, "#4c78a8", "not memorized"), (1, "#d1495b", "memorized")):
            chosen = values[labels == label]
            share = np.full(len(chosen), 1 / max(1, len(chosen)))
            histogram.hist(chosen, bins, weights=share, color=colour, alpha=0.7, label=f"{words} ({len(chosen)})")
        steps = len(scores.timesteps)
        histogram.set(
            xlabel=f"{name}, {steps} step{'s' * (steps > 1)}, {scores.seeds.shape[1]} seeds",
            ylabel="share of prompts",
        )
        histogram.legend(frameon=False)
        known = labels >= 0
        fpr, tpr = roc_curve(values[known], labels[known])
        roc.plot(fpr, tpr, color="#222", drawstyle="steps-post")
        roc.plot([0, 1], [0, 1], color="#bbb", linewidth=0.8, linestyle="--")
        roc.axvline(0.01, color="#d1495b", linewidth=0.8, linestyle=":")
        roc.set(
            xlabel="false-positive rate",
            ylabel="true-positive rate",
            title=f"AUC {roc_auc(values[known], labels[known]):.3f}",
            xlim=(-0.01, 1),
            ylim=(0, 1.01),
        )
        for axis in (histogram, roc):
            axis.spines[["top", "right"]].set_visible(False)
    with write_atomic(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})
