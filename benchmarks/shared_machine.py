"""A training step where other programs want the cores too, under each way in which OpenMP's threads can wait.

    python -m benchmarks.shared_machine --rounds 5
    python -m benchmarks.shared_machine --only default,spin_1000 --busy 2 --steps 10

Threads that have done their part of a sum wait for the others. Spinning, they answer at once; but where another program
has taken a core, they spin away the time that the last thread needs. Each setting is a process of its own, as the
environment is read when torch is loaded: a step of the sample model's UNet (16 latents, forward and backward) alone,
and beside ``--busy`` processes that compute without end. Settings take turns; printed are the medians over the rounds
of each process's median step, and the smallest of them, which what else the machine does changes less.

``afresh.cores`` holds the setting that is taken, and why.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

from afresh.cores import WAITING, cpu_count
from afresh.progress import progress

LATENTS = 16
SETTINGS: dict[str, dict[str, str]] = {
    "default": {},
    "passive": {"OMP_WAIT_POLICY": "passive"},
    **{f"spin_{count}": {"GOMP_SPINCOUNT": str(count)} for count in (100, 1000, 10_000, 100_000)},
    "one_thread": {"OMP_NUM_THREADS": "1"},
}
OURS = (*WAITING, "OMP_WAIT_POLICY", "OMP_NUM_THREADS")


def step_seconds(steps: int) -> float:
    """The median time of a step in this process, after one that warms up."""
    import torch

    from train.denoising.opening.loading import load_pipeline, sample_model_dir

    unet = load_pipeline(str(sample_model_dir())).unet.train()
    x, t = torch.randn(LATENTS, 4, 16, 16), torch.randint(0, 1000, (LATENTS,))
    embeddings = torch.randn(LATENTS, 32, unet.config.cross_attention_dim)
    seconds = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        unet(x, t, embeddings).sample.square().mean().backward()
        unet.zero_grad()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def measured(setting: dict[str, str], steps: int, busy: int) -> float:
    """The median step of a process under a setting, beside so many that compute without end."""
    env = {name: value for name, value in os.environ.items() if name not in OURS} | setting
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
    try:
        child = [sys.executable, "-m", "benchmarks.shared_machine", "--step", str(steps)]
        done = subprocess.run(child, env=env, check=True, stdout=subprocess.PIPE, text=True)
    finally:
        for other in others:
            other.kill()
            other.wait()
    return float(json.loads(done.stdout))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--busy", type=int, default=1, help="processes beside the step")
    parser.add_argument("--only", default=",".join(SETTINGS))
    parser.add_argument("--step", type=int, help=argparse.SUPPRESS)  # a child's work
    arguments = parser.parse_args()
    if arguments.step:
        print(json.dumps(step_seconds(arguments.step)))
        return
    names = arguments.only.split(",")
    print(f"{cpu_count()} cores, load {os.getloadavg()[0]:.1f} before the start, {LATENTS} latents", flush=True)
    found: dict[tuple[str, int], list[float]] = {(name, busy): [] for name in names for busy in (0, arguments.busy)}
    for round_ in progress(range(arguments.rounds), desc="rounds", unit="rounds"):
        turn = round_ % len(names)
        for name in names[turn:] + names[:turn]:
            for busy in (0, arguments.busy):
                found[name, busy].append(measured(SETTINGS[name], arguments.steps, busy))
    print(f"| seconds a step: median (smallest) | alone | beside {arguments.busy} |\n|---|---|---|")
    for name in names:
        cells = [f"{statistics.median(s):.3f} ({min(s):.3f})" for s in (found[name, 0], found[name, arguments.busy])]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
