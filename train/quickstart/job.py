"""``train quickstart``: the whole story on the carried sample set, in minutes and without a network.

    ./launch.sh configs/quickstart.yaml

1. plant duplicates in the fine-tuning part of the sample set, as a web crawl would have them;
2. ``curate dedup`` removes them;
3. fine-tune the sample model twice: on the raw set without the filter, on the curated set with it;
4. draw repeated and held-out captions from both, and from the raw model under anti-memorization guidance;
5. ``train detect`` on the raw model: does the magnitude tell repeated captions from held-out ones, and those that
   draw a training image from those that do not?
6. one table, one figure.

Every stage leaves what it made and is not repeated, so a run that was stopped goes on.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from afresh.files import write_atomic, write_json
from afresh.progress import get_logger
from afresh.runs import claim
from train.denoising.opening.loading import sample_model_dir
from train.quickstart.config import QuickstartConfig
from train.quickstart.mess import make_mess

log = get_logger(__name__)
COLUMNS = (
    "model", "guidance", "prompts", "images", "memorized_share", "copied_share", "pixel_copied_share", "similarity",
    "similarity_among_seeds", "alignment", "retrieval_rank", "quality", "seconds_per_image",
)  # fmt: skip


def run_quickstart(config: QuickstartConfig) -> dict[str, Any]:
    """Run all stages and return the summary, which also stands in ``out/summary.json``.

    Raises:
        UsageError: the folder was begun with other settings, or the model is missing.
    """
    import yaml

    from curate.dedup import run_dedup
    from train.evaluation.config import EvaluateConfig
    from train.evaluation.evaluate import run_evaluate
    from train.finetune.loop import run_finetune
    from train.memorization.config import DetectConfig
    from train.memorization.detection.job import run_detect
    from train.sampling.config import SampleConfig
    from train.sampling.job.job import run_sample

    out = Path(config.out)
    model = config.model or str(sample_model_dir())
    claim(out, dataclasses.asdict(config))

    def curate() -> dict[str, Any]:
        shards = [str(out / "raw")]
        return run_dedup(dataclasses.replace(config.dedup, shards=shards, out=str(out / "curated")))

    def finetune(name: str, shards: Path, filtered: bool) -> dict[str, Any]:
        settings = config.finetune
        policy = settings.filter if filtered else dataclasses.replace(settings.filter, policy="off")
        return run_finetune(
            dataclasses.replace(
                settings, model=model, shards=[str(shards)], out=str(out / f"finetune_{name}"), filter=policy
            )
        )

    def evaluate() -> dict[str, Any]:
        protocol = {
            "models": {"raw": "finetune_raw/model", "curated": "finetune_curated/model"},
            "settings": [
                {"model": "raw", "guidance": "none"},
                {"model": "raw", "guidance": "amg"},
                {"model": "curated", "guidance": "none"},
            ],
            "prompts": {"repeated": "prompts/repeated.jsonl", "held_out": "prompts/held_out.jsonl"},
            "index": "curated",
            "training": ["raw"],
            "held_out": ["held_out"],
            "seeds": config.seeds,
            "steps": config.steps,
            "scale": config.scale,
            "columns": config.columns,
            "amg": dataclasses.asdict(config.amg),
        }
        with write_atomic(out / "protocol.yaml") as temporary:
            temporary.write_text(yaml.safe_dump(protocol, sort_keys=False, allow_unicode=True), encoding="utf-8")
        return run_evaluate(
            EvaluateConfig(protocol=str(out / "protocol.yaml"), out=str(out), batch_size=config.batch_size)
        )

    def detect() -> dict[str, Any]:
        raw, prompts = str(out / "finetune_raw" / "model"), str(out / "prompts" / "detect.jsonl")
        drawn = str(out / "detect" / "drawn")
        # What each caption draws, to judge the scores by outcome too: as many images as the evaluation draws, since one
        # noise is too few to say that a caption draws no copy.
        run_sample(
            SampleConfig(
                model=raw,
                prompts=prompts,
                out=drawn,
                index=str(out / "curated"),
                seeds=config.seeds,
                steps=config.outcome_steps,
                scale=config.scale,
                batch_size=config.batch_size,
            )
        )
        return run_detect(
            DetectConfig(
                model=raw,
                prompts=prompts,
                out=str(out / "detect" / "scores.parquet"),
                outcomes=drawn,
                steps=config.detect_steps,
                seeds=config.detect_seeds,
                num_inference_steps=config.steps,
                scale=config.scale,
            )
        )

    stages: dict[str, Callable[[], dict[str, Any]]] = {
        "plant": lambda: make_mess(out, config),
        "curate": curate,
        "finetune_raw": lambda: finetune("raw", out / "raw", False),
        "finetune_curated": lambda: finetune("curated", out / "curated" / "shards", True),
        "detect": detect,
        "evaluate": evaluate,
    }
    results: dict[str, Any] = {}
    seconds: dict[str, float] = {}
    for number, (name, stage) in enumerate(stages.items(), 1):
        record = out / "stages" / f"{name}.json"
        if record.is_file():
            stored = json.loads(record.read_text())
            log.info("[%d/%d] %s: done before", number, len(stages), name)
        else:
            log.info("[%d/%d] %s", number, len(stages), name)
            start = time.monotonic()
            result = stage()
            if result.get("stopped"):
                return {"stopped": name}
            write_json(record, {"result": result, "seconds": round(time.monotonic() - start, 1)})
            stored = json.loads(record.read_text())  # so that a first run and a continued one return the same
        results[name], seconds[name] = stored["result"], stored["seconds"]
    summary = {
        "rows": [{name: row[name] for name in COLUMNS} for row in results["evaluate"]["rows"]],
        "copy_threshold": results["evaluate"]["copy_threshold"],
        "detect": results["detect"],
        "curate": results["curate"],
        "finetune": {name: results[f"finetune_{name}"] for name in ("raw", "curated")},
        "seconds": seconds,
        "report": results["evaluate"]["report"],
    }
    write_json(out / "summary.json", summary)
    return summary

