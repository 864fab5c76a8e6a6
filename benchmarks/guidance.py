"""Forms of guidance × development models × judges: what each leaves, what it costs, and the worst that is left.

    python -m benchmarks.guidance runs/quickstart runs/guidance/strong runs/guidance/twemoji --out runs/forms
    python -m benchmarks.guidance … --only 'none|amg' --captions 12 --steps 50 --scale 4
    python -m benchmarks.guidance … --scheduler DPMSolverMultistepScheduler --out runs/forms_dpm
    python -m benchmarks.guidance … --forms forms.yaml        forms of one's own: of each name settings of train sample

A model is a finished quickstart, or a folder of ``benchmarks.guidance_models``. Its repeated captions, which it
memorizes, and held-out captions are drawn by its raw model under each of FORMS, from the same seeds, and the repeated
ones by its curated twin, where there is one. Finished rows are kept. Printed as Markdown, and in ``table.json``:

- *followed*: copies by the highest of the index and its views, which the default guidance follows: no evidence;
- *judge*, *pixels*, *ImageNet*: copies by the dual encoder, by correlation above 0.9 at 16 × 16 pixels, by the second
  judge (with the extra ``judges``); nothing follows these. *any*: by one of them, or followed;
- *of real*: alignment with the caption as a share of what the real images of these captions earn;
- *drawings*: per image, restarts among them; *CPU*: seconds per image in one thread, relative to no guidance;
- *untouched*: share of held-out captions' images that are bit for bit the unguided ones; in brackets of those whose
  unguided image is no copy by any view.

In brackets 95 % intervals over captions. ``worst.png`` has, of every model under the default guidance, the images with
the highest similarity that is left (by any of the judges, in ranks), each after its nearest training image.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
import torch
import yaml
from PIL import Image

from afresh.files import write_atomic, write_json
from afresh.progress import get_logger
from benchmarks.mitigation import draw, sample_config, write_prompts
from train.evaluation.config import Protocol
from train.evaluation.judging.drawn import Drawn, Measured, read_drawn
from train.evaluation.judging.intervals import interval, resampled, share
from train.evaluation.judging.originals import read_images, read_originals
from train.evaluation.metrics.dual_encoder import DualEncoderJudge
from train.evaluation.metrics.imagenet import ImageNetJudge
from train.evaluation.metrics.measuring import RESAMPLES, evaluate_images
from train.evaluation.metrics.pixels import Pixels, stacked
from train.evaluation.metrics.protocol import Reference
from train.evaluation.protocol import read_protocol
from train.memorization.config import MEMORIZED
from train.prompts import read_prompts

log = get_logger(__name__)
FORMS: dict[str, dict[str, Any]] = {
    "none": {},
    "amg": {"guidance": "amg"},
    "amg-early": {"guidance": "amg-early"},
    "amg-released": {"guidance": "amg-released"},
    "amg-paper": {"guidance": "amg-paper"},
    "amg-strong": {"guidance": "amg-strong"},
    "tokens+amg-released": {"guidance": "tokens+amg-released"},
    "amg, never above 0.5": {"guidance": "amg", "never_above": 0.5},
    "amg, own embedder": {"guidance": "amg", "amg": {"preset": "views", "views": False}},
    "amg, floor stays": {"guidance": "amg", "amg": {"preset": "views", "escalate": 0.0}},
}
TWIN = "curated twin"
JUDGES = {"judge": "copied_share", "pixels": "pixel_copied_share", "ImageNet": "imagenet_copied_share"}


class Bench:
    """One model: its prompts, its judges, and where its images go."""

    def __init__(self, run: Path, args: argparse.Namespace) -> None:
        self.run, self.args, self.out = run, args, args.out / run.name
        self.protocol: Protocol = read_protocol(run / "protocol.yaml")
        self.out.mkdir(parents=True, exist_ok=True)
        for kind, number in (("repeated", args.captions), ("held_out", args.held_out)):
            if number:
                write_prompts(self.out / f"{kind}.jsonl", self.protocol.prompts[kind], number)
        self._metrics: list[Any] = []

    @cached_property
    def training(self) -> tuple[list[Image.Image], list[str]]:
        """Distinct training images, and their captions."""
        return read_images(self.protocol.training)

    def metrics(self) -> list[Any]:
        """The judges, opened when the first images are there."""
        if not self._metrics:
            training, captions = self.training
            held_out, more = read_images(self.protocol.held_out)
            prompts = [prompt for file in self.protocol.prompts.values() for prompt in read_prompts(file)]
            originals = {caption: [image] for caption, image in read_originals(prompts).items()}
            reference = Reference(training, held_out, captions + more, originals=originals)
            kinds = [DualEncoderJudge, Pixels]
            if not ImageNetJudge.lacking(self.protocol):
                kinds.append(ImageNetJudge)
            self._metrics = [kind(reference) for kind in kinds]
        return self._metrics

    def row(self, form: str, kind: str) -> dict[str, Any] | None:
        """The numbers of one form, drawn and measured now unless they were before; None of a twin that is not there."""
        model = self.protocol.models.get("curated" if form == TWIN else "raw")
        if model is None or not Path(model).is_dir():
            return None
        folder = self.folder(form, kind)
        kept = folder / "row.json"
        if kept.is_file():
            return json.loads(kept.read_text(encoding="utf-8"))
        log.info("%s, %s, %s", self.run.name, form, kind)
        args = self.args
        config = sample_config(
            FORMS.get(form, {}),
            model=model,
            prompts=str(self.out / f"{kind}.jsonl"),
            out=str(folder),
            index=self.protocol.index,
            seeds=args.seeds if kind == "repeated" else 1,
            first_seed=args.first_seed,
            steps=args.steps,
            scale=args.scale,
            scheduler=args.scheduler,
            batch_size=args.batch_size,
        )
        cost = draw(config)
        row = {**self.measured(folder, form, kind), **cost}
        write_json(kept, row)
        return row

    def folder(self, form: str, kind: str) -> Path:
        """Of the images of a form."""
        return self.out / re.sub(r"[^a-z0-9.]+", "-", form.lower()) / kind

    def untouched(self, form: str) -> tuple[float, float]:
        """The share of held-out captions' images that a form leaves as they are, and of those that are no copies."""
        plain, folder = self.folder("none", "held_out"), self.folder(form, "held_out")
        rows = parquet.read_table(plain / "samples.parquet").to_pylist()
        same = np.array([_same(folder / row["file"], plain / row["file"]) for row in rows])
        return float(same.mean()), float(same[[row["highest"] <= MEMORIZED for row in rows]].mean())

    def measured(self, folder: Path, form: str, kind: str) -> dict[str, Any]:
        """Of the images in a folder."""
        drawn = read_drawn(folder, self.run.name, form, kind)
        rows = parquet.read_table(folder / "samples.parquet").to_pylist()
        written = [row for row in rows if not row["withheld"]]
        (found,) = evaluate_images([drawn], self.metrics())
        followed = np.array([row["highest"] for row in written]) > MEMORIZED
        judged = {name: found.images[key] for name, key in JUDGES.items() if key in found.images}
        shares = {"followed": followed, **judged, "any": np.logical_or.reduce([followed, *judged.values()])}
        row: dict[str, Any] = {"images": len(written), "withheld": len(rows) - len(written)}
        choices = resampled(drawn.captions, RESAMPLES)
        for name, flags in shares.items():
            row[name] = [float(flags.mean()), *interval(share(flags), drawn.captions, choices)]
        if "alignment_of_real" in found.row:
            row["of real"] = [found.row[f"alignment_of_real{end}"] for end in ("", "_low", "_high")]
        row["drawings"] = sum(one["tries"] for one in rows) / len(written)
        row["fired"] = float(np.mean([one["steps_fired"] > 0 or one["tries"] > 1 for one in written]))
        row["worst"] = self.worst(drawn, written, found)
        return row

    def worst(self, drawn: Drawn, written: Sequence[dict[str, Any]], found: Measured) -> list[dict[str, Any]]:
        """The images with the highest rank by any judge, each with its nearest training image by pixels."""
        scores = [np.array([row["highest"] for row in written]), found.images["judged"], found.images["pixel"]]
        ranks = np.max([score.argsort().argsort() for score in scores], 0)
        pixels = next(metric for metric in self.metrics() if isinstance(metric, Pixels))
        from train.evaluation.judging.metrics import thumbnails

        nearest = (thumbnails(stacked(drawn.images)) @ pixels.training.T).argmax(1)
        order = np.argsort(-ranks, kind="stable")[:8]
        return [
            {"file": written[i]["file"], "nearest": int(nearest[i]), "pixel": float(scores[2][i])}
            for i in order.tolist()
        ]


def _same(one: Path, two: Path) -> bool:
    if not two.is_file():
        return False
    with Image.open(one) as first, Image.open(two) as second:
        return first.tobytes() == second.tobytes()


def as_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table."""
    names = ["followed", *JUDGES, "any", "of real"]
    head = ["model", "form", *names, "drawings", "CPU", "untouched", "CPU, held out"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        one, other, base = row["repeated"], row.get("held_out"), row["base"]
        cells = [row["model"], row["form"]]
        for name in names:
            if name not in one:
                cells.append("")
                continue
            value, low, high = (100 * number for number in one[name])
            cells.append(f"{value:.0f} % [{low:.0f}, {high:.0f}]")
        cells.append(f"{one['drawings']:.2f}" + (f" ({one['withheld']} withheld)" if one["withheld"] else ""))
        cells.append(f"{one['cpu'] / base['repeated']:.2f}")
        cells.append("{:.0%} ({:.0%})".format(*row["untouched"]) if "untouched" in row else "")
        cells.append(f"{other['cpu'] / base['held_out']:.2f}" if other else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def figure(benches: Sequence[Bench], path: Path, form: str = "amg", side: int = 128) -> None:
    """A row a model: the worst of a form's repeated captions, each after its nearest training image."""
    page = Image.new("RGB", (8 * (2 * side + 12), len(benches) * (side + 8)), "white")
    for y, bench in enumerate(benches):
        row, folder = bench.row(form, "repeated"), bench.out / form / "repeated"
        for x, worst in enumerate(row["worst"] if row else []):
            with Image.open(folder / worst["file"]) as drawn:
                for k, image in enumerate((bench.training[0][worst["nearest"]], drawn)):
                    place = x * (2 * side + 12) + k * side, y * (side + 8)
                    page.paste(image.convert("RGB").resize((side, side), Image.Resampling.LANCZOS), place)
    with write_atomic(path) as temporary:
        page.quantize(256).save(temporary, format="PNG", optimize=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="models: folders with a protocol.yaml")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default=".*", help="forms whose names match")
    parser.add_argument("--forms", type=Path, help="a YAML file: of each form's name what differs from no guidance")
    parser.add_argument("--captions", type=int, default=24)
    parser.add_argument("--held_out", type=int, default=24, help="captions; 0 draws none of them")
    parser.add_argument("--seeds", type=int, default=1, help="images per repeated caption")
    parser.add_argument("--first_seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--scale", type=float, default=7.5)
    parser.add_argument("--scheduler", default="")
    parser.add_argument("--batch_size", type=int, default=24)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.forms:
        FORMS.clear()
        FORMS.update({"none": {}, **yaml.safe_load(args.forms.read_text(encoding="utf-8"))})
    chosen = [form for form in [*FORMS, TWIN] if re.fullmatch(args.only, form)]
    table: list[dict[str, Any]] = []
    benches = [Bench(run, args) for run in args.runs]
    kinds = ("repeated", "held_out") if args.held_out else ("repeated",)
    for bench in benches:
        plain = {kind: bench.row("none", kind) for kind in kinds}
        base = {kind: row["cpu"] for kind, row in plain.items() if row}
        for form in chosen:
            rows = {kind: bench.row(form, kind) for kind in (kinds[:1] if form == TWIN else kinds)}
            if rows["repeated"] is None:
                continue
            table.append({"model": bench.run.name, "form": form, "base": base, **rows})
            if "held_out" in rows:
                table[-1]["untouched"] = bench.untouched(form)
            print(as_markdown(table[-1:]).splitlines()[-1], flush=True)
    if "amg" in chosen:
        figure(benches, args.out / "worst.png")
    settings = {name: value for name, value in vars(args).items() if name not in ("runs", "out", "forms")}
    write_json(args.out / "table.json", {"settings": settings, "rows": table})
    print(as_markdown(table))


if __name__ == "__main__":
    main()
