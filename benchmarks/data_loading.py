"""How long training steps wait for their data: latents cached in memory, on disk, and images streamed from shards.

    python -m benchmarks.data_loading
    python -m benchmarks.data_loading --steps 300 --batch 32 --workers 2 --model DIR --shards DIR

Real runs of ``train finetune``, on the carried sample model and samples unless others are named. The share is that of
the time from the end of the warm-up steps to the last step in which the loop waits for its next batch; the VAE's work
on streamed images is no waiting. Steps without a filter, which are the shortest.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from afresh.cores import cpu_count
from curate.sample_set import sample_set_dir
from train.denoising.opening.loading import sample_model_dir
from train.finetune import loop
from train.finetune.config import FilterConfig, FinetuneConfig
from train.finetune.preparation import resolve_precision

WARM_UP = 10


def measure(config: FinetuneConfig) -> tuple[float, float]:
    """Share of the time that a run waits for data, and seconds a step."""
    marks: list[tuple[float, float]] = []
    make = loop.make_batches

    def make_watched(*args: Any) -> Any:
        batches = make(*args)
        take = batches.next

        def watched() -> Any:
            batch = take()
            marks.append((time.monotonic(), batches.waited))
            return batch

        batches.next = watched
        return batches

    loop.make_batches = make_watched
    try:
        loop.run_finetune(config)
    finally:
        loop.make_batches = make
    (began, waited_before), (ended, waited) = marks[WARM_UP], marks[-1]
    return (waited - waited_before) / (ended - began), (ended - began) / (len(marks) - 1 - WARM_UP)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(sample_model_dir()))
    parser.add_argument("--shards", default=str(sample_set_dir()))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--resolution", type=int, default=0)
    options = parser.parse_args()
    if options.steps <= WARM_UP + 1:
        parser.error(f"--steps must be more than {WARM_UP + 1}")
    rows: list[tuple[str, float, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, cached in (("latents in memory", "memory"), ("latents on disk", "disk"), ("streamed", False)):
            config = FinetuneConfig(
                model=options.model,
                shards=[options.shards],
                out=str(Path(folder) / name.replace(" ", "-")),
                steps=options.steps,
                batch_size=options.batch,
                resolution=options.resolution,
                mixed_precision="auto",
                cache_latents=cached,  # type: ignore[arg-type]  # as a YAML file has it
                workers=options.workers,
                checkpoint_every=0,
                filter=FilterConfig("off"),
            )
            rows.append((name, *measure(config)))
    print(f"{'data':<20} {'waiting':>8} {'ms a step':>10}")
    for name, share, seconds in rows:
        print(f"{name:<20} {share:>8.2%} {1000 * seconds:>10.1f}")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"{options.steps} steps of {options.batch} after {WARM_UP} to warm up, {options.workers} workers, {device}, "
        f"{cpu_count()} cores, {resolve_precision('auto')} precision, torch {torch.__version__}"
    )


if __name__ == "__main__":
    main()
