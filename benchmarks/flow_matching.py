"""What the statistic, the filter and AMG do on a flow-matching model: the sample set's small Stable Diffusion 3.

    python -m benchmarks.flow_matching runs/sample_model/flow/model --out runs/flow_matching
    python -m benchmarks.flow_matching runs/sample_model/flow/model --out runs/flow_matching --stages prepare off

The model (``configs/sample_model/flow.yaml``) is fine-tuned on the quickstart's raw set, where 24 images are repeated
40 times, without the filter (``off``), with the recommended one (``filtered``) and with one that judges at all noise
levels (``judged``). On the first, the magnitude ``‖Δu‖`` is measured at each step of trajectories from noise, of
repeated captions against captions that were never trained on (``sampling``), and of noised training images, repeated
ones against unique ones, by noise level (``training``). Images of all, of the first under AMG too (``drawn``), are
measured as by ``train evaluate``. A stage that is done is not repeated.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from afresh.files import write_json
from afresh.progress import get_logger
from benchmarks.quickstart_set import original, read_settings, repeated_images
from benchmarks.training_statistic import read_set
from curate.config import DedupConfig
from curate.dedup import run_dedup
from curate.reading.images import decode_image, stack_images
from train.denoising.families.registry import denoiser_of
from train.denoising.opening.loading import load_pipeline
from train.evaluation.config import EvaluateConfig
from train.evaluation.evaluate import run_evaluate
from train.finetune.config import Augmentation, Calibration, FilterConfig, FinetuneConfig
from train.finetune.data.order import generator
from train.finetune.loop import run_finetune
from train.memorization import score
from train.memorization.detection.roc import roc_auc, tpr_at_fpr
from train.memorization.signals.magnitude import magnitude
from train.prompts import read_prompts
from train.quickstart.config import MessConfig, QuickstartConfig
from train.quickstart.mess import make_mess

log = get_logger(__name__)
BANDS = 10
SCALE, STEPS = 4.0, 25
FINETUNED = {"unfiltered": "off", "noisy steps judged": "filtered", "all steps judged": "judged"}
"""Names in the table, and the stages that trained them."""


def plant(args: argparse.Namespace) -> dict[str, Any]:
    """The quickstart's raw set, its prompts, and its curation, for the ledger and the index."""
    make_mess(args.out, QuickstartConfig(mess=MessConfig(set=1), held_out_captions=64))
    dedup = DedupConfig(**read_settings()["dedup"])
    summary = run_dedup(dataclasses.replace(dedup, shards=[str(args.out / "raw")], out=str(args.out / "curated")))
    return {"samples": summary["samples"]}


def dropped_shares(verdicts: Path) -> dict[str, float]:
    """Share of the visits that were left out, of repeated samples (copies and their originals) and of the others."""
    import pyarrow.parquet as pq

    rows = pq.read_table(verdicts, columns=["key", "seen", "dropped"]).to_pylist()
    repeated, shares = repeated_images(row["key"] for row in rows), {}
    for name, wanted in (("dropped_repeated", True), ("dropped_unique", False)):
        some = [row for row in rows if (original(row["key"]) in repeated) == wanted]
        shares[name] = sum(row["dropped"] for row in some) / max(1, sum(row["seen"] for row in some))
    return shares


def finetune(args: argparse.Namespace, name: str, judge: FilterConfig) -> dict[str, Any]:
    """Fine-tune the transformer on the raw set."""
    config = FinetuneConfig(
        model=args.model,
        out=str(args.out / name),
        shards=[str(args.out / "raw")],
        steps=args.steps,
        batch_size=16,
        learning_rate=1.5e-3,
        lr_schedule="linear",
        warmup_steps=10,
        adam_beta2=0.99,
        ema_decay=0.99,
        mixed_precision="bf16",
        cache_latents="memory",
        cache_text="memory",
        crop="none",
        workers=0,
        filter=judge,
        augmentation=Augmentation(),
        checkpoint_every=100,
    )
    summary = run_finetune(config)
    if summary.get("stopped"):
        raise SystemExit(f"stopped in {name}; the same command goes on from there")
    shares = dropped_shares(args.out / name / "verdicts.parquet") if judge.policy != "off" else {}
    return {
        **{key: summary[key] for key in ("judged", "samples_seen", "dropped", "seconds") if key in summary},
        **shares,
    }


def off(args: argparse.Namespace) -> dict[str, Any]:
    """Without the filter."""
    return finetune(args, "off", FilterConfig("off"))


def filtered(args: argparse.Namespace) -> dict[str, Any]:
    """With the recommended filter, whose thresholds are found among the samples that curation calls unique."""
    calibrate = Calibration(quantile=0.8, unique=str(args.out / "curated"))
    return finetune(args, "filtered", FilterConfig(preset="recommended", calibrate=calibrate))


def judged(args: argparse.Namespace) -> dict[str, Any]:
    """With the same filter at every noise level."""
    calibrate = Calibration(quantile=0.8, unique=str(args.out / "curated"))
    policy = FilterConfig(policy="every_step", verdict_of="caption", evidence="window", calibrate=calibrate)
    return finetune(args, "judged", policy)


def told_apart(values: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """How well one magnitude each tells ones from noughts, and both medians."""
    return {
        "auc": roc_auc(values, labels),
        "tpr_at_1pct": tpr_at_fpr(values, labels, 0.01),
        "tpr_at_10pct": tpr_at_fpr(values, labels, 0.1),
        "repeated": float(np.median(values[labels == 1])),
        "others": float(np.median(values[labels == 0])),
    }


def sampling(args: argparse.Namespace) -> dict[str, Any]:
    """Repeated captions against held-out ones, by the step of a trajectory; in velocities and in ε-space."""
    pipe = load_pipeline(str(args.out / "off" / "model"))
    texts = {kind: [p.caption for p in read_prompts(args.out / "prompts" / f"{kind}.jsonl")] for kind in
             ("repeated", "held_out")}  # fmt: skip
    labels = np.repeat([1, 0], [len(texts["repeated"]), len(texts["held_out"])])
    found = score(
        pipe, texts["repeated"] + texts["held_out"], steps=STEPS, num_inference_steps=STEPS, seeds=args.seeds,
        guidance_scale=SCALE, batch_size=32,
    )  # fmt: skip
    schedule = denoiser_of(pipe).schedule
    sigmas = np.array(schedule.steps(STEPS)) / schedule.timesteps
    by_step = found.magnitudes.mean(1)  # of all seeds
    rows = [{"sigma": float(s), **told_apart(by_step[:, i], labels)} for i, s in enumerate(sigmas)]
    first = {f"first {n}": told_apart(by_step[:, :n].mean(1), labels) for n in (1, 5, STEPS)}
    in_eps = {f"first {n}, ε-space": told_apart((by_step * (1 - sigmas))[:, :n].mean(1), labels) for n in (5, STEPS)}
    return {"steps": rows, **first, **in_eps}


@torch.no_grad()
def training(args: argparse.Namespace) -> dict[str, Any]:
    """Noised training images, repeated against unique, by the share of noise: one noise a band."""
    pipe = load_pipeline(str(args.out / "off" / "model"))
    denoiser: Any = denoiser_of(pipe)
    samples, labels = read_set(args.out, args.samples)
    x_0 = denoiser.encode_pixels(torch.from_numpy(stack_images([decode_image(one.image) for one in samples], 64)))
    captions = denoiser.encode([sample.caption or "" for sample in samples])
    empty, g, rows = denoiser.encode([""]), generator("statistic"), []
    for band in range(BANDS):
        t = (torch.rand(len(samples), generator=g) + band) * 1000 / BANDS
        x_t = denoiser.schedule.noised(x_0, torch.randn(x_0.shape, generator=g), t)
        values = []
        for start in range(0, len(samples), 64):
            some = slice(start, start + 64)
            seen = [denoiser.predict(x_t[some], t[some], one) for one in (captions[some], empty)]
            values.append(magnitude(seen[0].compared, seen[1].compared))
        rows.append({"sigma": (band + 0.5) / BANDS, **told_apart(torch.cat(values).numpy(), labels)})
    return {"bands": rows}


def drawn(args: argparse.Namespace) -> dict[str, Any]:
    """The rows of ``train evaluate``: without the filter, under AMG, and with the filter where it was trained."""
    there = {name: stage for name, stage in FINETUNED.items() if (args.out / stage / "model").is_dir()}
    settings = [{"model": name, "guidance": "none"} for name in there]
    protocol = {
        "models": {name: f"{stage}/model" for name, stage in there.items()},
        "settings": [*settings[:1], {"model": "unfiltered", "guidance": "amg"}, *settings[1:]],
        "prompts": {"repeated": "prompts/repeated.jsonl", "held_out": "prompts/held_out_few.jsonl"},
        "index": "curated",
        "training": ["raw"],
        "held_out": ["held_out"],
        "seeds": args.seeds,
        "steps": STEPS,
        "scale": SCALE,
    }
    lines = (args.out / "prompts" / "held_out.jsonl").read_text().splitlines()[:24]
    (args.out / "prompts" / "held_out_few.jsonl").write_text("\n".join(lines) + "\n")
    path = args.out / "protocol.yaml"
    path.write_text(yaml.safe_dump(protocol, sort_keys=False))
    names = ("model", "guidance", "prompts", "memorized_share", "copied_share", "pixel_copied_share", "alignment")
    rows = run_evaluate(EvaluateConfig(protocol=str(path), out=str(args.out / "evaluated"), batch_size=32))["rows"]
    return {"rows": [{name: row[name] for name in names} for row in rows]}


STAGES: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "prepare": plant,
    "off": off,
    "sampling": sampling,
    "training": training,
    "filtered": filtered,
    "judged": judged,
    "drawn": drawn,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="pipeline folder of the flow-matching sample model")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=500, help="of each fine-tuning")
    parser.add_argument("--seeds", type=int, default=2, help="noises of a caption, of trajectories and of images")
    parser.add_argument("--samples", type=int, default=240, help="noised training images of each kind")
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=STAGES, metavar="STAGE")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.stages:
        record = args.out / f"{name}.json"
        if not record.is_file():
            log.info("stage %s", name)
            write_json(record, STAGES[name](args))
        print(name, json.dumps(json.loads(record.read_text()), indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
