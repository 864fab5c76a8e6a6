"""Neurons by learned gates beside neurons by the gradient: is there a set that costs other captions less?

    python -m benchmarks.neuron_gates --run runs/quickstart --number 103
    python -m benchmarks.neuron_gates --run runs/quickstart --number 103 --captions 8 --weights 0.3 1

``train localize`` orders neurons by what blocking them gains, perhaps over what it costs, both to first order at the
unblocked model. Here a set is learned instead: for each prompt b in [0, 1]^units, how far each neuron is blocked, with
``Σ b ≤ n``, by gradient steps (Adam, then the nearest point of that set) on

    m(1 − b) / m(1) + κ (b' C b / s)^½,

the prompt's magnitude with the neurons' factors at 1 − b, on other noises at each step, and what that costs clean
captions: ``C = E J'J`` of their predictions' Jacobian with respect to the factors, from random probes of all of them
(:mod:`train.memorization.neurons.selectivity` has its diagonal alone), in units of ``s = E ‖ε(e_c) − ε(e_∅)‖²``, what
their captions do. Steps begin at the n neurons of steepest gradient, and the n with the largest b are blocked.

Printed for each: m and the cost's estimate, copies left, and what held-out captions lose, as
``benchmarks.neuron_width`` measures it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from afresh.progress import progress
from benchmarks.localize import slopes
from benchmarks.neuron_width import Blocked, first
from train.denoising.families.registry import denoiser_of
from train.denoising.opening.loading import load_pipeline
from train.memorization.neurons.blocking import gates
from train.memorization.neurons.first_step import STEPS
from train.memorization.neurons.localization import Localizer
from train.memorization.neurons.selectivity import per_cost

PROBES = 4  # a clean caption
BATCH = 32
RATE = 0.05


class Cost:
    """What blocking neurons costs clean captions, to second order around the unblocked model.

    Args:
        localizer: the model, with its clean captions.
    """

    def __init__(self, localizer: Localizer) -> None:
        denoiser, sizes = denoiser_of(localizer.pipe), list(localizer.sizes.values())
        timesteps, clean = denoiser.schedule.steps(50), localizer.clean
        columns, norms = [], []
        with torch.enable_grad(), denoiser.frozen():
            for start in range(0, len(clean), BATCH):
                captions = clean[start : start + BATCH]
                cond, empty = denoiser.encode(captions), denoiser.encode([""] * len(captions))
                for probe in range(PROBES):
                    seeds = [start + row + probe * len(clean) for row in range(len(captions))]
                    x, t = denoiser.noise(seeds), timesteps[STEPS[probe % len(STEPS)]]
                    r = torch.randn(x.shape, generator=torch.Generator().manual_seed(seeds[0]))
                    factors = torch.ones(len(captions), sum(sizes), requires_grad=True)
                    with gates(localizer.layers) as gate:
                        for name, part in zip(localizer.layers, factors[:, None].split(sizes, dim=2), strict=True):
                            gate[name] = part
                        eps = denoiser.predict(x, t, cond).eps
                        columns.append(torch.autograd.grad((eps * r).sum(), factors)[0])
                    with torch.no_grad():
                        norms.append((eps - denoiser.predict(x, t, empty).eps).square().flatten(1).sum(1))
        self.columns, self.scale = torch.cat(columns), float(torch.cat(norms).mean())

    def __call__(self, b: Tensor) -> Tensor:
        """Of ``b [units]``: how much of what a caption does goes, a share."""
        return ((self.columns @ b).square().mean() / self.scale).sqrt()


def nearest(b: Tensor, number: int) -> Tensor:
    """The nearest point of ``{0 ≤ b ≤ 1, Σ b ≤ number}``: ``clamp(b − λ, 0, 1)`` with the least λ ≥ 0 that fits."""
    low, high = 0.0, max(float(b.max()), 0.0)
    if b.clamp(0, 1).sum() <= number:
        return b.clamp(0, 1)
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if (b - middle).clamp(0, 1).sum() > number else (low, middle)
    return (b - high).clamp(0, 1)


def learned(
    localizer: Localizer, cost: Cost, caption: str, start: NDArray[np.bool_], weight: float, steps: int
) -> NDArray[np.float32]:
    """``b [units]`` of one prompt, from the set ``start``; ``weight`` is κ."""
    step, number = localizer.first_step(caption, range(2 * steps)), int(start.sum())
    b = torch.from_numpy(start.astype(np.float32)).requires_grad_()
    optimizer = torch.optim.Adam([b], lr=RATE, betas=(0.8, 0.99))
    with torch.no_grad():
        unblocked = step.magnitude(range(4), None).mean()
    with torch.enable_grad(), denoiser_of(localizer.pipe).frozen():
        for k in range(steps):
            magnitude = step.magnitude([2 * k, 2 * k + 1], (1 - b)[None].expand(2, -1)).mean()
            optimizer.zero_grad()
            (magnitude / unblocked + weight * cost(b)).backward()
            optimizer.param_groups[0]["lr"] = RATE * (1 - k / steps)
            optimizer.step()
            with torch.no_grad():
                b.copy_(nearest(b, number))
    return b.detach().numpy()


def main() -> None:
    """Read the command line and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder of train quickstart")
    parser.add_argument("--number", type=int, default=103, help="neurons that are blocked, a prompt")
    parser.add_argument("--captions", type=int, default=24, help="repeated captions, at most")
    parser.add_argument("--weights", type=float, nargs="+", default=[0.3, 1.0], help="κ")
    parser.add_argument("--steps", type=int, default=25, help="of the gates")
    args = parser.parse_args()
    torch.set_num_threads(1)
    pipe = load_pipeline(str(args.run / "finetune_raw" / "model"))
    pipe.unet.requires_grad_(False)
    model = Blocked(pipe, args.run, args.captions)
    localizer, cost = model.localizer, Cost(model.localizer)
    gradient = np.stack([slopes(localizer, caption) for caption in model.repeated])
    ratio = per_cost(gradient, localizer.sensitivity)
    print(f"{len(model.repeated)} captions, two images each; nothing blocked: memorized {model.memorized(None):.2f}")
    print("| order | magnitude left | cost, estimated | memorized | others: alignment | like unblocked |")
    print("|---|---|---|---|---|---|")

    def row(name: str, scores: NDArray[np.float32]) -> None:
        masks = first(scores, args.number)
        left, costs = [], []
        for caption, mask in zip(model.repeated, masks, strict=True):
            step, b = localizer.first_step(caption, range(1000, 1004)), torch.from_numpy(mask.astype(np.float32))
            with torch.no_grad():
                blocked = step.magnitude(range(4), (1 - b)[None].expand(4, -1)).mean()
                left.append(float(blocked / step.magnitude(range(4), None).mean()))
                costs.append(float(cost(b)))
        found = model.point(masks)
        change = f"{found['alignment_change']:+.1%} ± {found['standard_error']:.1%}"
        print(
            f"| {name} | {np.mean(left):.2f} | {np.mean(costs):.2f} | {found['memorized']:.2f} | {change} | "
            f"{found['similarity_to_unblocked']:.2f} |",
            flush=True,
        )

    row("gradient of the magnitude", gradient)
    row("gradient over cost", ratio)
    for weight in args.weights:
        gated = []
        with progress(total=len(model.repeated), desc=f"gates, κ {weight:g}", unit="captions") as bar:
            for caption, start in zip(model.repeated, first(gradient, args.number), strict=True):
                gated.append(learned(localizer, cost, caption, start, weight, args.steps))
                bar.update(1)
        row(f"learned gates, κ {weight:g}", np.stack(gated) + 1e-6 * ratio)  # the ratio decides between equals


if __name__ == "__main__":
    main()
