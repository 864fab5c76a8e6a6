"""What mitigates memorization while training: repeats × setting × choice of images, everything else equal.

    python -m benchmarks.training --config configs/benchmarks/training.yaml --out runs/benchmarks/training
    python -m benchmarks.training --config … --out … --only 'nothing|random words'     some settings
    python -m benchmarks.training --config … --out … --tiny                             a check of the machinery

The experiment of Somepalli et al. (NeurIPS 2023) and of Wen et al. (ICLR 2024, section 5.2) at the size of the carried
sample model. Each run fine-tunes it on the fine-tuning part of the sample set, in which some images are repeated,
some of them rarely and some often; steps, order and noise are equal between settings. Settings, numbers of repeats and
choices of images (``sets``) stand in the config.

Each image that is drawn for a repeated caption is compared with that caption's image of the set: *pixels*, correlation
of 16 × 16 pixels, a copy above 0.9, and *judged*, cosine in the copy space of the evaluation's dual encoder, which
nothing follows, a copy above the similarity that 99 % of the held-out images have to their nearest training image.
*alignment* is the cosine of an image with its caption in the dual encoder's joint space, given as a share of what the
real images of the same captions earn; no real image of these captions was ever shown to the encoder. *Left out* are
visits that a filter kept from the loss, of samples of the repeated images and of the others.

`configs/benchmarks/filter.yaml` compares forms of the filter in the same way.

A run that is done is not repeated, and one that was stopped goes on. ``results.parquet`` has a row an image; the table
and ``training.png`` are made of it, with 95 % intervals over captions. ``--results FILE`` draws them from a
file alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from PIL import Image

from afresh.files import write_atomic, write_json
from afresh.progress import get_logger
from benchmarks.quickstart_set import original, read_settings, repeated_images
from benchmarks.training_figure import draw_figure
from curate.config import DedupConfig
from curate.dedup import run_dedup
from curate.reading.images import decode_image, stack_images
from curate.reading.samples import Sample, read_samples
from curate.reading.writing import write_shard
from curate.sample_set import load_part
from train.denoising.opening.loading import sample_model_dir
from train.evaluation.judging.drawn import read_drawn
from train.evaluation.judging.dual_encoder import DualEncoder
from train.evaluation.judging.intervals import Values, interval, ratio, resampled, share
from train.evaluation.judging.metrics import copy_threshold, thumbnails
from train.finetune.config import Calibration, FilterConfig, FinetuneConfig, RandomWords, ValidationConfig
from train.finetune.loop import run_finetune
from train.quickstart.config import MessConfig, QuickstartConfig
from train.quickstart.mess import chosen_rows, copies_of, make_mess
from train.sampling.config import SampleConfig
from train.sampling.job.job import run_sample

log = get_logger(__name__)
Row = dict[str, Any]
PIXEL_COPY = 0.9
RESAMPLES = 1000
LEFT_OUT = ("left_out_repeated", "left_out_others")


@dataclasses.dataclass
class Setting:
    """One line of the table: what is trained on, and what is changed in ``finetune``."""

    data: str = "raw"
    finetune: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Experiment:
    """The config file, see ``configs/benchmarks/training.yaml``."""

    mess: MessConfig
    sets: list[int]
    finetune: dict[str, Any]
    settings: dict[str, Setting]
    watch: int = 100
    seeds: int = 2
    steps: int = 25
    scale: float = 4.0
    held_out: int = 120


def read_experiment(path: Path, tiny: bool) -> Experiment:
    """The config; ``tiny`` makes it small enough to see in minutes that everything runs."""
    data = yaml.safe_load(path.read_text(encoding="utf-8"))
    data["mess"] = MessConfig(**data["mess"])
    data["settings"] = {name: Setting(**(values or {})) for name, values in data["settings"].items()}
    experiment = Experiment(**data)
    if tiny:
        experiment.mess = dataclasses.replace(experiment.mess, images=4, copies=[2, 4])
        experiment.sets, experiment.watch, experiment.seeds = experiment.sets[:1], 20, 1
        experiment.steps, experiment.held_out = 2, 4
        experiment.finetune |= {"steps": 40}
    return experiment


def prepare(folder: Path, experiment: Experiment, number: int) -> None:
    """The raw set of one choice of images, its curation, the raw set with several captions, and the prompts."""
    if (folder / "ready.json").is_file():
        return
    mess = dataclasses.replace(experiment.mess, set=number)
    make_mess(folder, QuickstartConfig(mess=mess, held_out_captions=experiment.held_out))
    dedup = DedupConfig(**read_settings()["dedup"])
    run_dedup(dataclasses.replace(dedup, shards=[str(folder / "raw")], out=str(folder / "curated")))
    for shard in sorted((folder / "raw").glob("*.tar")):
        samples = [sample for sample in read_samples(str(shard)) if isinstance(sample, Sample)]
        write_shard(str(folder / "captions" / shard.name), [(s.key, with_captions(s)) for s in samples])
    samples = load_part("finetune")
    rows = zip(chosen_rows(samples, mess), copies_of(mess), strict=True)
    write_json(folder / "ready.json", {samples[row].caption: copies for row, copies in rows})


def with_captions(sample: Sample) -> dict[str, bytes]:
    """A sample's members, with further captions where curation would have pooled them."""
    caption = sample.caption or ""
    name, _, kind = caption.partition(",")
    further = [name, f"an emoji of {name}", f"{kind.strip()}: {name}", f"a small drawing, {name}"]
    meta = json.loads(sample.members.get("json", b"{}"))
    meta["afresh"] = {"captions": [text for text in further if text.strip(" :")]}
    return dict(sample.members) | {"json": json.dumps(meta).encode()}


def finetune_settings(experiment: Experiment, setting: Setting, data: Path, out: Path) -> FinetuneConfig:
    """The run's settings: those of the config, with what the setting changes."""
    values = experiment.finetune | setting.finetune
    chosen = dict(values["filter"])
    if "calibrate" in chosen:
        how = dict(chosen["calibrate"])
        how["steps"] = min(how["steps"], 3 * values["steps"] // 4)  # of a tiny run
        chosen["calibrate"] = Calibration(**how, unique=str(data / "curated"))
    values |= {"filter": FilterConfig(**chosen), "random_words": RandomWords(**values.get("random_words", {}))}
    shards = data / "curated" / "shards" if setting.data == "curated" else data / setting.data
    prompts = list(json.loads((data / "ready.json").read_text(encoding="utf-8")))
    watch = ValidationConfig(experiment.watch, prompts, steps=experiment.steps, scale=experiment.scale)
    return FinetuneConfig(model=str(sample_model_dir()), shards=[str(shards)], out=str(out), validation=watch, **values)


class Measures:
    """What is measured of drawn images; the encoder has seen none of the carried images of these captions."""

    def __init__(self) -> None:
        self.encoder = DualEncoder.load()
        parts = {name: load_part(name) for name in ("pretrain", "finetune", "held_out")}
        self.real = {s.caption or "": decode_image(s.image) for s in parts["finetune"] + parts["held_out"]}
        copy = {name: self.encoder.copy_features([decode_image(s.image) for s in part]) for name, part in parts.items()}
        others = np.concatenate([copy["pretrain"], copy["finetune"]])
        self.threshold = copy_threshold((copy["held_out"] @ others.T).max(axis=1))

    def rows(self, captions: Sequence[str], images: Sequence[Image.Image]) -> list[Row]:
        """A row an image: ``caption, pixels, judged, alignment, real_alignment``."""
        real = [self.real[caption] for caption in captions]
        pixels = _rowwise(thumbnails(stack_images(images, 64)), thumbnails(stack_images(real, 64)))
        judged = _rowwise(self.encoder.copy_features(images), self.encoder.copy_features(real))
        texts = self.encoder.embed_texts(captions)
        alignment = _rowwise(self.encoder.embed_images(images), texts)
        earned = _rowwise(self.encoder.embed_images(real), texts)
        columns = {"pixels": pixels, "judged": judged, "alignment": alignment, "real_alignment": earned}
        return [
            {"caption": caption} | {name: float(values[i]) for name, values in columns.items()}
            for i, caption in enumerate(captions)
        ]


def _rowwise(one: NDArray[Any], two: NDArray[Any]) -> NDArray[Any]:
    return np.asarray((one * two).sum(axis=1))


def run_folder(data: Path, name: str) -> Path:
    """Where the run of a setting stands in the folder of a choice of images."""
    return data / "runs" / re.sub(r"[^a-z0-9]+", "-", name)


def run_one(experiment: Experiment, name: str, number: int, out: Path, measures: Callable[[], Measures]) -> list[Row]:
    """Fine-tune, draw and measure one setting on one choice of images, or read what was found before."""
    data = out / f"set-{number}"
    folder = run_folder(data, name)
    if (folder / "rows.json").is_file():
        found: list[Row] = json.loads((folder / "rows.json").read_text(encoding="utf-8"))
        return found
    log.info("set %d, %s", number, name)
    setting = experiment.settings[name]
    summary = run_finetune(finetune_settings(experiment, setting, data, folder / "finetune"))
    if summary.get("stopped"):
        raise SystemExit(f"stopped in {name}; the same command goes on from there")
    repeats = json.loads((data / "ready.json").read_text(encoding="utf-8"))
    rows = []
    for step in sorted((folder / "finetune" / "validation").glob("step-*")):
        images = [_opened(path) for path in sorted(step.glob("*.png"))]
        rows += [row | {"step": int(step.name[5:])} for row in measures().rows(list(repeats), images)]
    for kind, seeds in (("repeated", experiment.seeds), ("held_out", 1)):
        captions, images = drawn(experiment, data, folder, kind, seeds)
        rows += [row | {"step": 0} for row in measures().rows(captions, images)]  # 0: the finished model
    rows = [{"setting": name, "set": number, "repeats": repeats.get(row["caption"], 0)} | row for row in rows]
    write_json(folder / "rows.json", rows)
    return rows


def left_out(data: Path, verdicts: Path) -> dict[str, float]:
    """Share of the visits that the filter left out, of the repeated images' samples and of the others."""
    import pyarrow.parquet as pq

    raw = [sample.key for shard in sorted((data / "raw").glob("*.tar")) for sample in read_samples(str(shard))]
    repeated, visits = repeated_images(raw), pq.read_table(verdicts, columns=["key", "seen", "dropped"]).to_pylist()
    shares = {}
    for name, wanted in (("left_out_repeated", True), ("left_out_others", False)):
        some = [row for row in visits if (original(row["key"]) in repeated) == wanted]
        shares[name] = sum(row["dropped"] for row in some) / max(1, sum(row["seen"] for row in some))
    return shares


def drawn(
    experiment: Experiment, data: Path, folder: Path, kind: str, seeds: int
) -> tuple[list[str], list[Image.Image]]:
    """What the finished model draws for one kind of captions."""
    where = folder / "drawn" / kind
    run_sample(
        SampleConfig(
            model=str(folder / "finetune" / "model"),
            prompts=str(data / "prompts" / f"{kind}.jsonl"),
            out=str(where),
            seeds=seeds,
            steps=experiment.steps,
            scale=experiment.scale,
            batch_size=32,
        )
    )
    found = read_drawn(where, folder.name, "none", kind)
    return list(found.captions), list(found.images)


def _opened(path: Path) -> Image.Image:
    return decode_image(path.read_bytes())


def write_results(path: Path, rows: Sequence[Row], threshold: float) -> None:
    """A row an image, in half the digits that anyone reads; the judge's threshold stands in the metadata."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pylist([
        {name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()} for row in rows
    ])
    table = table.replace_schema_metadata({"judge_threshold": f"{threshold:.4f}"})
    with write_atomic(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def read_results(path: Path) -> tuple[list[Row], float]:
    """The rows, and the judge's threshold."""
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    return table.to_pylist(), float(table.schema.metadata[b"judge_threshold"])


def with_interval(values: Values, rows: Sequence[Row]) -> tuple[float, float, float]:
    """A number of some rows, and its 95 % interval over captions."""
    captions = [f"{row['set']} {row['caption']}" for row in rows]
    low, high = interval(values, captions, resampled(captions, RESAMPLES))
    return values.statistic(np.arange(len(rows))), low, high


def table_of(rows: Sequence[Row], threshold: float) -> list[Row]:
    """A row a setting and number of repeats: shares of copies by both measures, by pixels of all numbers of repeats
    together, and held-out alignment as a share of real images'; each with its interval.
    """

    def copies(some: Sequence[Row], measure: str, limit: float) -> tuple[float, float, float]:
        return with_interval(share([row[measure] > limit for row in some]), some)

    table = []
    for name in dict.fromkeys(row["setting"] for row in rows):
        mine = [row for row in rows if row["setting"] == name and row["step"] == 0]
        held_out, repeated = ([row for row in mine if bool(row["repeats"]) == kind] for kind in (False, True))
        earned = ratio([row["alignment"] for row in held_out], [row["real_alignment"] for row in held_out])
        visits = {name: statistics.mean(row[name] for row in held_out) for name in LEFT_OUT}  # of all sets
        of_all = visits | {
            "pixels_of_all": copies(repeated, "pixels", PIXEL_COPY),
            "held_out_alignment": with_interval(earned, held_out),
        }
        for repeats in sorted({row["repeats"] for row in repeated}):
            some = [row for row in repeated if row["repeats"] == repeats]
            shares = {"pixels": copies(some, "pixels", PIXEL_COPY), "judged": copies(some, "judged", threshold)}
            table.append({"setting": name, "repeats": repeats, "images": len(some), **shares, **of_all})
    return table


def print_table(table: Sequence[Row]) -> None:
    """Shares in per cent, their intervals in brackets."""
    layout = "{:<28} {:>7} {:>6}  {:<18} {:<18} {:<20} {}"
    columns = ("copies by pixels", "by the judge", "held-out alignment", "left out: repeated, others")
    print(layout.format("setting", "repeats", "images", *columns))
    for row in table:
        shares = ["{:3.0f} % [{:3.0f}, {:3.0f}]".format(*(100 * v for v in row[name])) for name in ("pixels", "judged")]
        alignment = "{:.2f} [{:.2f}, {:.2f}]".format(*row["held_out_alignment"])
        visits = ", ".join(f"{row[name]:.1%}" for name in LEFT_OUT)
        print(layout.format(row["setting"], row["repeats"], row["images"], *shares, alignment, visits))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/benchmarks/training.yaml"))
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/training"))
    parser.add_argument("--only", default="", help="settings whose name this pattern fits, whole")
    parser.add_argument("--tiny", action="store_true", help="a few steps and images, to see that everything runs")
    parser.add_argument("--results", type=Path, help="draw table and figure from this Parquet file; run nothing")
    args = parser.parse_args()
    if args.results is None:
        experiment = read_experiment(args.config, args.tiny)
        names = [name for name in experiment.settings if not args.only or re.fullmatch(args.only, name)]
        made: list[Measures] = []

        def measures() -> Measures:
            if not made:
                made.append(Measures())
            return made[0]

        rows: list[Row] = []
        for number in experiment.sets:
            prepare(args.out / f"set-{number}", experiment, number)
            for name in names:
                run, data = run_one(experiment, name, number, args.out, measures), args.out / f"set-{number}"
                visits = left_out(data, run_folder(data, name) / "finetune" / "verdicts.parquet")
                rows += [row | visits for row in run]
        args.results = args.out / "results.parquet"
        write_results(args.results, rows, measures().threshold)
    rows, threshold = read_results(args.results)
    table = table_of(rows, threshold)
    print_table(table)
    args.out.mkdir(parents=True, exist_ok=True)
    draw_figure(args.out / "training.png", table, rows, PIXEL_COPY)


if __name__ == "__main__":
    main()
