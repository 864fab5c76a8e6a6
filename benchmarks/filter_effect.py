"""What the filter alone does: fine-tuning on the quickstart's raw set, where 24 images are repeated 40 times.

    python -m benchmarks.filter_effect --out runs/filter_effect          all runs: hours on two cores
    python -m benchmarks.filter_effect --out runs/filter_effect --only 'off|noisy_caption-0.8'
    python -m benchmarks.filter_effect --out runs/tiny --tiny            a check of the machinery, in minutes

Each run has as many steps as the quickstart's, from the same model, in the same order, with the same noise; only the
filter differs. Its thresholds are a quantile of the magnitudes of the samples that curation's ledger calls unique,
over a window that fades. ``off`` has no filter; ``without_copies`` trains on the set without the planted copies, as if
the filter knew them.

Then images of the repeated and of held-out captions are drawn and measured as by ``train evaluate``: which share is
memorized, alignment, and how many visits of repeated and of unique samples were left out. A finished run is not
repeated; the table and the figure (``effect.png``) are made of those that are there.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import statistics
from pathlib import Path
from typing import Any

import yaml

from afresh.files import write_json
from afresh.progress import get_logger
from curate.config import DedupConfig
from curate.decisions.sample_lists import write_ids
from curate.dedup import run_dedup
from curate.reading.samples import read_samples
from train.denoising.opening.loading import sample_model_dir
from train.evaluation.config import EvaluateConfig
from train.evaluation.evaluate import run_evaluate
from train.finetune.config import Calibration, FilterConfig, FinetuneConfig
from train.finetune.loop import run_finetune
from train.quickstart.config import MessConfig, QuickstartConfig
from train.quickstart.mess import make_mess

log = get_logger(__name__)
COPY = re.compile(r"-copy\d+$")
POLICIES: dict[str, dict[str, Any]] = {
    "every_step": {"policy": "every_step", "expires": 0},
    "one_in_k": {"policy": "one_in_k"},
    "noisy_steps": {"policy": "noisy_steps"},
    "noisy_alone": {"policy": "noisy_steps", "expires": 0},
    "noisy_caption": {"policy": "noisy_steps", "verdict_of": "caption"},
    "noisy_caption_window": {"policy": "noisy_steps", "verdict_of": "caption", "evidence": "window"},
    "noisy_caption_window_plain": {"policy": "noisy_steps", "verdict_of": "caption", "evidence": "window"},
    "noisy_one_in_k_caption": {"policy": "noisy_one_in_k", "k": 2, "verdict_of": "caption"},
}
RUNS = [
    *(("noisy_caption_window", quantile) for quantile in (0.9, 0.8, 0.7, 0.95, 0.99)),
    *(("noisy_caption_window_plain", quantile) for quantile in (0.9, 0.8)),
    *(("noisy_caption", quantile) for quantile in (0.8, 0.7, 0.9, 0.95)),
    *(("every_step", quantile) for quantile in (0.8, 0.7, 0.95)),
    *((policy, 0.8) for policy in ("noisy_steps", "one_in_k", "noisy_alone", "noisy_one_in_k_caption")),
]
COLUMNS = (
    "memorized", "copied", "dropped_repeated", "dropped_unique", "judged", "alignment_held_out", "quality_held_out",
    "memorized_held_out", "alignment_repeated",
)  # fmt: skip


@dataclasses.dataclass
class Size:
    """How large the experiment is."""

    mess: MessConfig = dataclasses.field(default_factory=MessConfig)
    steps: int = 600
    calibrate: int = 50
    window: int = 100
    seeds: int = 4
    drawn_steps: int = 25
    held_out_captions: int = 200


TINY = Size(MessConfig(images=3, copies=6), 40, 30, 30, 1, 2, 4)


def read_settings() -> dict[str, Any]:
    """The quickstart's settings."""
    path = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def prepare(out: Path, size: Size) -> None:
    """The raw set, its curation (for the ledger and the index), and the list of the planted copies."""
    if (out / "copies.tsv").is_file():
        return
    make_mess(out, QuickstartConfig(mess=size.mess, held_out_captions=size.held_out_captions))
    dedup = DedupConfig(**read_settings()["dedup"])
    run_dedup(dataclasses.replace(dedup, shards=[str(out / "raw")], out=str(out / "curated")))
    raw = [sample for shard in sorted((out / "raw").glob("*.tar")) for sample in read_samples(str(shard))]
    write_ids(out / "copies.tsv", [(sample.shard, sample.key) for sample in raw if COPY.search(sample.key)])


def finetune_settings(out: Path, folder: Path, size: Size, **changes: Any) -> FinetuneConfig:
    """The quickstart's fine-tuning on the raw set, without its filter."""
    settings = {key: value for key, value in read_settings()["finetune"].items() if key != "filter"}
    settings |= {"filter": FilterConfig("off"), "shards": [str(out / "raw")], "out": str(folder), "steps": size.steps}
    return FinetuneConfig(model=str(sample_model_dir()), **settings | changes)


def run_one(out: Path, name: str, size: Size) -> dict[str, Any]:
    """Fine-tune and evaluate one run, or read what was found before."""
    folder = out / "runs" / name
    if (folder / "effect.json").is_file():
        return json.loads((folder / "effect.json").read_text())
    changes: dict[str, Any] = {}
    if name == "without_copies":
        changes = {"exclude": str(out / "copies.tsv")}
    elif name != "off":
        policy, quantile = name.rsplit("-", 1)
        calibration = Calibration(size.calibrate, float(quantile), window=size.window, unique=str(out / "curated"))
        # A fifth of the visits, of all timesteps: ten bands would have too few magnitudes each.
        calibration = dataclasses.replace(calibration, per_band=policy != "one_in_k")
        if policy.endswith("_plain"):  # without a release of its own
            calibration = dataclasses.replace(calibration, release=calibration.quantile)
        changes = {"filter": FilterConfig(**POLICIES[policy], calibrate=calibration)}
    log.info("run %s", name)
    summary = run_finetune(finetune_settings(out, folder / "finetune", size, **changes))
    if summary.get("stopped"):
        raise SystemExit(f"stopped in {name}; the same command goes on from there")
    seeds = {"repeated": size.seeds, "held_out": 1}
    of = {kind: evaluate(folder, name, kind, number, size) for kind, number in seeds.items()}
    result = {
        "run": name,
        "memorized": of["repeated"]["memorized_share"],
        "copied": of["repeated"]["copied_share"],
        "memorized_held_out": of["held_out"]["memorized_share"],
        "alignment_held_out": of["held_out"]["alignment"],
        "quality_held_out": of["held_out"]["quality"],
        "alignment_repeated": of["repeated"]["alignment"],
        **dropped_shares(folder / "finetune" / "verdicts.parquet"),
        "judged": summary["judged"] / summary["samples_seen"],
    }
    write_json(folder / "effect.json", result)
    return result


def evaluate(folder: Path, name: str, kind: str, seeds: int, size: Size) -> dict[str, Any]:
    """The row of ``train evaluate`` for one kind of prompts.

    Alignment differs more between captions than between the noises of one: held-out captions are all drawn, once.
    """
    protocol = {
        "models": {name: "finetune/model"},
        "settings": [{"model": name, "guidance": "none"}],
        "prompts": {kind: f"../../prompts/{kind}.jsonl"},
        "index": "../../curated",
        "training": ["../../raw"],
        "held_out": ["../../held_out"],
        "seeds": seeds,
        "steps": size.drawn_steps,
        "scale": read_settings()["scale"],
    }
    path = folder / f"{kind}.yaml"
    path.write_text(yaml.safe_dump(protocol, sort_keys=False))
    (row,) = run_evaluate(EvaluateConfig(str(path), str(folder / "evaluated" / kind), batch_size=32))["rows"]
    return row


def dropped_shares(verdicts: Path) -> dict[str, float]:
    """Share of the visits that were left out, of repeated samples (copies and their originals) and of the others."""
    import pyarrow.parquet as pq

    rows = pq.read_table(verdicts, columns=["key", "seen", "dropped"]).to_pylist()
    repeated = {COPY.sub("", row["key"]) for row in rows if COPY.search(row["key"])}
    shares = {}
    for name, wanted in (("dropped_repeated", True), ("dropped_unique", False)):
        some = [row for row in rows if (COPY.sub("", row["key"]) in repeated) == wanted]
        shares[name] = sum(row["dropped"] for row in some) / max(1, sum(row["seen"] for row in some))
    return shares


def draw_figure(path: Path, results: list[dict[str, Any]]) -> None:
    """Memorized share, held-out alignment and dropped visits over the quantile, a curve a policy."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained", dpi=130)
    panels = figure.subplots(1, 3)
    curves: dict[str, list[dict[str, Any]]] = {}
    for row in results:
        if "-" in row["run"]:
            curves.setdefault(row["run"].rsplit("-", 1)[0], []).append(row)
    columns = ("memorized", "alignment_held_out", "dropped_repeated")
    titles = ("memorized share, repeated captions", "alignment, held-out captions", "visits left out")
    for number, (policy, rows) in enumerate(curves.items()):
        rows.sort(key=lambda row: row["run"])
        x = [1 - float(row["run"].rsplit("-", 1)[1]) for row in rows]
        for panel, column in zip(panels, columns, strict=True):
            panel.plot(x, [row[column] for row in rows], "o-", color=f"C{number}", label=policy, markersize=4)
        panels[2].plot(x, [row["dropped_unique"] for row in rows], "o:", color=f"C{number}", markersize=3)
    for row in results:
        if row["run"] in ("off", "without_copies"):
            style = {"color": "#555", "linestyle": "--" if row["run"] == "off" else ":", "linewidth": 1}
            panels[0].axhline(row["memorized"], **style, label=row["run"].replace("_", " "))
            panels[1].axhline(row["alignment_held_out"], **style)
    for panel, title in zip(panels, titles, strict=True):
        panel.set(title=title, xlabel="share of unique samples above the threshold", ylim=(0, None))
        panel.spines[["top", "right"]].set_visible(False)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncol=8, frameon=False, fontsize=8)
    panels[2].text(0.98, 0.02, "solid: repeated, dotted: unique", transform=panels[2].transAxes, ha="right", fontsize=7)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default="", help="runs whose name this pattern fits, whole")
    parser.add_argument("--tiny", action="store_true", help="a few steps and images, to see that everything runs")
    args = parser.parse_args()
    size = TINY if args.tiny else Size()
    names = ["off", "without_copies", *(f"{policy}-{quantile}" for policy, quantile in RUNS)]
    chosen = [name for name in names if not args.only or re.fullmatch(args.only, name)]
    prepare(args.out, size)
    for name in chosen:
        run_one(args.out, name, size)
    done = [args.out / "runs" / name / "effect.json" for name in names]
    results = [json.loads(path.read_text()) for path in done if path.is_file()]
    write_json(args.out / "effect.json", results)
    print("  ".join([f"{'run':<30}", *COLUMNS]))
    for row in results:
        print("  ".join([f"{row['run']:<30}", *(f"{row[name]:>{len(name)}.3f}" for name in COLUMNS)]))
    draw_figure(args.out / "effect.png", results)
    speeds = [json.loads(path.read_text()) for path in args.out.glob("runs/*/finetune/summary.json")]
    print(
        f"{size.steps} steps a run, median {statistics.median(run['seconds'] for run in speeds):.0f} s; "
        f"{size.mess.images} images × {size.mess.copies}; images drawn per caption: {size.seeds}"
    )


if __name__ == "__main__":
    main()
