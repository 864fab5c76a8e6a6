"""How well each signal of memorization tells what a model memorized, and what it costs.

    python -m benchmarks.detection RUN             RUN: the folder of a finished `afresh-train quickstart`

On the quickstart's raw model, whose repeated captions are known: these against captions that were never trained on,
with and without those that the model draws copies for all the same. Costs are per prompt, of each signal alone and of
all together, on a few of the prompts: evaluations of the denoiser in single images (without ``ε(x_T, e_∅)``, which is
computed once a seed for all prompts), and CPU seconds on one thread, text encoder included.

A second table says what the captions alone could tell of the held-out prompts that draw copies: which of them stand
near a repeated caption by curation's caption embedder, and how well the signals of several steps do without these.

The last line is what the magnitude in the sampler's trace costs: the share of a guided sampling run's CPU time that is
spent on it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import train.sampling.trace
from curate.config import DedupConfig
from curate.embed.ngrams import embed_captions
from train.denoising.families.stable_diffusion import initial_noise, latent_shape
from train.denoising.opening.loading import load_pipeline
from train.memorization.config import MEMORIZED
from train.memorization.detection.separation import labels_of, read_outcomes, separation
from train.memorization.scoring import score
from train.memorization.signals.magnitude import magnitude
from train.memorization.signals.registry import SIGNALS
from train.prompts import read_prompts
from train.sampling import GuidedStableDiffusion

SETTINGS = ((1, 1), (1, 4), (5, 4))
"""Steps and seeds."""
TIMED = 16
"""Prompts that costs are measured on."""


NEAR = (DedupConfig.caption_threshold, 0.75)
"""Similarities from which a caption counts as near a repeated one: curation's, and one that takes most of a family."""


def cost(pipe: Any, captions: Sequence[str], **options: Any) -> str:
    """Two cells: evaluations and CPU seconds per prompt, without those evaluations that all prompts share."""
    start = time.process_time()
    scores = score(pipe, captions[:TIMED], **options)
    seconds = time.process_time() - start
    # What the prompts share is less than one evaluation each.
    return f"{scores.evaluations // TIMED} | {seconds / TIMED:.3f}"


def quality(values: np.ndarray, labels: np.ndarray, clean: np.ndarray) -> str:
    """Four cells: AUC with its interval and TPR at 1 % FPR, against all captions and without those that draw copies."""
    cells = []
    for known in (labels, np.where(clean, labels, -1)):
        found = separation({"": values}, known)
        low, high = found["auc_interval"][""]
        cells += [f"{found['auc']['']:.3f} ({low:.3f}–{high:.3f})", f"{found['tpr_at_1pct_fpr']['']:.3f}"]
    return " | ".join(cells)


def left_out(captions: Sequence[str], labels: np.ndarray, clean: np.ndarray, values: dict[str, np.ndarray]) -> None:
    """Print the second table: negatives left out by caption or by outcome, and AUC and TPR at 1 % FPR without them."""
    embeds = embed_captions(captions)
    similarity = (embeds @ embeds[labels == 1].T).max(axis=1)
    negatives = labels == 0
    rows = {f"caption near a repeated one, from {least:g}": similarity >= least for least in NEAR}
    rows = {"nothing": np.zeros(len(labels), bool), **rows, "draws a copy": ~clean}
    print(f"\n| left out | negatives | that draw copies | {' | '.join(f'{n}: AUC | TPR at 1 %' for n in values)} |")
    print("|---" * (3 + 2 * len(values)) + "|")
    for name, out in rows.items():
        found = separation(values, np.where(negatives & out, -1, labels))
        cells = [f"{found['auc'][n]:.3f} | {found['tpr_at_1pct_fpr'][n]:.3f}" for n in values]
        print(f"| {name} | {(negatives & out).sum()} | {(negatives & out & ~clean).sum()} | {' | '.join(cells)} |")


def trace_share(pipe: Any, captions: Sequence[str], steps: int, scale: float) -> float:
    """Share of a guided sampling run's CPU time (without decoding) that the trace's magnitudes take."""
    guided = GuidedStableDiffusion.from_pipe(pipe)
    spent = 0.0

    def watched(*args: Any, **options: Any) -> Any:
        nonlocal spent
        start = time.process_time()
        result = magnitude(*args, **options)
        spent += time.process_time() - start
        return result

    shape = latent_shape(pipe.unet)
    options: dict[str, Any] = {
        "num_inference_steps": steps,
        "guidance_scale": scale,
        "latents": torch.stack([initial_noise(shape, seed) for seed in range(len(captions))]),
        "output_type": "latent",
    }
    guided(list(captions), **options | {"num_inference_steps": 2})
    train.sampling.trace.magnitude = watched
    try:
        start = time.process_time()
        guided(list(captions), **options)
        return spent / (time.process_time() - start)
    finally:
        train.sampling.trace.magnitude = magnitude


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished quickstart")
    parser.add_argument("--num_inference_steps", type=int, help="of the trajectory; as the quickstart's unless given")
    parser.add_argument("--scale", type=float, help="guidance scale; as the quickstart's unless given")
    parser.add_argument("--first_seed", type=int, default=0, help="of each prompt's initial noises")
    parser.add_argument("--signals", nargs="+", default=list(SIGNALS), choices=list(SIGNALS))
    args = parser.parse_args()
    settings = json.loads((args.run / "run.json").read_text())
    steps = args.num_inference_steps or settings["steps"]
    scale = args.scale or settings["scale"]
    prompts = read_prompts(args.run / "prompts" / "detect.jsonl")
    captions, labels = [prompt.caption for prompt in prompts], labels_of(prompts)
    outcomes = read_outcomes(args.run / "detect" / "drawn", prompts)
    clean = ~((labels == 0) & (outcomes > MEMORIZED))
    torch.set_num_threads(1)
    pipe = load_pipeline(str(args.run / "finetune_raw" / "model"))
    pipe.text_encoder.eval()
    score(pipe, captions[:8])  # the first passes are slower

    print(
        f"{(labels == 1).sum()} repeated captions against {(labels == 0).sum()} that were never trained on, and "
        f"against the {((labels == 0) & clean).sum()} of them that draw no copy; a trajectory of {steps} steps at "
        f"guidance scale {scale:g}.\n",
        flush=True,
    )
    print("| signal | steps | seeds | AUC, all | TPR at 1 % | AUC, no copies | TPR at 1 % | evaluations | CPU s |")
    print("|---|---|---|---|---|---|---|---|---|")
    for steps_scored, seeds in SETTINGS:
        made = {name: SIGNALS[name]("l2") for name in args.signals}
        names = [name for name, signal in made.items() if seeds > 1 or not signal.compares_seeds]
        options: dict[str, Any] = {
            "steps": steps_scored,
            "seeds": range(args.first_seed, args.first_seed + seeds),
            "num_inference_steps": steps,
            "guidance_scale": scale,
        }
        if steps_scored > 1:  # the others are those of the first step
            names = [name for name in names if made[name].looks_at == "every step"]
        scores = score(pipe, captions, signals=names, **options)
        for name in names:
            spent = cost(pipe, captions, signals=[name], **options)
            found = quality(scores.per_prompt(name), labels, clean)
            print(f"| {name} | {steps_scored} | {seeds} | {found} | {spent} |", flush=True)
        spent = cost(pipe, captions, signals=names, **options)
        print(f"| all of these | {steps_scored} | {seeds} | | | | | {spent} |", flush=True)
    left_out(captions, labels, clean, {name: scores.per_prompt(name) for name in names})
    share = trace_share(pipe, captions[:16], steps, scale)
    print(f"\nThe trace's magnitudes take {100 * share:.2f} % of a guided sampling run of 16 images.")


if __name__ == "__main__":
    main()
