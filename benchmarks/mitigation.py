"""Every mitigation on one memorizing model: the same prompts, seeds and scheduler, measured by all judges.

    python -m benchmarks.mitigation runs/quickstart --out runs/mitigation             all of METHODS: an hour or two
    python -m benchmarks.mitigation runs/quickstart --out runs/mitigation --only 'none|AMG.*'
    python -m benchmarks.mitigation runs/quickstart --out runs/mitigation --neurons neurons.json
                                                           also with the neurons blocked that train localize wrote
    python -m benchmarks.mitigation --results benchmarks/results/mitigation.parquet
                                                           table and figure of numbers that are stored; draws no image

The model is the raw one of a finished quickstart. Its repeated captions, which it memorizes, and held-out captions,
which it should draw as before, are drawn under each of METHODS. A method's images and ``row.json`` stay in its folder,
and it is not drawn again; a row that was measured with other sizes is refused. A new method is a new line of METHODS.

Columns of repeated captions:

- *own*: memorized by the embedder that AMG and rejection follow: for them it is no evidence that a copy is gone;
- *judge*: copies by the dual encoder, which nothing follows; *pixels*: by correlation above 0.9 at 16 × 16 pixels;
- *any*: by at least one of the three. *independent* (in the figure): by judge or pixels;
- in brackets 95 % intervals over captions;
- *similarity*: mean, of the own embedder, on SSCD's scale; *alignment* with the caption, of the judge, as a share of
  what the real images of the same captions earn;
- *FD*: Fréchet distance of the judge's features to images that were never trained on, which with these few images
  compares rows and no more.

Of held-out captions: *any*; *alignment*; *FD*; *fired*, the share of images at which guidance acted, or which were
drawn again or from another start; *same*, the share that is bit for bit the unguided image.

Cost, repeated and held-out: *passes* are latents through the UNet per image, both halves of classifier-free guidance
and passes that a gradient runs through counted as one each; *CPU* is the process's time per image, in one thread, with
loading the model and writing the files, and grows when the machine does other things.

The first rows are no methods: real images that were never trained on (what the measures say where nothing is copied),
and the model that was trained on the curated set.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from afresh.files import write_json
from afresh.progress import get_logger
from benchmarks.mitigation_figure import draw_figure
from train.evaluation.judging.drawn import Drawn, read_drawn
from train.evaluation.judging.intervals import interval, resampled, share
from train.evaluation.judging.originals import read_images, read_originals
from train.evaluation.metrics.detector import Detector
from train.evaluation.metrics.dual_encoder import DualEncoderJudge
from train.evaluation.metrics.measuring import RESAMPLES, evaluate_images
from train.evaluation.metrics.pixels import Pixels
from train.evaluation.metrics.protocol import Metric, Reference
from train.evaluation.protocol import read_protocol
from train.prompts import read_prompts
from train.sampling.config import SampleConfig
from train.sampling.job.job import run_sample
from train.sampling.pipelines.session import open_index

log = get_logger(__name__)
SIZES = ("captions", "held_out", "seeds", "first_seed", "steps", "scale")
"""Options that every row of a table shares."""


@dataclasses.dataclass(frozen=True)
class Method:
    """One row of the table."""

    family: str
    """Colour of the figure; of one family, the rows with a ``strength`` are joined to a curve."""
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of :class:`SampleConfig`; a term's own, as in ``{"amg": {"floor": -1.0}}``, under its key."""
    strength: str = ""
    """What the figure writes beside a point of a curve; its number says where along the curve it lies."""
    model: str = "raw"


def amg(family: str = "AMG", strength: str = "", guidance: str = "amg", **settings: Any) -> Method:
    """AMG by a preset, the published one where none is named, with some of its settings changed."""
    return Method(family, {"guidance": guidance, "amg": {"preset": "main", **settings}}, strength)


def term(family: str, guidance: str, strength: str = "", **settings: Any) -> Method:
    """Another guidance by name, with its own settings under their key."""
    return Method(family, {"guidance": guidance, **settings}, strength)


METHODS: dict[str, Method] = {
    "none": Method("none"),
    "curated model": Method("curated model", model="curated"),
    "AMG, main": amg(strength="floor 1"),
    "AMG, floor −1": amg(strength="floor −1", floor=-1.0),
    "AMG, strong": amg("AMG, strong", "floor 1", preset="strong"),
    "AMG, early": amg("AMG, early", "floor 0", preset="early"),
    "AMG, views": amg("AMG, views", preset="views"),
    "prompt, target 1": term("prompt", "prompt", "1", prompt={"target": 1.0}),
    "anisotropy": term("anisotropy", "anisotropy", "1.5"),
    "attention": term("attention", "attention", "1.25"),
    "basin": term("basin", "basin"),
    "opposite": term("opposite", "opposite"),
    "noise": term("noise", "noise"),
    "noise-batch": term("noise-batch", "noise-batch"),
    "tokens, 4": term("tokens", "tokens", "4"),
    "numbers, 4": term("numbers", "numbers", "4", tokens={"number": 4}),
    "rejection": term("rejection", "rejection", "5"),
    "scale 1": Method("scale", {"scale": 1.0}, "1"),
    "scale 2": Method("scale", {"scale": 2.0}, "2"),
    "tokens + AMG": amg("tokens + AMG", guidance="tokens+amg"),
    "basin + AMG": amg("basin + AMG", guidance="basin+amg"),
    "prompt, target 1.5": term("prompt", "prompt", "1.5"),
    "prompt, target 0.7": term("prompt", "prompt", "0.7", prompt={"target": 0.7}),
    "prompt, target 0.5": term("prompt", "prompt", "0.5", prompt={"target": 0.5}),
    "AMG, floor 0": amg(strength="floor 0", floor=0.0),
    "AMG, floor −2": amg(strength="floor −2", floor=-2.0),
    "AMG, strong, floor −1": amg("AMG, strong", "floor −1", preset="strong", floor=-1.0),
    "AMG, early, floor 1": amg("AMG, early", "floor 1", preset="early", floor=1.0),
    "AMG, early, floor −1": amg("AMG, early", "floor −1", preset="early", floor=-1.0),
    "tokens, 2": term("tokens", "tokens", "2", tokens={"number": 2}),
    "tokens, 8": term("tokens", "tokens", "8", tokens={"number": 8}),
    "numbers, 2": term("numbers", "numbers", "2", tokens={"number": 2}),
    "numbers, 8": term("numbers", "numbers", "8", tokens={"number": 8}),
    "basin, until 800": term("basin until", "basin", "800", basin={"until": 800.0}),
    "basin, until 600": term("basin until", "basin", "600", basin={"until": 600.0}),
    "basin, until 400": term("basin until", "basin", "400", basin={"until": 400.0}),
    # The paper's tables 4 and 5, in its own form.
    "without G_sim": amg("ablation", dissimilarity=False),
    "without G_spe": amg("ablation", despecification=False),
    "without G_dup": amg("ablation", deduplication=False),
    "at every step": amg("ablation", schedule="constant", lambda_b=-1.0),
    "constant schedule": amg("ablation", schedule="constant"),
    "parabolic schedule": amg("ablation", schedule="parabolic"),
    # The same of the preset early: what it has and what it could have.
    "early, full decoder": amg("ablation", preset="early", decoder="full"),
    "early, no release": amg("ablation", preset="early", release=0.0),
    "early, from the first step": amg("ablation", preset="early", t_range=(0.0, 1000.0)),
    "early, G_sim to the end": amg("ablation", preset="early", sim_t_range=(0.0, 900.0)),
    "early, without G_sim": amg("ablation", preset="early", dissimilarity=False),
    "early, through the UNet": amg("ablation", preset="early", through_unet=True),
    "early, with edits": amg("ablation", preset="early", edits=3),
}
NEURONS = {  # with --neurons
    "neurons, each prompt's own": Method("neurons", {"neurons_of": "own"}, "own"),
    "neurons, all": Method("neurons", {"neurons_of": "all"}, "all"),
}
KINDS = ("repeated", "held_out")
COLUMNS: dict[str, tuple[str, str]] = {  # head of the table → key of a row, format
    "own": ("repeated.own", "{:.0%}"),
    "judge": ("repeated.judge", "{:.0%}"),
    "pixels": ("repeated.pixels", "{:.0%}"),
    "any": ("repeated.any", "{:.0%}"),
    "similarity": ("repeated.similarity", "{:.2f}"),
    "alignment": ("repeated.alignment", "{:.0%}"),
    "FD": ("repeated.fd", "{:.1f}"),
    "any, held-out": ("held_out.any", "{:.0%}"),
    "alignment, held-out": ("held_out.alignment", "{:.0%}"),
    "FD, held-out": ("held_out.fd", "{:.1f}"),
    "fired": ("held_out.fired", "{:.0%}"),
    "same": ("held_out.same", "{:.0%}"),
    "passes": ("passes", "{:.0f} / {:.0f}"),
    "CPU": ("cpu", "{:.2f} / {:.2f} s"),
}


# ------------------------------------------------------------------------------------------------------------- drawing


def sample_config(settings: dict[str, Any], **common: Any) -> SampleConfig:
    """A job's settings, with those of terms given as mappings."""
    terms = {field.name: field.default_factory for field in dataclasses.fields(SampleConfig)}
    made = {
        name: dataclasses.replace(terms[name](), **value) if isinstance(value, dict) else value  # type: ignore[operator, misc]
        for name, value in settings.items()
    }
    return SampleConfig(**{**common, **made})


@contextlib.contextmanager
def counted_passes() -> Iterator[list[int]]:
    """A list to which each call of a UNet adds the number of latents that it was given."""
    from diffusers import UNet2DConditionModel

    passes: list[int] = []

    def count(module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        if isinstance(module, UNet2DConditionModel):
            passes.append(len(inputs[0]))

    handle = torch.nn.modules.module.register_module_forward_pre_hook(count)
    try:
        yield passes
    finally:
        handle.remove()


def draw(config: SampleConfig) -> dict[str, float]:
    """Draw a folder of images anew; ``passes`` and ``cpu`` seconds per image."""
    shutil.rmtree(config.out, ignore_errors=True)  # of a run that was stopped: its cost would be that of the rest
    began = time.process_time()
    with counted_passes() as passes:
        images = run_sample(config)["images"]
    return {"passes": sum(passes) / images, "cpu": (time.process_time() - began) / images}


def write_prompts(path: Path, file: str, number: int) -> None:
    """The first captions of a prompt file, as a prompt file without originals."""
    rows = [{"caption": prompt.caption, "label": prompt.label} for prompt in read_prompts(file)[:number]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


# ----------------------------------------------------------------------------------------------------------- measuring


class Bench:
    """What all methods share: prompts, the model's folder, and the judges (opened when first needed).

    Args:
        run: a finished quickstart.
        args: the command line's sizes.
    """

    def __init__(self, run: Path, args: argparse.Namespace) -> None:
        self.protocol = read_protocol(run / "protocol.yaml")
        self.out, self.neurons = args.out, args.neurons
        self.sizes = {name: getattr(args, name) for name in SIZES}
        self.out.mkdir(parents=True, exist_ok=True)
        for kind, number in zip(KINDS, (args.captions, args.held_out), strict=True):
            write_prompts(self.out / f"{kind}.jsonl", self.protocol.prompts[kind], number)
        self._measures: tuple[list[Metric], Sequence[Image.Image]] | None = None

    def measures(self) -> tuple[list[Metric], Sequence[Image.Image]]:
        """The metrics, and the images that were never trained on."""
        if self._measures is None:
            index, embedder = open_index(self.protocol.index)
            training, captions = read_images(self.protocol.training)
            held_out, more = read_images(self.protocol.held_out)
            prompts = [prompt for file in self.protocol.prompts.values() for prompt in read_prompts(file)]
            originals = {caption: [image] for caption, image in read_originals(prompts).items()}
            reference = Reference(
                training, held_out, captions + more, originals=originals, index=index, embedder=embedder
            )
            self._measures = [kind(reference) for kind in (Detector, DualEncoderJudge, Pixels)], held_out
        return self._measures

    def file(self, name: str) -> Path:
        """Where a method's row is kept, beside its images."""
        folder = re.sub(r"[^a-z0-9.]+", "-", name.lower().replace("−", "minus ")).strip("-")
        return self.out / folder / "row.json"

    def row(self, name: str, method: Method) -> dict[str, Any]:
        """A method's row; drawn and measured now, unless it has been."""
        found = self.file(name)
        folder = found.parent
        settings = json.loads(json.dumps({"model": method.model, **self.sizes, **method.settings}))  # as it is kept
        shown = {"name": name, "family": method.family, "strength": method.strength}
        if found.is_file():
            row = json.loads(found.read_text(encoding="utf-8"))
            if row.pop("settings") != settings:
                raise SystemExit(f"{folder}: drawn with other settings: remove it, or choose another --out")
            return shown | row
        log.info("%s", name)
        row: dict[str, Any] = {}
        for kind in KINDS:
            # Own neurons are those of prompts that were localized: others are drawn as ever.
            blocked = self.neurons if "neurons_of" in method.settings else ""
            if kind == "held_out" and method.settings.get("neurons_of") == "own":
                blocked = ""
            config = sample_config(
                method.settings,
                model=self.protocol.models[method.model],
                prompts=str(self.out / f"{kind}.jsonl"),
                out=str(folder / kind),
                index=self.protocol.index,
                neurons=blocked,
                seeds=self.sizes["seeds"] if kind == "repeated" else 1,
                first_seed=self.sizes["first_seed"],
                steps=self.sizes["steps"],
                scale=self.sizes["scale"],
            )
            cost = draw(config)
            row[kind] = {**self.measured(read_drawn(folder / kind, method.model, name, kind)), **cost}
            row[kind].update(self.changed(folder / kind, kind))
        write_json(found, {"settings": settings, **row})
        return shown | row

    def measured(self, drawn: Drawn) -> dict[str, float]:
        """The measures of some images, with the ends of the 95 % intervals of *any* and *independent*."""
        (result,) = evaluate_images([drawn], self.measures()[0])
        own, judge, pixels = (
            result.images[key] for key in ("memorized_share", "copied_share", "pixel_copied_share")
        )
        found = {"alignment": result.row.get("alignment_of_real", float("nan"))}
        choices = resampled(drawn.captions, RESAMPLES)
        for name, flags in (("any", own | judge | pixels), ("independent", judge | pixels)):
            found[name] = float(flags.mean())
            found[f"{name}_low"], found[f"{name}_high"] = interval(share(flags), drawn.captions, choices)
        return {
            **found,
            "own": float(own.mean()),
            "judge": float(judge.mean()),
            "pixels": float(pixels.mean()),
            "similarity": result.row["similarity"],
            "fd": result.row["quality"],
        }

    def changed(self, folder: Path, kind: str) -> dict[str, float]:
        """Shares of the images at which guidance acted, and that are the unguided ones bit for bit."""
        import pyarrow.parquet

        columns = ["file", "steps_fired", "tries"]
        rows = pyarrow.parquet.read_table(folder / "samples.parquet", columns=columns).to_pylist()
        same = [same_pixels(folder / row["file"], self.out / "none" / kind / row["file"]) for row in rows]
        # What changes only the start of an image leaves no step in the trace at which it acted.
        fired = [row["steps_fired"] > 0 or row["tries"] > 1 or not one for row, one in zip(rows, same, strict=True)]
        return {"same": float(np.mean(same)), "fired": float(np.mean(fired))}

    def reference(self) -> dict[str, Any]:
        """The row of real images that were never trained on; alignment and FD have no meaning there."""
        found = self.out / "reference.json"
        if not found.is_file():
            held_out = self.measures()[1]
            each = [str(number) for number in range(len(held_out))]  # captions matter to their alignment alone
            measured = self.measured(Drawn("", "", "", held_out, each))
            kept = {name: share for name, share in measured.items() if name not in ("alignment", "fd")}
            write_json(found, {"name": "real images, never trained on", "repeated": kept, "held_out": {}})
        return json.loads(found.read_text(encoding="utf-8"))


def same_pixels(a: Path, b: Path) -> bool:
    """Whether two images are equal bit for bit."""
    with Image.open(a) as one, Image.open(b) as other:
        return one.size == other.size and one.tobytes() == other.tobytes()


# ---------------------------------------------------------------------------------------------------------------- table


def as_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table, a row a method."""
    lines = [f"| method | {' | '.join(COLUMNS)} |", f"|---|{'---|' * len(COLUMNS)}"]
    for row in rows:
        cells = []
        for key, form in COLUMNS.values():
            kind, _, name = key.partition(".")
            values = [row[kind].get(name)] if name else [row[kind].get(key) for kind in KINDS]
            text = "" if None in values else form.format(*values).replace("%", " %")
            if name and f"{name}_low" in row[kind]:
                text += " [{:.0f}, {:.0f}]".format(*(100 * row[kind][f"{name}_{end}"] for end in ("low", "high")))
            cells.append(text)
        lines.append(f"| {row['name']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def write_results(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Every number of the table, a row a method and kind of captions (which the reference has no methods for)."""
    import pyarrow as pa
    import pyarrow.parquet

    shown = ("name", "family", "strength")
    flat = [{name: row.get(name, "") for name in shown} | {"kind": kind} | row[kind] for row in rows for kind in KINDS]
    names = dict.fromkeys(name for row in flat for name in row)
    pyarrow.parquet.write_table(pa.table({name: [row.get(name) for row in flat] for name in names}), path)


def read_results(path: Path) -> list[dict[str, Any]]:
    """What :func:`write_results` wrote."""
    import pyarrow.parquet

    rows: dict[str, dict[str, Any]] = {}
    for one in pyarrow.parquet.read_table(path).to_pylist():
        row = rows.setdefault(one["name"], {name: one.pop(name) for name in ("name", "family", "strength")})
        row[one.pop("kind")] = {name: value for name, value in one.items() if value is not None and name not in row}
    return list(rows.values())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?", help="folder of a finished quickstart")
    parser.add_argument("--out", type=Path, default=Path("runs/mitigation"))
    parser.add_argument("--results", type=Path, help="make table and figure of this Parquet file; draw no image")
    parser.add_argument("--only", default="", help="methods whose name this pattern fits, whole")
    parser.add_argument("--captions", type=int, default=24, help="repeated captions")
    parser.add_argument("--held_out", type=int, default=32, help="held-out captions, drawn once each")
    parser.add_argument("--seeds", type=int, default=2, help="images of each repeated caption")
    parser.add_argument("--first_seed", type=int, default=0, help="of each caption's images")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--scale", type=float, default=4.0, help="of classifier-free guidance")
    parser.add_argument("--neurons", default="", help="file of train localize for this model")
    args = parser.parse_args()
    if args.results is None:
        args.results = args.out / "results.parquet"
        write_results(args.results, measure(args))
    reference, *rows = read_results(args.results)
    for title, some in (("methods", False), ("ablations", True)):
        chosen = [row for row in rows if (row["family"] == "ablation") == some]
        print(f"\n{title}\n\n{as_markdown(chosen if some else [reference, *chosen])}")
    args.out.mkdir(parents=True, exist_ok=True)
    draw_figure(args.out / "mitigation.png", rows, reference)


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The reference's row, and those of all methods that were drawn, now or before."""
    if args.run is None:
        raise SystemExit("name the folder of a finished quickstart, or --results")
    torch.set_num_threads(1)
    methods = METHODS | (NEURONS if args.neurons else {})
    bench = Bench(args.run, args)
    for name, method in methods.items():
        if name == "none" or not args.only or re.fullmatch(args.only, name):  # none: all are compared with it
            bench.row(name, method)
    return [bench.reference(), *(bench.row(name, one) for name, one in methods.items() if bench.file(name).is_file())]


if __name__ == "__main__":
    main()
