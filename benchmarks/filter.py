"""What the filter costs, and how many of the paper's drops cheaper policies make.

    python -m benchmarks.filter                step times, on the sample model and on a mid-size UNet
    python -m benchmarks.filter --run RUN      and the drops, on the raw set and the raw model of a finished quickstart

Step times: a whole optimizer step (forward, backward, clipping, AdamW) of the same weights on the same batches,
without a filter and under each policy in turn, in one process; the ratio is that of the sums over all rounds. A tenth
of the captions is dropped, as in training.

Drops: the positions of some epochs of the quickstart's raw set under the model that memorized it, with thresholds at a
quantile of the unique samples' magnitudes in each timestep band. Every policy decides on the same positions, with the
same noise; the last epoch counts, the ones before fill the verdicts (and the window, where a policy has one).
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from afresh.progress import progress
from benchmarks.quickstart_set import original, repeated_images
from curate.reading.images import decode_image
from curate.reading.samples import read_samples
from train.denoising.families.registry import denoiser_of
from train.denoising.families.stable_diffusion import encode_captions, pixel_size
from train.denoising.opening.attention import set_attention
from train.denoising.opening.loading import load_pipeline, sample_model_dir
from train.denoising.schedules import NoiseSchedule
from train.finetune.caches.latents import encode_moments
from train.finetune.config import Calibration, FilterConfig
from train.finetune.data.buckets import bring_to
from train.finetune.data.order import SampleOrder
from train.finetune.filter.filter import MemorizationFilter
from train.finetune.model.diffusion import draw_randomness, sample_posterior
from train.finetune.model.loss import sample_errors, weighted_loss
from train.memorization.signals.magnitude import magnitude
from train.memorization.thresholds import BANDS, Thresholds, timestep_band
from train.sample_model.small import SmallModel, build_pipeline

CPU = torch.device("cpu")
DROPOUT = 0.1
POLICIES: dict[str, dict[str, Any]] = {
    "every_step": {"policy": "every_step", "expires": 0},
    "one_in_k": {"policy": "one_in_k"},
    "noisy_steps": {"policy": "noisy_steps"},
    "noisy_alone": {"policy": "noisy_steps", "expires": 0},
    "noisy_caption": {"policy": "noisy_steps", "verdict_of": "caption"},
    "noisy_caption_window": {"policy": "noisy_steps", "verdict_of": "caption", "evidence": "window"},
    "noisy_one_in_k_caption": {"policy": "noisy_one_in_k", "k": 2, "verdict_of": "caption"},
}


# ------------------------------------------------------------------------------------------------------- step times


def mid_size() -> Any:
    """A UNet of about 50 million random weights, on latents of 16 × 16."""
    model = SmallModel(channels=[160, 288, 416], text_width=256, heads=8)
    return build_pipeline(model, ["grinning face, face smiling"], vae_dir=None)


class Trainer:
    """One model whose step can be taken under any filter.

    Args:
        pipe: Stable Diffusion.
        batch: samples a step.
        samples: distinct samples that the batches are made of.
    """

    def __init__(self, pipe: Any, batch: int, samples: int = 512) -> None:
        self.unet, self.batch = pipe.unet.train(), batch
        set_attention(self.unet)
        self.schedule = NoiseSchedule(pipe.scheduler, CPU)
        self.optimizer = torch.optim.AdamW(self.unet.parameters(), lr=1e-6, fused=True)
        self.empty = encode_captions(pipe, [""])
        g = torch.Generator().manual_seed(0)
        self.captions = torch.randn(samples, *self.empty.shape[1:], generator=g)
        self.latents = torch.randn(samples, 4, pipe.unet.config.sample_size, pipe.unet.config.sample_size, generator=g)
        self.order = SampleOrder([samples], 1, 0)

    def unconditional(self, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return self.unet(x_t, t, self.empty.expand(len(x_t), -1, -1)).sample

    def step(self, number: int, memorization: MemorizationFilter) -> float:
        """Take one optimizer step; its seconds."""
        positions = range(number * self.batch, (number + 1) * self.batch)
        rows = torch.tensor([self.order.at(position)[0] for position in positions])
        draws = draw_randomness(positions, tuple(self.latents.shape[1:]), self.schedule.timesteps, seed=0)
        captioned = draws.uniform[:, 1] >= DROPOUT
        start = time.perf_counter()
        x_0 = self.latents[rows]
        x_t = self.schedule.noised(x_0, draws.noise, draws.t)
        embeddings = torch.where(captioned[:, None, None], self.captions[rows], self.empty)
        output = self.unet(x_t, draws.t, embeddings).sample
        texts, counted = [""] * len(rows), torch.ones(len(rows), dtype=torch.bool)
        kept, _ = memorization.weigh(output.detach(), x_t, draws.t, rows, texts, captioned, counted, number)
        losses = sample_errors(output, self.schedule.target(x_0, draws.noise, draws.t))
        weighted_loss(losses, kept, self.batch).backward()
        memorization.absorb(memorization.records().flatten(0, 1), number)
        torch.nn.utils.clip_grad_norm_(self.unet.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - start

    def filter(self, settings: dict[str, Any]) -> MemorizationFilter:
        """A filter of this model; nothing reaches its threshold, so that all steps train alike."""
        policy = FilterConfig(**settings)
        thresholds = None if policy.policy == "off" else Thresholds.of(1e9, "l2")
        return MemorizationFilter(policy, self.schedule, self.unconditional, len(self.latents), 0, thresholds)


def time_steps(name: str, trainer: Trainer, rounds: int) -> None:
    """Print the step time under each policy as a ratio to the one without a filter."""
    variants = {"off": {"policy": "off"}, **POLICIES}
    filters = {variant: trainer.filter(settings) for variant, settings in variants.items()}
    seconds: dict[str, list[float]] = {variant: [] for variant in variants}
    names = list(variants)
    with progress(total=(rounds + 1) * len(names), desc=name, unit="steps") as bar:
        for number in range(rounds + 1):
            turn = number % len(names)
            for variant in names[turn:] + names[:turn]:
                taken = trainer.step(number, filters[variant])
                if number:  # the first round warms up
                    seconds[variant].append(taken)
                bar.update(1)
    parameters = sum(p.numel() for p in trainer.unet.parameters()) / 1e6
    print(f"{name}: {parameters:.0f} M parameters, batch {trainer.batch}, {rounds} rounds, float32")
    for variant, taken in seconds.items():
        ratios = [one / off for one, off in zip(taken, seconds["off"], strict=True)]
        low, high = np.quantile(ratios, [0.25, 0.75])
        judged = filters[variant].table.totals()["judged"] / ((rounds + 1) * trainer.batch)
        print(
            f"  {variant:<24} {statistics.mean(taken) * 1000:>8.0f} ms  × {sum(taken) / sum(seconds['off']):.3f}  "
            f"(quartiles {low:.3f} to {high:.3f})  judged {judged:.0%}"
        )


# ------------------------------------------------------------------------------------------------------------- drops


@torch.no_grad()
def measured_epochs(run: Path, epochs: int, batch: int = 64) -> dict[str, Any]:
    """The magnitude at every position of some epochs of the raw set, under the model that was trained on it."""
    pipe = load_pipeline(str(run / "finetune_raw" / "model"))
    samples = [sample for path in sorted((run / "raw").glob("*.tar")) for sample in read_samples(str(path))]
    size, schedule = pixel_size(pipe), NoiseSchedule(pipe.scheduler, CPU)
    images = [decode_image(sample.image) for sample in samples]
    pixels = torch.stack([torch.from_numpy(bring_to(image, (size, size), (0, 0, *image.size))) for image in images])
    moments = torch.cat([encode_moments(pipe.vae, part) for part in pixels.split(batch)])
    texts = [sample.caption or "" for sample in samples]
    denoiser = denoiser_of(pipe)
    captions, empty = denoiser.encode(texts), denoiser.encode([""])
    order = SampleOrder([len(samples)], 1, 0)
    shape = (moments.shape[1] // 2, *moments.shape[2:])
    rows, t, m, captioned = [], [], [], []
    total = epochs * len(samples)
    with progress(total=total, desc="magnitudes", unit="visits") as bar:
        for start in range(0, total, batch):
            positions = range(start, min(start + batch, total))
            some = torch.tensor([order.at(position)[0] for position in positions])
            draws = draw_randomness(positions, shape, schedule.timesteps, seed=0)
            x_0 = sample_posterior(moments[some], draws.posterior, pipe.vae.config.scaling_factor)
            x_t = schedule.noised(x_0, draws.noise, draws.t)
            parts = [denoiser.predict(x_t, draws.t, one) for one in (captions[some], empty)]
            m.append(magnitude(parts[0].eps, parts[1].eps))
            rows.append(some)
            t.append(draws.t)
            captioned.append(draws.uniform[:, 1] >= DROPOUT)
            bar.update(len(some))
    repeated = repeated_images(sample.key for sample in samples)
    return {
        "rows": torch.cat(rows),
        "t": torch.cat(t),
        "m": torch.cat(m),
        "captioned": torch.cat(captioned),
        "texts": texts,
        "repeated": torch.tensor([original(sample.key) in repeated for sample in samples]),
    }


def replay(
    visits: dict[str, Any], settings: dict[str, Any], thresholds: Thresholds, quantile: float, batch: int = 16
) -> torch.Tensor:
    """Which visits a policy leaves out, ``[visits]`` bool: the filter itself, over magnitudes that are known.

    The thresholds are given; but a policy that ranks magnitudes among the unique samples' finds them itself.
    """
    schedule: Any = SimpleNamespace(timesteps=1000, prediction=lambda output, x_t, t: SimpleNamespace(compared=output))
    policy = FilterConfig(**settings)
    if policy.evidence == "window":
        policy.calibrate = Calibration(steps=100, quantile=quantile, window=100)
    judge = MemorizationFilter(
        policy,
        schedule,
        lambda x_t, t: torch.zeros_like(x_t),
        len(visits["texts"]),
        0,
        None if policy.evidence == "window" else thresholds,
        reference=~visits["repeated"],
    )
    out = []
    for step, start in enumerate(range(0, len(visits["rows"]), batch)):
        part = slice(start, start + batch)
        rows, output = visits["rows"][part], visits["m"][part][:, None, None, None]
        texts = [visits["texts"][row] for row in rows.tolist()]
        counted = torch.ones(len(rows), dtype=torch.bool)
        kept, _ = judge.weigh(output, output, visits["t"][part], rows, texts, visits["captioned"][part], counted, step)
        judge.absorb(judge.records().flatten(0, 1), step)
        out.append(kept == 0)
    return torch.cat(out)


def compare_drops(visits: dict[str, Any], quantile: float) -> None:
    """Print which of the drops of ``every_step`` each policy makes in the last epoch."""
    bands, repeated = timestep_band(visits["t"]), visits["repeated"][visits["rows"]]
    unique = visits["captioned"] & ~repeated
    limits = [float(visits["m"][unique & (bands == band)].quantile(quantile)) for band in range(BANDS)]
    thresholds = Thresholds.of(limits, "l2")
    last = torch.arange(len(bands)) >= len(bands) - len(visits["texts"])
    full = replay(visits, POLICIES["every_step"], thresholds, quantile)[last]
    of_repeated, of_unique = repeated[last], ~repeated[last]
    print(f"thresholds at the quantile {quantile} of unique samples, {int(last.sum())} visits")
    print(f"  {'':<24} every_step's drops:   all  of repeated     visits left out: repeated   unique")
    for name, settings in POLICIES.items():
        out = replay(visits, settings, thresholds, quantile)[last]
        recall = [float(out[some].float().mean()) for some in (full, full & of_repeated)]
        shares = [float(out[some].float().mean()) for some in (of_repeated, of_unique)]
        print(f"  {name:<24} {recall[0]:>24.1%}  {recall[1]:>11.1%}  {shares[0]:>27.1%}  {shares[1]:>7.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="folder of a finished quickstart")
    parser.add_argument("--rounds", type=int, default=42, help="a multiple of the number of policies is fairest")
    parser.add_argument("--epochs", type=int, default=5, help="of which the last one is compared")
    parser.add_argument("--no_times", action="store_true", help="the drops alone")
    args = parser.parse_args()
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    if not args.no_times:
        time_steps("sample model", Trainer(load_pipeline(str(sample_model_dir())), batch=16), args.rounds)
        time_steps("mid-size UNet", Trainer(mid_size(), batch=8), args.rounds // 3)
    if args.run:
        visits = measured_epochs(args.run, args.epochs)
        for quantile in (0.8, 0.9, 0.99):
            compare_drops(visits, quantile)


if __name__ == "__main__":
    main()
