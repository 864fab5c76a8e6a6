"""Memorization and AMG in pixel space: what a model trained on repeats copies, and what guidance leaves of it.

    python -m benchmarks.unconditional --out runs/pixels              both models: trained first if they are not there
    python -m benchmarks.unconditional --out runs/pixels --images 16  fewer images

For each of the models of ``train.sample_model.pixels`` (unconditional; class-conditional with classifier-free guidance,
classes as often as in the training set) the same seeds are drawn by DDPM without guidance, with AMG on pixels
(normalised L2; with the published schedule, and with one that starts earlier), with AMG on objects (the carried copy
detector), with the default of ``train sample`` (by the views of that index, and drawn again), and with rejection.
Printed, and written to ``table.json``:

- *nL2 < 1.4*: the share that counts as memorized by normalised L2, with the ``α`` at which 1 % of the images that were
  never trained on would (the paper's 0.5 takes a third of them for copies); *detector*: above 0.5 on SSCD's scale. AMG
  follows one or the other, so under it that number is no evidence;
- *judge* and *pixels*: copies by the independent judge and by correlation above 0.9 at 16 × 16 pixels;
- *repeated*: the share whose nearest training image, by pixels, is a repeated one, and that is a copy by any of these;
- *FD*: Fréchet distance of the judge's features to the training images, each once, and to images never trained on.

The last row is of images that were never trained on: what each measure says where nothing is copied. ``figure.png``
shows the first images of each row, same seeds in the same column.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDPMPipeline
from PIL import Image, ImageDraw

from afresh.files import write_atomic, write_json
from afresh.progress import get_logger
from curate.embed.registry import load_embedder
from curate.index.training_index import TrainingIndex
from curate.reading.images import decode_image, stack_images
from curate.sample_set import load_part
from curate.stages.views import PIXELS, build_views
from train.evaluation.judging.drawn import Drawn
from train.evaluation.judging.metrics import frechet_distance
from train.evaluation.metrics.dual_encoder import DualEncoderJudge
from train.evaluation.metrics.pixels import Pixels
from train.evaluation.metrics.protocol import Reference
from train.sample_model.pixels import SIDE, TRAINING_SET, PixelsConfig, PixelSet, pixel_set, run
from train.sampling.guidance import Guidance
from train.sampling.pipelines.unconditional import GuidedUnconditional
from train.sampling.presets.config import DEFAULT
from train.sampling.similarity import ObjectLevel, PixelIndex
from train.sampling.terms.amg import AMG
from train.sampling.terms.judges import as_pixels
from train.sampling.terms.rejection import NeverAbove, Rejection

log = get_logger(__name__)
EARLY: dict[str, Any] = {"sim_form": "excess", "normalise": True, "lambda_a": 0.0, "lambda_b": 0.3, "c_3": 6.0}
COLUMNS = ("nl2", "detector", "judge", "pixels", "repeated", "fd_training", "fd_unseen", "fired")
NAMES = ("nL2 < 1.4", "detector", "judge", "pixels", "repeated", "FD train", "FD unseen", "fired")


def to_pil(pixels: torch.Tensor) -> list[Image.Image]:
    """``[n, 3, H, W]`` in [0, 1] → images."""
    array = (pixels.permute(0, 2, 3, 1) * 255).round().byte().numpy()
    return [Image.fromarray(image) for image in array]


class Measures:
    """All that a row of the table rests on.

    Args:
        data: the training set.
    """

    def __init__(self, data: PixelSet) -> None:
        self.data = data
        names = [data.class_names[label] for label in data.labels]
        training = to_pil(data.pixels)
        embedder = load_embedder("copy-detector")
        n = len(training)
        index = TrainingIndex.build(
            embedder.embed(training), names, ["set"] * n, data.keys, np.ones(n, bool), np.arange(n), "copy-detector"
        )
        self.objects, self.index, self.embedder = ObjectLevel(index, embedder), index, embedder
        others = [load_embedder(name) for name in PIXELS]
        made = build_views(index, zip(data.keys, training, strict=True), others)
        self.views = list(zip(made, others, strict=True))
        unseen = torch.from_numpy(stack_images([decode_image(s.image) for s in load_part("held_out")], SIDE))
        self.unseen = to_pil(unseen)
        self.pixels = PixelIndex(data.pixels, names).calibrated(unseen)
        reference = Reference(training, self.unseen, data.class_names)
        self.judge, self.correlation = DualEncoderJudge(reference), Pixels(reference)
        self.training_features = self.judge.encoder.image_features(training)

    def row(self, images: Sequence[Image.Image], fired: float | None = None) -> dict[str, Any]:
        """The numbers of one row; ``fired`` is the share of images that guidance acted on."""
        pixels = as_pixels(list(images))
        near = self.pixels.nearest(pixels, 1)
        with torch.no_grad():
            detector = self.objects.nearest(pixels, 1).sigma[:, 0].numpy() > self.objects.memorized
        nl2 = near.sigma[:, 0].numpy() > self.pixels.memorized
        drawn = Drawn("", "", "", images, [self.data.class_names[0]] * len(images))
        copied = self.judge.measure(drawn)["copied_share"].images
        correlated = self.correlation.measure(drawn)["pixel_copied_share"].images
        repeated = (self.data.copies[near.rows[:, 0]] > 1).numpy()
        features = self.judge.encoder.image_features(images)
        return {
            "nl2": float(nl2.mean()),
            "detector": float(detector.mean()),
            "judge": float(copied.mean()),
            "pixels": float(correlated.mean()),
            "repeated": float((repeated & (nl2 | detector | copied | correlated)).mean()),
            "fd_training": frechet_distance(features, self.training_features),
            "fd_unseen": frechet_distance(features, self.judge.held_out_features),
            "fired": fired,
        }


def draw(
    pipe: GuidedUnconditional,
    seeds: Sequence[int],
    labels: Sequence[int] | None,
    steps: int,
    scale: float,
    guidance: Sequence[Guidance] = (),
    batch: int = 32,
) -> Any:
    """Images from seeds, in batches, and the trace of all."""
    images, trace = [], []
    for start in range(0, len(seeds), batch):
        some = range(start, min(start + batch, len(seeds)))
        output = pipe(
            batch_size=len(some),
            generator=[torch.Generator().manual_seed(seeds[i]) for i in some],
            class_labels=None if labels is None else [labels[i] for i in some],
            guidance_scale=scale,
            num_inference_steps=steps,
            guidance=guidance,
        )
        images += output.images
        trace += [{**row, "image": row["image"] + start} for row in output.trace]
    output.images, output.trace = images, trace
    return output


def share_fired(trace: Sequence[dict[str, Any]], n: int) -> float:
    """Share of the images at which a term acted at some step."""
    return len({row["image"] for row in trace if row["fired"]}) / n


def measure_model(
    name: str, pipe: GuidedUnconditional, labels: list[int] | None, scale: float, m: Measures, args: argparse.Namespace
) -> list[tuple[dict[str, Any], list[Image.Image]]]:
    """The rows of one model, and their images."""
    seeds = list(range(args.images))
    reject = Rejection(m.pixels, tries=5)

    def plain(rows: list[int], now: list[int]) -> Any:
        return draw(pipe, now, None if labels is None else [labels[i] for i in rows], args.steps, scale)

    def guided(term: Guidance) -> tuple[list[Image.Image], float | None]:
        output = draw(pipe, seeds, labels, args.steps, scale, [term])
        return output.images, share_fired(output.trace, len(seeds))

    def by_views() -> tuple[list[Image.Image], float | None]:
        term = AMG(m.index, m.embedder, DEFAULT, views=m.views)
        tries = 1 + (term.config.restarts or 0)
        again = NeverAbove(
            m.index, m.embedder, tries=tries, views=m.views, withhold=False, guided=term.config.guided_limit
        )

        def drawn(rows: list[int], now: list[int], terms: Sequence[Guidance]) -> Any:
            return draw(pipe, now, None if labels is None else [labels[i] for i in rows], args.steps, scale, terms)

        kept = again(drawn, seeds, [term])
        return [one.image for one in kept], float(np.mean([any(step["fired"] for step in one.trace) for one in kept]))

    ways: dict[str, Callable[[], tuple[list[Image.Image], float | None]]] = {
        "none": lambda: (plain(seeds, seeds).images, None),
        "AMG, pixels, published": lambda: guided(AMG(m.pixels)),
        "AMG, pixels, early": lambda: guided(AMG(m.pixels, lambda_a=-2.4)),
        "AMG, objects, early": lambda: guided(AMG(m.index, m.embedder, **EARLY)),
        "AMG, views": by_views,
        "rejection": lambda: ([one.image for one in reject(plain, seeds)], None),
    }
    rows = []
    for guidance, way in ways.items():
        log.info("%s, %s", name, guidance)
        images, fired = way()
        rows.append(({"model": name, "guidance": guidance, **m.row(images, fired)}, images))
    return rows


def figure(rows: Sequence[tuple[dict[str, Any], list[Image.Image]]], path: Path, columns: int = 14) -> None:
    """Rows of the table down, seeds across."""
    side, label = 2 * SIDE + 2, 190
    page = Image.new("RGB", (label + side * columns, side * len(rows)), "white")
    pen = ImageDraw.Draw(page)
    for y, (row, images) in enumerate(rows):
        pen.text((4, y * side + side // 2 - 12), f"{row['model']}\n{row['guidance']}", fill="black")
        for x, image in enumerate(images[:columns]):
            page.paste(image.resize((2 * SIDE, 2 * SIDE), Image.Resampling.NEAREST), (label + x * side, y * side))
    with write_atomic(path) as temporary:
        page.quantize(256).save(temporary, format="PNG", optimize=True)


def as_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table."""
    lines = ["| model | guidance | " + " | ".join(NAMES) + " |", "|---|---|" + "---|" * len(NAMES)]
    for row in rows:
        cells = []
        for column in COLUMNS:
            value = row[column]
            if value is None:
                cells.append("")
            else:
                cells.append(f"{value:.1f}" if column.startswith("fd") else f"{100 * value:.1f} %")
        lines.append(f"| {row['model']} | {row['guidance']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/pixels")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--scale", type=float, default=2.0, help="of classifier-free guidance")
    args = parser.parse_args()
    out = Path(args.out)
    torch.set_num_threads(1)
    rows = []
    measures = None
    for kind, classes in (("unconditional", False), ("classes", True)):
        folder = out / kind
        if not (folder / TRAINING_SET).is_file():
            run(PixelsConfig(out=str(folder), classes=classes))
        settings = json.loads((folder / TRAINING_SET).read_text())["settings"]
        data = pixel_set(settings["every"], settings["repeated"], settings["copies"])
        measures = measures or Measures(data)
        stock = DDPMPipeline.from_pretrained(folder, local_files_only=True)
        stock.set_progress_bar_config(disable=True)
        if not classes:
            pipe = GuidedUnconditional.from_pipe(stock)
            rows += measure_model("unconditional", pipe, None, 1.0, measures, args)
            continue
        pipe = GuidedUnconditional.from_pipe(stock, null_class=data.null_class, class_names=data.class_names)
        often = torch.multinomial(
            data.copies.float(), args.images, replacement=True, generator=torch.Generator().manual_seed(0)
        )
        labels = data.labels[often].tolist()
        rows += measure_model(f"classes, scale {args.scale:g}", pipe, labels, args.scale, measures, args)
    assert measures is not None
    rows.append(({"model": "never trained on", "guidance": "", **measures.row(measures.unseen)}, measures.unseen))
    figure(rows, out / "figure.png")
    table = [row for row, _ in rows]
    write_json(out / "table.json", {"images": args.images, "steps": args.steps, "rows": table})
    print(as_markdown(table))


if __name__ == "__main__":
    main()
