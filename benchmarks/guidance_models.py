"""Development models of guidance: small Stable Diffusions that memorize in different ways, with all that judges them.

    python -m benchmarks.guidance_models strong --out runs/guidance
    python -m benchmarks.guidance_models twemoji --out runs/guidance --drawings twemoji-16.0.1/package/dist/svg
    python -m benchmarks.guidance_models fluent --out runs/guidance --drawings fluent-emoji-flat/package/assets
    python -m benchmarks.guidance_models strong --out runs/guidance --twin      also its twin of the curated set

The raw models of ``train quickstart`` on several sets are the first kind. These differ from them and from each other in
what was repeated and how often, in what else they know, and in the embedder of their index:

- ``strong``: 36 carried images 30 times each and 114 others once, for 700 steps: its copies survive guidance scale 1;
- ``twemoji``: 24 of Twemoji's drawings (npm's ``@discordapp/twemoji``; see ``train/sample_model/renditions.py``) 12 to
  40 times each, and all others of the same captions once. The index is the default one of ``curate dedup``;
- ``fluent``: 40 of another design's drawings 25 times each and 80 others once (npm's ``@lobehub/fluent-emoji-flat``),
  with that index, for tests: nothing of guidance was chosen on it.

Each becomes a folder as a quickstart leaves it: ``raw``, ``held_out``, ``prompts``, ``curated``, ``finetune_raw``,
``protocol.yaml``, and ``finetune_curated`` with ``--twin``.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
from collections.abc import Sequence
from pathlib import Path

import yaml
from PIL import Image

from afresh.files import write_atomic
from afresh.progress import get_logger
from curate.config import DedupConfig
from curate.dedup import run_dedup
from curate.reading.samples import Sample
from curate.reading.writing import write_shard
from curate.sample_set import load_part
from train.denoising.opening.loading import sample_model_dir
from train.finetune.config import FilterConfig, FinetuneConfig
from train.finetune.loop import run_finetune
from train.quickstart.config import MessConfig
from train.quickstart.mess import plant_copies, prompt_line, standing_alone
from train.sample_model.renditions import SIDE, folder_of_code_points

log = get_logger(__name__)
HELD_OUT = 32  # captions never trained on that have a prompt


@dataclasses.dataclass(frozen=True)
class Kind:
    """One development model."""

    mess: MessConfig
    images: int
    """In the set, repeated ones and others."""
    embedder: str
    steps: int
    learning_rate: float
    drawings: bool = False
    """Of a folder of other drawings, not the carried ones."""


KINDS = {
    "strong": Kind(MessConfig(images=36, copies=30), 150, "copy-detector", 700, 1.5e-3),
    "twemoji": Kind(MessConfig(images=24, copies=[12, 20, 30, 40]), 300, "layout", 450, 1.5e-3, drawings=True),
    "fluent": Kind(MessConfig(images=40, copies=25), 120, "layout", 450, 1.5e-3, drawings=True),
}


def redrawn(samples: Sequence[Sample], folder: Path) -> list[Sample]:
    """Those samples that a folder has another drawing of, with that for their image, on white."""
    drawings = folder_of_code_points(folder, list(samples))
    found = []
    for sample in samples:
        if sample.key not in drawings:
            continue
        drawing, buffer = drawings[sample.key](), io.BytesIO()
        page = Image.new("RGBA", (SIDE, SIDE), "white")
        page.alpha_composite(drawing, ((SIDE - drawing.width) // 2, (SIDE - drawing.height) // 2))
        page.convert("RGB").save(buffer, "WEBP", lossless=True)
        members = {ext: data for ext, data in sample.members.items() if ext != sample.image_ext}
        found.append(dataclasses.replace(sample, members={**members, "webp": buffer.getvalue()}, offsets={}))
    return found


def plant(kind: Kind, out: Path, drawings: Path | None) -> None:
    """``raw``, ``held_out`` and the prompt files."""
    parts = [load_part("finetune"), load_part("held_out")]
    if kind.drawings:
        assert drawings is not None
        parts = [redrawn(part, drawings) for part in parts]
    samples, held_out = parts
    samples = samples[:: max(1, len(samples) // kind.images)][: kind.images]
    raw, rows = plant_copies(samples, kind.mess)
    write_shard(str(out / "raw" / "000000.tar"), raw)
    write_shard(str(out / "held_out" / "000000.tar"), [(s.key, dict(s.members)) for s in held_out])
    alone = standing_alone(held_out)
    step = max(1, len(alone) // HELD_OUT)
    prompts = {
        "repeated": [(samples[row], 1) for row in rows],
        "held_out": [(held_out[row], 0) for row in alone[::step][:HELD_OUT]],
    }
    for name, chosen in prompts.items():
        lines = [prompt_line(sample, label, out) for sample, label in chosen]
        with write_atomic(out / "prompts" / f"{name}.jsonl") as temporary:
            temporary.write_text("".join(lines), encoding="utf-8")


def finetuned(kind: Kind, shards: Path, out: Path) -> None:
    """Fine-tune the carried model on shards, without a filter."""
    run_finetune(
        FinetuneConfig(
            model=str(sample_model_dir()),
            out=str(out),
            shards=[str(shards)],
            steps=kind.steps,
            batch_size=16,
            learning_rate=kind.learning_rate,
            lr_schedule="linear",
            warmup_steps=10,
            adam_beta2=0.99,
            ema_decay=0.99,
            snr_gamma=2,
            train_text_encoder=True,
            cache_latents=True,
            crop="none",
            filter=FilterConfig(policy="off"),
            log_every=50,
        )
    )


def make(name: str, out: Path, drawings: Path | None = None, twin: bool = False) -> None:
    """All of one model; what is there is kept."""
    kind = KINDS[name]
    if not (out / "prompts" / "held_out.jsonl").is_file():
        plant(kind, out, drawings)
    if not (out / "curated" / "summary.json").is_file():
        prefer = ["lossless", "resolution", "caption_length"]
        run_dedup(
            DedupConfig(
                shards=[str(out / "raw")],
                out=str(out / "curated"),
                image_embedder=kind.embedder,
                prefer=prefer,
                workers=1,
            )
        )
    pairs = [("raw", out / "raw"), ("curated", out / "curated" / "shards")]
    for model, shards in pairs if twin else pairs[:1]:
        if not (out / f"finetune_{model}" / "summary.json").is_file():
            log.info("%s, %s", name, model)
            finetuned(kind, shards, out / f"finetune_{model}")
    protocol = {
        "models": {model: f"finetune_{model}/model" for model, _ in pairs},
        "settings": [{"model": model, "guidance": "none"} for model, _ in pairs],
        "prompts": {part: f"prompts/{part}.jsonl" for part in ("repeated", "held_out")},
        "index": "curated",
        "training": ["raw"],
        "held_out": ["held_out"],
    }
    with write_atomic(out / "protocol.yaml") as temporary:
        temporary.write_text(yaml.safe_dump(protocol, sort_keys=False), encoding="utf-8")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="+", choices=list(KINDS))
    parser.add_argument("--out", type=Path, required=True, help="a folder; each model gets one of its name below it")
    parser.add_argument("--drawings", type=Path, help="of twemoji and fluent: the folder of the design's files")
    parser.add_argument("--twin", action="store_true", help="also fine-tune on the curated set")
    args = parser.parse_args()
    for name in args.kinds:
        if KINDS[name].drawings and args.drawings is None:
            parser.error(f"{name} needs --drawings")
        make(name, args.out / name, args.drawings, args.twin)
        print(json.dumps({"model": str(args.out / name)}))


if __name__ == "__main__":
    main()
