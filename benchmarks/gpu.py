"""Training and guided drawing on one GPU, at the size of Stable Diffusion 1.x, beside diffusers' own script.

    python -m benchmarks.gpu                                   writes docs/gpus.md; about half an hour
    python -m benchmarks.gpu --only "full.*" --steps 60
    python -m benchmarks.gpu --tiny --out page.md              the same on a tiny model, also without a GPU

The model has Stable Diffusion 1.x's architecture and random weights (``benchmarks.stable_diffusion_memory``); what a
step costs does not depend on what the weights are. Each row is a run of :func:`train.finetune.loop.train` as users have
it, by a setting of TRAINING: steps a second and samples a second, over the steps behind the first ones; the most memory
that tensors took; the share of time in which the loop waited for its data; and the time of a step relative to the run
above it that it names. The script's row is the step of diffusers' ``train_text_to_image.py``
(``benchmarks.training_step``) on the same samples in the same precision. Images are drawn by the guided pipeline
without guidance, with guidance that looks and does not act, and with guidance that acts at every step; nothing is
memorized by random weights, so similarities are mapped to what they would be (``benchmarks.sampling_cost``).
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import re
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from afresh.errors import UsageError
from afresh.files import write_atomic
from benchmarks.sampling_cost import TRIGGERS, random_index, stable_diffusion_case
from benchmarks.stable_diffusion_memory import random_pipeline
from benchmarks.training_step import script_steps
from curate.embed.registry import load_embedder
from curate.reading.samples import Sample
from curate.reading.writing import write_shard
from curate.sample_set import load_part
from train.denoising.opening.config import LoRAConfig
from train.finetune.config import FilterConfig, FinetuneConfig
from train.finetune.loop import train
from train.finetune.preparation import make_accelerator, resolve_precision
from train.sample_model.small import tiny_pipeline
from train.sampling.config import AMGConfig
from train.sampling.pipelines.stable_diffusion import GuidedStableDiffusion
from train.sampling.terms.amg import AMG

PAGE = Path("docs/gpus.md")
SCRIPT = "diffusers' script"
OFF = FilterConfig(preset="none")
TRAINING: dict[str, tuple[str, dict[str, Any]]] = {  # name: (what its time is relative to, changes)
    SCRIPT: ("", {}),
    "full": (SCRIPT, {}),
    "full, filter by default": ("full", {"filter": FilterConfig()}),
    "full, images from shards": ("full", {"cache_latents": False}),
    "full, channels first": ("full", {"channels_last": False}),
    "full, average": ("full", {"ema_decay": 0.999}),
    "full, deterministic": ("full", {"deterministic": True}),
    "full, compiled": ("full", {"compile": True, "gradient_checkpointing": False}),
    "full, no checkpointing": ("full", {"gradient_checkpointing": False}),
    "full, float32 in TF32": ("full", {"mixed_precision": "no"}),
    "full, float32": ("full", {"mixed_precision": "no", "tf32": False}),
    "LoRA": ("full", {"lora": LoRAConfig(rank=16)}),
    "LoRA, filter by default": ("LoRA", {"lora": LoRAConfig(rank=16), "filter": FilterConfig()}),
    "LoRA, offloaded": ("LoRA", {"lora": LoRAConfig(rank=16), "cache_text": True, "offload": True}),
}


class Enough(Exception):
    """As many steps were made as are measured."""


class Clock:
    """Stands where the loop asks, once in every step, whether it is to stop, and looks at the time.

    Args:
        steps: how many are counted.
        warm: how many come before them.

    Attributes:
        marks: seconds at the end of each step.
    """

    def __init__(self, steps: int, warm: int) -> None:
        self.steps, self.warm, self.marks = steps, warm, []  # type: int, int, list[float]

    @property
    def asked(self) -> bool:
        """Never asks the loop to stop; ends it from outside."""
        self.mark()
        if len(self.marks) > self.warm + self.steps:
            raise Enough
        return False

    def check(self) -> None:
        """Never gives up what comes before the first step."""

    def mark(self) -> None:
        """The end of a step, with all that the GPU was asked for."""
        finish()
        self.marks.append(time.perf_counter())

    @property
    def step_seconds(self) -> float:
        """The median over the counted steps."""
        counted = self.marks[self.warm :]
        return statistics.median(b - a for a, b in zip(counted, counted[1:], strict=False))


def finish() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def start_afresh() -> None:
    """Let go of what an earlier run held, and count memory from here."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak() -> float | None:
    """The most GB (10⁹ bytes) that tensors took on the GPU; None without one."""
    return torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else None


def measure_training(
    name: str, model: Path, shards: Path, samples: list[Sample], args: argparse.Namespace
) -> dict[str, Any]:
    """One row of the table of training."""
    start_afresh()
    clock, wait = Clock(args.steps, args.warm), None
    with tempfile.TemporaryDirectory() as out:
        values: dict[str, Any] = {"gradient_checkpointing": True, "cache_latents": True, "filter": OFF}
        values |= {"mixed_precision": "auto"} | TRAINING[name][1]
        config = FinetuneConfig(
            str(model), out, [str(shards)], steps=10**6, batch_size=args.batch, log_every=1, checkpoint_every=0,
            workers=args.workers, attention="sdpa", adam_beta2=0.999, weight_decay=1e-2, **values,
        )  # fmt: skip
        precision = resolve_precision(config.mixed_precision)
        config = dataclasses.replace(config, mixed_precision=precision, filter=config.filter.settled())
        if name == SCRIPT:
            steps = script_steps(str(model), samples[: 2 * args.batch], config)
            for _ in range(args.warm + args.steps + 1):
                next(steps)
                clock.mark()
            steps.close()
        else:
            try:
                train(config, config.batch_size, make_accelerator(config), clock)  # type: ignore[arg-type]
            except Enough:
                lines = (Path(out) / "log.jsonl").read_text("utf-8").splitlines()[args.warm :]
                wait = statistics.mean(json.loads(line)["data_wait"] for line in lines)
    return {
        "run": name,
        "precision": config.mixed_precision,
        "steps/s": 1 / clock.step_seconds,
        "samples/s": args.batch / clock.step_seconds,
        "memory, GB": peak(),
        "waits for data": wait,
    }


def relative(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, each with the time of a step as a share of that of the run that it is compared with, if it was made."""
    speed = {row["run"]: row["steps/s"] for row in rows}
    found = []
    for row in rows:
        to = TRAINING[row["run"]][0]
        ratio = f"{speed[to] / row['steps/s']:.3f} of {to}" if to in speed else None
        found.append(row | {"time of a step": ratio})
    return found


@torch.no_grad()
def measure_drawing(args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """A row for each kind of guidance: seconds an image, and memory."""
    if args.tiny:
        embedder = load_embedder("layout")
        guided: Any = GuidedStableDiffusion.from_pipe(tiny_pipeline())
        index = random_index(100, embedder.dim, embedder.name)
    else:
        case = stable_diffusion_case(args.pixels, 4000, args.draw_steps, 7.5)
        embedder, guided, index = case.embedder, case.guided, case.index
    guided.to(device, torch.float32 if device.type == "cpu" else torch.bfloat16)
    guided.set_progress_bar_config(disable=True)
    if hasattr(embedder, "to"):
        embedder.to(device)
    acting = dataclasses.replace(index, calibration=TRIGGERS)
    kinds: dict[str, list[Any]] = {
        "none": [],
        "amg, nothing near": [AMG(index, embedder, AMGConfig())],
        "amg, acting": [AMG(acting, embedder, AMGConfig())],
    }
    rows = []
    for name, guidance in kinds.items():
        seconds = []
        for attempt in range(2):  # the first one warms up, and fits what guidance looks through
            start_afresh()
            began = time.perf_counter()
            guided(
                ["a photo"] * args.batch,
                num_inference_steps=args.draw_steps,
                guidance_scale=7.5,
                generator=[torch.Generator().manual_seed(attempt) for _ in range(args.batch)],
                guidance=guidance,
            )
            finish()
            seconds.append(time.perf_counter() - began)
        rows.append({"guidance": name, "images/s": args.batch / seconds[-1], "memory, GB": peak()})
    return [row | {"time": f"{rows[0]['images/s'] / row['images/s']:.3f} of none"} for row in rows]


def as_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as a table; what was not measured is a dash."""
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "|".join("---" for _ in rows[0]) + "|"]
    for row in rows:
        cells = ["–" if x is None else f"{x:.3g}" if isinstance(x, float) else str(x) for x in row.values()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def page(training: Sequence[dict[str, Any]], drawing: Sequence[dict[str, Any]], args: argparse.Namespace) -> str:
    """The page that docs/ holds."""
    import diffusers

    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "a CPU"
    what = "Stable Diffusion 1.x with random weights" if not args.tiny else "a tiny model"
    return f"""# On a GPU

`python -m benchmarks.gpu` measured these on {where} (torch {torch.__version__}, diffusers {diffusers.__version__}):
{what}, {args.pixels} × {args.pixels} pixels, {args.batch} images a step, with gradient checkpointing and latents cached
where a row does not say otherwise. Medians over {args.steps} steps after {args.warm}. Memory is what tensors took at
most, without the context of CUDA.

## Training

{as_markdown(relative(training))}

## Drawing

{args.batch} images in one batch, {args.draw_steps} steps, classifier-free guidance at 7.5:

{as_markdown(drawing)}
"""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="runs whose name this pattern fits, whole")
    parser.add_argument("--batch", type=int, default=4, help="images a step, and drawn in one batch")
    parser.add_argument("--steps", type=int, default=40, help="steps that count")
    parser.add_argument("--warm", type=int, default=10, help="steps before them; a compiled run takes as many more")
    parser.add_argument("--draw-steps", type=int, default=50, help="denoising steps of drawing")
    parser.add_argument("--pixels", type=int, default=512, help="side of the images")
    parser.add_argument("--workers", type=int, default=4, help="processes that read images")
    parser.add_argument("--tiny", action="store_true", help="a tiny model in place of Stable Diffusion's size")
    parser.add_argument("--out", type=Path, default=PAGE, help="page to write")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available() and (not args.tiny or args.out == PAGE):
        raise UsageError("no GPU: take --tiny, and --out for another page than docs/gpus.md")
    names = [name for name in TRAINING if not args.only or re.fullmatch(args.only, name)]
    samples = load_part("finetune")[:64]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        shards, model = Path(folder) / "000000.tar", Path(folder) / "model"
        write_shard(str(shards), [(sample.key, dict(sample.members)) for sample in samples])
        (tiny_pipeline() if args.tiny else random_pipeline(args.pixels)).save_pretrained(model)
        training = []
        for name in names:
            training.append(measure_training(name, model, shards, samples, args))
            print(json.dumps(training[-1], ensure_ascii=False), flush=True)
        drawing = measure_drawing(args, device)
    with write_atomic(args.out) as temporary:
        temporary.write_text(page(training, drawing, args), "utf-8")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
