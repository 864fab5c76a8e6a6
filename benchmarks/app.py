"""What the page of ``train app`` costs: until it is served, a magnitude with its words, an image with its nearest one.

    OMP_NUM_THREADS=1 python -m benchmarks.app

Takes the carried sample model and 200 samples of the carried set, and prints seconds of processor time and of the
clock. Needs Gradio (``pip install 'afresh[app]'``).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from curate.config import DedupConfig
from curate.dedup import run_dedup
from curate.reading.writing import write_shard
from curate.sample_set import load_part
from train.app.bench import Bench
from train.app.config import AppConfig
from train.app.prompts import Reader, Scale, draw, settings
from train.denoising.opening.loading import sample_model_dir

PROMPT = "closed book, book paper"


def timed(work: Callable[[], Any], times: int = 3) -> tuple[float, float]:
    """The least seconds of processor time and of the clock that a piece of work takes."""
    spent = []
    for _ in range(times):
        clock, processor = time.perf_counter(), time.process_time()
        work()
        spent.append((time.process_time() - processor, time.perf_counter() - clock))
    return min(spent)


def first_screen(config: AppConfig) -> tuple[float, float]:
    """Seconds from the command to the page's address."""
    import resource

    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    clock = time.perf_counter()
    options = ["--model", config.model, "--curated", config.curated, "--port", "0"]
    command = [sys.executable, "-m", "train", "app", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "the page is at" in line:
                break
        waited = time.perf_counter() - clock
        process.kill()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, waited


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_shard(str(folder / "000000.tar"), [(s.key, dict(s.members)) for s in load_part("finetune")[:200]])
        dedup = DedupConfig([str(folder / "000000.tar")], str(folder / "curated"), image_embedder="copy-detector")
        run_dedup(dedup)
        config = AppConfig(str(sample_model_dir()), str(folder / "curated"), scale=5.0)
        bench = Bench(config)
        reader = Reader(bench, config, Scale([], ""))
        plain, guided = settings(bench.sampling, ["amg-early"], 1.0, config.image_steps, config.scale)
        rows = {
            "the page is served": first_screen(config),
            "the model is opened": timed(lambda: bench.opened.pipe, 1),
            "magnitude and words": timed(lambda: reader.read("me", PROMPT)),
            "the plain image": timed(lambda: draw(bench, "me", plain, PROMPT, 0)),
            "the mitigated image": timed(lambda: draw(bench, "me", guided, PROMPT, 0)),
        }
    print("| | processor, s | clock, s |\n|---|---|---|")
    for what, (processor, clock) in rows.items():
        print(f"| {what} | {processor:.2f} | {clock:.2f} |")


if __name__ == "__main__":
    main()
