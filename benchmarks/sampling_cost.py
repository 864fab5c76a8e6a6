"""What guidance costs beside the stock diffusers pipeline: same model, scheduler, steps and seeds, in one run.

    python -m benchmarks.sampling_cost --run runs/quickstart          the sample model, on the quickstart's prompts
    python -m benchmarks.sampling_cost --sd [--pixels 512]            a Stable Diffusion 1.x of random weights: an hour
    python -m benchmarks.sampling_cost --search                       the exact search, up to a million rows of 256

Pipelines are run in turn, stock and guided, and each pair gives a ratio: of the process's CPU time in one thread, and
of wall time, which other programs lengthen. The median pair is printed, with what each part of guidance adds to the
ratio of CPU times: to *decode* the predicted image, or its linear *preview*, to *embed* it, to *search* the index, the
*e_N* pass of the UNet (deduplication), and the *gradient*, which decodes, embeds and searches again. A VAE's preview is
fitted once, by a step that is not counted, and its seconds are printed. A new setting is a line of SETTINGS.

On the sample model, *triggers* are repeated captions of the raw model at which guidance acts, and *quiet* are held-out
captions at which it does not; both are looked for first, for each setting. On the random model nothing is memorized:
its index holds random vectors, whose similarities lie below every threshold, and for *triggers* they are mapped to
0.42, where every term acts (from 0.5 on despecification takes all of the guidance scale, and there is no e_N pass). Its
embedder has SSCD's architecture, a ResNet-50 at 288 pixels with 512 outputs. With few steps, look at the ratio of a
step: what comes before and after the steps is the same in both pipelines, and in 50 steps it is small.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from afresh.files import write_json
from curate.index.calibration import Calibration
from curate.index.training_index import TrainingIndex
from train.denoising.latents.decoder import Decoder
from train.denoising.latents.preview import LinearDecoder
from train.sampling.config import AMGConfig
from train.sampling.guidance import Guidance
from train.sampling.pipelines.stable_diffusion import GuidedStableDiffusion
from train.sampling.terms.amg import AMG

SETTINGS: dict[str, dict[str, Any]] = {  # fields of AMGConfig
    "AMG, main": {},
    "AMG, floor −1": {"floor": -1.0},
    "AMG, main, every 2nd step": {"every": 2},
    "AMG, early": {"preset": "early"},
    "AMG, views": {"preset": "views"},  # on the sample model alone: random vectors have no views
}
PARTS = ("decode", "preview", "embed", "search", "e_N pass", "gradient")
TRIGGERS = Calibration((-1.0, 1.0), (0.41, 0.43))


@dataclasses.dataclass
class Case:
    """A model, its training set, and prompts."""

    name: str
    stock: Any
    """The diffusers pipeline."""
    guided: GuidedStableDiffusion
    index: TrainingIndex
    embedder: Any
    prompts: Sequence[str]
    steps: int
    scale: float
    views: Sequence[tuple[TrainingIndex, Any]] = ()
    """Of the training set, each with its embedder."""


@dataclasses.dataclass
class Times:
    """Of one call: seconds of CPU and wall, also of a step after the first, and CPU seconds of guidance's parts."""

    cpu: float
    wall: float
    cpu_step: float
    wall_step: float
    parts: Counter[str]
    fired: set[int]
    """Images at which guidance acted."""


# ------------------------------------------------------------------------------------------------------------ measuring


@contextmanager
def clocked(embedder: Any, index: TrainingIndex) -> Iterator[Counter[str]]:
    """CPU seconds of guidance's parts: everything under a gradient counts as gradient."""
    parts: Counter[str] = Counter()
    inside: list[str] = []  # the outermost part is the one that counts

    def clock(name: str, function: Any, applies: Callable[..., bool] | None) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            if inside or (applies is not None and not applies(*args)):
                return function(*args, **options)
            inside.append("gradient" if torch.is_grad_enabled() else name)
            began = time.process_time()
            try:
                return function(*args, **options)
            finally:
                parts[inside.pop()] += time.process_time() - began

        return call

    places = [
        (Decoder, "__call__", "decode", None),
        (LinearDecoder, "__call__", "preview", None),
        (type(embedder), "features", "embed", None),
        (type(index), "search", "search", None),
        (AMG, "_near_noise", "e_N pass", None),
        (torch.autograd, "grad", "gradient", None),
    ]
    before = [vars(place)[method] for place, method, _, _ in places]
    for (place, method, name, applies), function in zip(places, before, strict=True):
        static = isinstance(function, staticmethod)
        timed = clock(name, function.__func__ if static else function, applies)
        setattr(place, method, staticmethod(timed) if static else timed)
    try:
        yield parts
    finally:
        for (place, method, _, _), function in zip(places, before, strict=True):
            setattr(place, method, function)


def timed(case: Case, pipe: Any, prompts: Sequence[str], **options: Any) -> Times:
    """Draw once."""
    marks: list[tuple[float, float]] = []

    def mark(*args: Any) -> dict[str, Any]:
        marks.append((time.process_time(), time.perf_counter()))
        return {}

    with clocked(case.embedder, case.index) as parts:
        cpu, wall = time.process_time(), time.perf_counter()
        output = pipe(
            list(prompts),
            num_inference_steps=case.steps,
            guidance_scale=case.scale,
            generator=[torch.Generator().manual_seed(seed) for seed in range(len(prompts))],
            callback_on_step_end=mark,
            **options,
        )
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    cpu_step, wall_step = ((column[-1] - column[0]) / (len(column) - 1) for column in zip(*marks, strict=True))
    fired = {row["image"] for row in getattr(output, "trace", ()) if row["fired"]}
    return Times(cpu, wall, cpu_step, wall_step, parts, fired)


def fit_preview(case: Case) -> None:
    """Let the guided pipeline fit its VAE's preview now, by one step of guidance."""
    began = time.process_time()
    amg = AMG(case.index, case.embedder, decoder="linear")
    options = {"num_inference_steps": 1, "output_type": "latent"}
    case.guided("", generator=torch.Generator().manual_seed(0), guidance=[amg], **options)  # type: ignore[arg-type]
    print(f"{case.name}: {time.process_time() - began:.1f} s to fit the preview, with one step", flush=True)


def compare(case: Case, prompts: Sequence[str], guidance: Guidance, rounds: int) -> dict[str, Any]:
    """Ratios guided to stock, the median of pairs drawn in turn; of the parts, CPU time to that of all of stock."""
    pairs = []
    for _ in range(rounds):
        stock = timed(case, case.stock, prompts)
        pairs.append((stock, timed(case, case.guided, prompts, guidance=[guidance])))
    row: dict[str, Any] = {"fired": len(pairs[0][1].fired) / len(prompts)}
    for name in ("cpu", "wall", "cpu_step", "wall_step"):
        row[name] = statistics.median(getattr(guided, name) / getattr(stock, name) for stock, guided in pairs)
    row["stock_seconds"] = statistics.median(stock.cpu / len(prompts) for stock, _ in pairs)
    for part in PARTS:
        row[part] = statistics.median(guided.parts[part] / stock.cpu for stock, guided in pairs)
    return row


# ---------------------------------------------------------------------------------------------------------------- cases


def sample_case(run: Path, steps: int, scale: float) -> tuple[Case, list[str], list[str]]:
    """The quickstart's raw model; its repeated and its held-out captions."""
    from diffusers import StableDiffusionPipeline

    from curate.stages.views import views_of
    from train.evaluation.protocol import read_protocol
    from train.prompts import read_prompts
    from train.sampling.pipelines.session import open_index

    protocol = read_protocol(run / "protocol.yaml")
    stock = StableDiffusionPipeline.from_pretrained(protocol.models["raw"], local_files_only=True)
    stock.set_progress_bar_config(disable=True)
    index, embedder = open_index(protocol.index)
    repeated, held_out = (
        [prompt.caption for prompt in read_prompts(protocol.prompts[kind])] for kind in ("repeated", "held_out")
    )
    guided = GuidedStableDiffusion.from_pipe(stock)
    views = views_of(protocol.index, index)
    case = Case("sample model", stock, guided, index, embedder, [], steps, scale, views)
    return case, repeated, held_out


def stable_diffusion_case(pixels: int, rows: int, steps: int, scale: float) -> Case:
    """Stable Diffusion 1.x and SSCD's architecture, of random weights, and an index of random vectors."""
    from transformers import ResNetConfig, ResNetModel

    from benchmarks.stable_diffusion_memory import random_pipeline
    from curate.embed.preprocessing import Preprocessing
    from curate.embed.torch_embedder import IMAGENET_MEAN, IMAGENET_STD, TorchEmbedder

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = ResNetModel(ResNetConfig()), torch.nn.Linear(2048, 512)  # the default is ResNet-50

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return self.head(self.body(pixels).pooler_output.flatten(1))

    torch.manual_seed(0)
    stock = random_pipeline(pixels)
    stock.set_progress_bar_config(disable=True)
    preprocessing = Preprocessing(288, filter="bilinear", mean=IMAGENET_MEAN, std=IMAGENET_STD)
    embedder = TorchEmbedder("resnet-50", Network(), dim=512, preprocessing=preprocessing)
    index = random_index(rows, 512, embedder.name)
    guided = GuidedStableDiffusion.from_pipe(stock)
    return Case(f"Stable Diffusion 1.x, {pixels} pixels", stock, guided, index, embedder, ["a photo"], steps, scale)


def random_index(rows: int, dim: int, embedder: str, file: Path | None = None) -> TrainingIndex:
    """An index of random unit vectors; with ``file`` in a memory map."""
    shape = (rows, dim)
    vectors: Any = np.empty(shape, np.float16)
    if file is not None:
        vectors = np.lib.format.open_memmap(file, "w+", np.float16, shape)
    random = np.random.default_rng(0)
    for start in range(0, rows, 1 << 16):
        block = random.standard_normal((min(1 << 16, rows - start), dim), dtype=np.float32)
        vectors[start : start + len(block)] = block / np.linalg.norm(block, axis=1, keepdims=True)
    if file is not None:
        vectors.flush()
        vectors = np.load(file, mmap_mode="r")
    names = [f"{i}" for i in range(rows)]
    kept, group = np.ones(rows, bool), np.arange(rows)
    return TrainingIndex(vectors, list(names), [""] * rows, names, kept, group, embedder)


def chosen_settings(pattern: str) -> dict[str, dict[str, Any]]:
    """Those of SETTINGS whose name the pattern fits, whole."""
    return {name: fields for name, fields in SETTINGS.items() if not pattern or re.fullmatch(pattern, name)}


def measure_sample_model(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each setting and kind of prompt."""
    case, repeated, held_out = sample_case(args.run, args.steps or 25, args.scale)
    fit_preview(case)
    rows = []
    for name, settings in chosen_settings(args.only).items():
        views = case.views if settings.get("preset") == "views" else ()
        amg = AMG(case.index, case.embedder, AMGConfig(**settings), views=views)
        for kind, prompts in (("triggers", repeated), ("quiet", held_out)):
            chosen = choose(case, amg, prompts, kind == "triggers", args.batch)
            if not chosen:
                print(f"{name}: no caption is one of the {kind}", flush=True)
                continue
            rows.append({"model": case.name, "setting": name, "prompts": kind, "images": len(chosen)})
            rows[-1] |= compare(case, chosen, amg, args.rounds)
            print(json.dumps(rows[-1], ensure_ascii=False), flush=True)
    return rows


def choose(case: Case, amg: AMG, prompts: Sequence[str], fires: bool, number: int) -> list[str]:
    """The first ``number`` prompts at which guidance acts, or at which it does not, drawn with the batch's seeds."""
    chosen: list[str] = []
    for prompt in prompts:
        seeds = [torch.Generator().manual_seed(len(chosen))]  # of its place in the batch
        options = {"num_inference_steps": case.steps, "guidance_scale": case.scale, "output_type": "latent"}
        trace = case.guided(prompt, generator=seeds, guidance=[amg], **options).trace  # type: ignore[union-attr, arg-type]
        if any(row["fired"] for row in trace) == fires:
            chosen.append(prompt)
        if len(chosen) == number:
            break
    return chosen


def measure_stable_diffusion(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The same, for one image."""
    case = stable_diffusion_case(args.pixels, 4000, args.steps or 4, args.scale)
    fit_preview(case)
    rows = []
    for name, settings in chosen_settings(args.only).items():
        for kind in ("triggers", "quiet") if settings.get("preset") != "views" else ():
            index = case.index
            if kind == "triggers":
                index = dataclasses.replace(case.index, calibration=TRIGGERS)
            amg = AMG(index, case.embedder, AMGConfig(**settings))
            rows.append({"model": case.name, "setting": name, "prompts": kind, "images": 1})
            rows[-1] |= compare(case, case.prompts, amg, args.rounds)
            print(json.dumps(rows[-1], ensure_ascii=False), flush=True)
    return rows


def measure_search(folder: Path, rounds: int, device: str) -> list[dict[str, Any]]:
    """Time of the exact search per image: from the file, with the rows held as guidance does it, and faiss's flat index
    on the CPU. CPU time on a CPU, wall time on another device.
    """
    import faiss

    faiss.omp_set_num_threads(1)
    result = []
    random = np.random.default_rng(1)
    clock = time.process_time if device == "cpu" else time.perf_counter
    for rows in (10_000, 100_000, 1_000_000):
        file = folder / f"{rows}.npy"
        index = random_index(rows, 256, "random", file)
        for where in ("float16 file", f"float32, {device}", "faiss"):
            if where == "faiss":
                flat = faiss.IndexFlatIP(256)
                for start in range(0, rows, 100_000):
                    flat.add(index.vectors(np.arange(start, min(start + 100_000, rows))))
            elif where != "float16 file":
                index.hold(device)
            for batch in (1, 8):
                queries = random.standard_normal((batch, 256)).astype(np.float32)
                vectors = queries if where == "faiss" else torch.from_numpy(queries).to(device)
                search = flat.search if where == "faiss" else index.search
                times = []
                for _ in range(rounds + 1):
                    began = clock()
                    search(vectors, 50)
                    times.append((clock() - began) * 1000 / batch)
                result.append({"rows": rows, "where": where, "batch": batch, "ms": statistics.median(times[1:])})
                print(json.dumps(result[-1]), flush=True)
        del index
        file.unlink()
    return result


# ---------------------------------------------------------------------------------------------------------------- table


def as_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Ratios of whole images and of a step, and the parts."""
    heads = ["model", "setting", "prompts", "images", "CPU", "wall", "CPU of a step", "wall of a step", *PARTS]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in rows:
        cells = [str(row[name]) for name in heads[:4]]
        cells += [f"{row[name]:.2f} ×" for name in ("cpu", "wall", "cpu_step", "wall_step")]
        cells += [f"+ {row[part]:.2f}" if row[part] else "" for part in PARTS]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--run", type=Path, help="folder of a finished quickstart")
    what.add_argument("--sd", action="store_true", help="a Stable Diffusion 1.x with random weights: 8 GB of memory")
    what.add_argument("--search", action="store_true", help="the search alone: 4 GB of memory, 0.5 GB of disk")
    parser.add_argument("--only", default="", help="settings whose name this pattern fits, whole")
    parser.add_argument("--rounds", type=int, default=3, help="pairs, of which the median is printed")
    parser.add_argument("--steps", type=int, default=0, help="denoising steps; 0 is 25, and with --sd 4")
    parser.add_argument("--scale", type=float, default=7.5, help="of classifier-free guidance")
    parser.add_argument("--batch", type=int, default=8, help="images drawn together, of the sample model")
    parser.add_argument("--pixels", type=int, default=512, help="side of the images, with --sd")
    parser.add_argument("--device", default="cpu", help="that holds the rows, with --search")
    parser.add_argument("--folder", type=Path, default=Path("."), help="for the index, with --search")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.search:
        rows = measure_search(args.folder, args.rounds, args.device)
        lines = ["| rows | held | batch | ms an image |", "|---|---|---|---|"]
        for row in rows:
            lines.append(f"| {row['rows']:,} | {row['where']} | {row['batch']} | {row['ms']:.2f} |")
        print("\n" + "\n".join(lines))
    else:
        rows = measure_stable_diffusion(args) if args.sd else measure_sample_model(args)
        print(f"\n{args.rounds} pairs, scheduler of the model, scale {args.scale:g}, one thread\n\n{as_markdown(rows)}")
    if args.json:
        write_json(args.json, {"rows": rows})


if __name__ == "__main__":
    main()
