"""At which timesteps, and from when on, the magnitude tells repeated training samples from unique ones.

    python -m benchmarks.training_statistic --run runs/quickstart --out runs/training_statistic
    python -m benchmarks.training_statistic --run … --out … --samples 800 --noises 2

The filter sees another magnitude than the detector: that of noised *training* images, at any timestep, of a model in
the midst of training. This fine-tunes the sample model as a finished quickstart did, on its raw set, without a filter,
takes its weights at every fiftieth step, and noises images of both kinds at timesteps of each band. The
labels are *repeated* and *unique*. Beside it stands when the repeated captions are memorized: the share of images drawn
for them that are copies.

Prints AUC and the true-positive rate at 1 % and at 20 % false positives, by band and step, and draws
``training-statistic.png``. The weights are the ones in training, which the filter sees, not their average.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from afresh.files import to_json, write_json
from afresh.progress import progress
from benchmarks.quickstart_set import original, read_settings, repeated_images
from curate.reading.images import decode_image
from curate.reading.samples import read_samples
from train.denoising.families.registry import denoiser_of
from train.denoising.families.stable_diffusion import pixel_size
from train.denoising.opening.loading import load_pipeline, sample_model_dir
from train.finetune.caches.latents import encode_moments
from train.finetune.config import FilterConfig, FinetuneConfig
from train.finetune.data.buckets import bring_to
from train.finetune.data.order import generator
from train.finetune.model.diffusion import sample_posterior
from train.memorization.config import MEMORIZED
from train.memorization.detection.roc import roc_auc, tpr_at_fpr
from train.memorization.signals.magnitude import magnitude
from train.memorization.thresholds import BANDS
from train.sampling.config import SampleConfig
from train.sampling.job.job import run_sample


def train(run: Path, out: Path, every: int) -> list[Path]:
    """Checkpoints of a run on the raw set, every so many steps, trained as far as they are not there."""
    folder = out / "finetune"
    out.mkdir(parents=True, exist_ok=True)
    settings = read_settings()["finetune"] | {"filter": FilterConfig("off"), "checkpoint_every": every}
    # without the last: a run that ends removes its checkpoints
    steps = range(every, settings["steps"], every)
    wanted = [folder / "checkpoints" / f"step-{step:06d}.pt" for step in steps]
    if not all(path.is_file() for path in wanted):
        settings |= {"shards": [str(run / "raw")], "out": str(folder), "keep_checkpoints": 1000}
        config = FinetuneConfig(model=str(sample_model_dir()), **settings)
        path = out / "finetune.yaml"
        path.write_text(yaml.safe_dump(dataclasses.asdict(config)))
        command = [sys.executable, "-m", "train", "finetune", "--config", str(path)]
        with subprocess.Popen(command) as process:
            while process.poll() is None and not wanted[-1].is_file():
                time.sleep(0.2)
            process.send_signal(signal.SIGTERM)  # a run that is stopped keeps its checkpoints
            if process.wait() or not wanted[-1].is_file():
                raise SystemExit("the training did not reach the last checkpoint")
    return wanted


def load_weights(pipe: Any, checkpoint: Path) -> None:
    """Put a checkpoint's weights into a pipeline."""
    weights = torch.load(checkpoint, weights_only=True, map_location="cpu")["model"]
    for name in ("unet", "text_encoder"):
        own = {key.removeprefix(f"{name}."): value for key, value in weights.items() if key.startswith(f"{name}.")}
        getattr(pipe, name).load_state_dict(own or getattr(pipe, name).state_dict())


def read_set(run: Path, samples: int) -> tuple[list[Any], np.ndarray]:
    """As many samples of each kind, chosen at random, and their labels (1 = repeated)."""
    every = [sample for path in sorted((run / "raw").glob("*.tar")) for sample in read_samples(str(path))]
    repeated = repeated_images(sample.key for sample in every)
    rng, chosen, labels = np.random.default_rng(0), [], []
    for label in (1, 0):
        some = [sample for sample in every if (original(sample.key) in repeated) == bool(label)]
        take = rng.permutation(len(some))[:samples]
        chosen += [some[i] for i in take]
        labels += [label] * len(take)
    return chosen, np.array(labels)


@torch.no_grad()
def measure(pipe: Any, samples: list[Any], noises: int, batch: int = 64) -> np.ndarray:
    """Magnitudes ``[BANDS, noises, samples]`` of noised training images; the same noise for every model."""
    size, scheduler = pixel_size(pipe), pipe.scheduler
    images = [decode_image(sample.image) for sample in samples]
    pixels = torch.stack([torch.from_numpy(bring_to(image, (size, size), (0, 0, *image.size))) for image in images])
    moments = torch.cat([encode_moments(pipe.vae, part) for part in pixels.split(batch)])
    g = generator("statistic")
    noise = torch.randn(moments.shape[0], moments.shape[1] // 2, *moments.shape[2:], generator=g)
    x_0 = sample_posterior(moments, noise, pipe.vae.config.scaling_factor)
    denoiser = denoiser_of(pipe)
    captions = denoiser.encode([sample.caption or "" for sample in samples])
    empty = denoiser.encode([""])
    found = np.zeros((BANDS, noises, len(samples)), np.float32)
    with progress(total=found.size, desc="magnitudes", unit="images") as bar:
        for band in range(BANDS):
            for number in range(noises):
                t = torch.randint(1000 // BANDS, (len(samples),), generator=g) + band * 1000 // BANDS
                x_t = scheduler.add_noise(x_0, torch.randn(x_0.shape, generator=g), t)
                for start in range(0, len(samples), batch):
                    part = slice(start, start + batch)
                    seen = [denoiser.predict(x_t[part], t[part], one) for one in (captions[part], empty)]
                    found[band, number, part] = magnitude(seen[0].eps, seen[1].eps).numpy()
                    bar.update(len(x_t[part]))
    return found


def separation(magnitudes: np.ndarray, labels: np.ndarray) -> list[dict[str, float]]:
    """How well single magnitudes tell the labels apart, by band."""
    rows = []
    for of_band in magnitudes:
        values, twice = of_band.ravel(), np.tile(labels, len(of_band))
        rows.append(
            {
                "auc": roc_auc(values, twice),
                "tpr_at_1pct": tpr_at_fpr(values, twice, 0.01),
                "tpr_at_20pct": tpr_at_fpr(values, twice, 0.2),
                "repeated": float(np.median(values[twice == 1])),
                "unique": float(np.median(values[twice == 0])),
            }
        )
    return rows


def draw(pipe: Any, run: Path, folder: Path, seeds: int) -> float:
    """Share of the images drawn for the repeated captions that are memorized."""
    import pyarrow.parquet as pq

    pipe.save_pretrained(folder / "model")
    scale = read_settings()["scale"]
    config = SampleConfig(
        str(folder / "model"), str(run / "prompts" / "repeated.jsonl"), str(folder / "drawn"),
        index=str(run / "curated"), seeds=seeds, steps=25, scale=scale, batch_size=32,
    )  # fmt: skip
    run_sample(config)
    similarity = pq.read_table(folder / "drawn" / "samples.parquet")["similarity"].to_numpy()
    return float((similarity > MEMORIZED).mean())


def draw_figure(path: Path, results: list[dict[str, Any]]) -> None:
    """AUC by band with a curve a step; and over the steps, AUC of the noisy bands beside the memorized share."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.8), layout="constrained", dpi=130)
    by_band, rates, over_time = figure.subplots(1, 3)
    centres = (np.arange(BANDS) + 0.5) * 1000 / BANDS
    for number, result in enumerate(results):
        colour = colormaps["viridis"](number / max(1, len(results) - 1))
        for panel, column in ((by_band, "auc"), (rates, "tpr_at_20pct")):
            values = [row[column] for row in result["bands"]]
            panel.plot(centres, values, "o-", color=colour, markersize=3, label=f"step {result['step']}")
    by_band.axhline(0.5, color="#bbb", linewidth=0.8, linestyle="--")
    by_band.set(xlabel="timestep", ylabel="AUC, repeated against unique", ylim=(0.2, 1))
    rates.axhline(0.2, color="#bbb", linewidth=0.8, linestyle="--")
    rates.set(xlabel="timestep", ylabel="true positives at 20 % false ones", ylim=(0, 1))
    rates.legend(frameon=False, fontsize=7, loc="upper left")
    steps = [result["step"] for result in results]
    for low, colour in ((800, "#d1495b"), (500, "#4c78a8"), (0, "#888")):
        bands = range(low * BANDS // 1000, BANDS if low == 800 else (low + 300) * BANDS // 1000)
        mean = [np.mean([result["bands"][band]["auc"] for band in bands]) for result in results]
        label = f"AUC, timesteps {low} to {min(999, (bands[-1] + 1) * 1000 // BANDS - 1)}"
        over_time.plot(steps, mean, "o-", color=colour, markersize=3, label=label)
    shares = [result["memorized"] for result in results]
    over_time.plot(steps, shares, "s--", color="#222", markersize=3, label="memorized share of images drawn")
    over_time.set(xlabel="optimizer step", ylim=(0, 1))
    over_time.legend(frameon=False, fontsize=7)
    for panel in (by_band, rates, over_time):
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder of a finished quickstart")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--every", type=int, default=50, help="steps between the models that are looked at")
    parser.add_argument("--samples", type=int, default=400, help="of each kind, at most")
    parser.add_argument("--noises", type=int, default=1, help="per sample and band")
    parser.add_argument("--seeds", type=int, default=2, help="images drawn per repeated caption")
    args = parser.parse_args()
    samples, labels = read_set(args.run, args.samples)
    results = []
    for checkpoint in [None, *train(args.run, args.out, args.every)]:
        step = int(re.findall(r"\d+", checkpoint.name)[0]) if checkpoint else 0
        folder = args.out / "steps" / f"{step:06d}"
        if not (folder / "result.json").is_file():
            folder.mkdir(parents=True, exist_ok=True)
            pipe = load_pipeline(str(sample_model_dir()))
            if checkpoint:
                load_weights(pipe, checkpoint)
            bands = separation(measure(pipe, samples, args.noises), labels)
            memorized = draw(pipe, args.run, folder, args.seeds)
            write_json(folder / "result.json", {"step": step, "memorized": memorized, "bands": to_json(bands)})
        results.append(json.loads((folder / "result.json").read_text()))

    print(f"{int(labels.sum())} repeated and {int((labels == 0).sum())} unique samples, {args.noises} noises a band")
    print("step  memorized  column            " + "".join(f"{band * 1000 // BANDS:>7}+" for band in range(BANDS)))
    for result in results:
        for column in ("auc", "tpr_at_1pct", "tpr_at_20pct", "repeated", "unique"):
            values = "".join(f"{row[column]:>8.3f}" for row in result["bands"])
            print(f"{result['step']:>4}  {result['memorized']:>9.2f}  {column:<16}  {values}")
    draw_figure(args.out / "training-statistic.png", results)
    write_json(args.out / "training-statistic.json", results)


if __name__ == "__main__":
    main()
