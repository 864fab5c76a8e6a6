"""``train quickstart``: the whole story on the carried sample set, in minutes and without a network.

    ./launch.sh configs/quickstart.yaml

1. plant duplicates in the fine-tuning part of the sample set, as a web crawl would have them;
2. ``curate dedup`` removes them;
3. fine-tune the sample model three times: on the raw set, on the curated set, and on the curated set with the filter;
4. ``train detect`` on the raw model: does the magnitude tell repeated captions from held-out ones, and those that
   draw a training image from those that do not?
5. ``train localize`` on it: which neurons bring the copies, and a model without them;
6. draw repeated and held-out captions from all of them, and from the raw model under anti-memorization guidance: one
   table, one figure.

Every stage leaves what it made and is not repeated, so a run that was stopped goes on.
"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

from afresh.files import write_json
from afresh.progress import get_logger
from afresh.runs import claim
from train.denoising.opening.loading import sample_model_dir
from train.quickstart.config import QuickstartConfig
from train.quickstart.stages import STAGES

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
    out = Path(config.out)
    chosen = dataclasses.replace(config, model=config.model or str(sample_model_dir()))
    claim(out, dataclasses.asdict(config))
    results: dict[str, Any] = {}
    seconds: dict[str, float] = {}
    for number, stage in enumerate(STAGES, 1):
        name = stage.__name__
        record = out / "stages" / f"{name}.json"
        if record.is_file():
            stored = json.loads(record.read_text())
            log.info("[%d/%d] %s: done before", number, len(STAGES), name)
        else:
            log.info("[%d/%d] %s", number, len(STAGES), name)
            start = time.monotonic()
            result = stage(chosen)
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
        "finetune": {name: results[f"finetune_{name}"] for name in ("raw", "curated", "filtered")},
        "seconds": seconds,
        "report": results["evaluate"]["report"],
    }
    write_json(out / "summary.json", summary)
    return summary

