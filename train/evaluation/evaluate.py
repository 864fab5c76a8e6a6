"""``train evaluate``: sample every setting of a protocol, measure, write the table, the figure and the report."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from afresh.errors import UsageError
from afresh.files import write_atomic, write_json
from afresh.progress import get_logger
from train.evaluation.checks import check_evaluate
from train.evaluation.config import EvaluateConfig
from train.evaluation.judging.drawn import read_drawn
from train.evaluation.judging.judge import Judge
from train.evaluation.judging.measuring import evaluate_images
from train.evaluation.judging.originals import read_images, read_originals
from train.evaluation.protocol import read_protocol


def run_evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """The job behind ``train evaluate``: sample, measure, write the table, the figure and the report.

    Every setting is drawn with the same prompts, seeds and scheduler into
    ``out/samples/MODEL-GUIDANCE-PROMPTS``; what is there already is kept, so a run that was stopped goes on.

    Returns:
        ``rows`` (see :func:`evaluate_images`), the judge's ``copy_threshold``, and ``report``.
    """
    from train.evaluation.judging.dual_encoder import DualEncoder
    from train.evaluation.reporting.report import story, write_report
    from train.prompts import read_prompts
    from train.sampling.config import AMGConfig, SampleConfig
    from train.sampling.job.job import run_sample
    from train.sampling.pipelines.session import open_index

    check_evaluate(config)
    protocol, out = read_protocol(config.protocol), Path(config.out)
    try:
        amg = AMGConfig(**protocol.amg)  # type: ignore[arg-type]
    except TypeError as error:
        raise UsageError(f"{config.protocol}: amg: {error}") from None
    prompts = {kind: read_prompts(file) for kind, file in protocol.prompts.items()}
    index, embedder = open_index(protocol.index)
    training, captions = read_images(protocol.training)
    held_out, more = read_images(protocol.held_out)
    captions += more + [prompt.caption for file in prompts.values() for prompt in file]
    judge = Judge(DualEncoder.load(config.dual_encoder or None), training, held_out, captions)

    drawn = []
    for setting in protocol.settings:
        for kind, file in protocol.prompts.items():
            folder = out / "samples" / f"{setting.model}-{setting.guidance}-{kind}"
            get_logger(__name__).info(f"{setting.model}, guidance {setting.guidance}, {kind} prompts")
            run_sample(
                SampleConfig(
                    model=protocol.models[setting.model],
                    lora=protocol.loras.get(setting.model),
                    prompts=file,
                    out=str(folder),
                    guidance=setting.guidance,
                    amg=amg,
                    index=protocol.index if setting.guidance != "none" else "",
                    seeds=protocol.seeds,
                    steps=protocol.steps,
                    scale=protocol.scale,
                    batch_size=config.batch_size,
                    dtype=config.dtype,
                    device=config.device,
                )
            )
            drawn.append(read_drawn(folder, setting.model, setting.guidance, kind))
    results = evaluate_images(drawn, judge, index, embedder)
    rows = [result.row for result in results]
    write_table(out, rows)
    originals = read_originals([prompt for file in prompts.values() for prompt in file])
    figures = [story(kind, drawn, results, originals, columns=protocol.columns) for kind in protocol.prompts]
    settings = {
        "images per prompt": protocol.seeds,
        "denoising steps": protocol.steps,
        "guidance scale": protocol.scale,
        "training images of the judge": len(training),
        "held-out images": len(held_out),
        "copy threshold of the judge": f"{judge.threshold:.3f}",
        "candidate captions of the retrieval rank": len(judge.candidates),
        **{f"model {name}": path for name, path in protocol.models.items()},
        **{f"adapters of {name}": path for name, path in protocol.loras.items()},
    }
    links = {}
    curation = Path(protocol.index) / "report.html"
    if curation.is_file():
        links["What curation kept and dropped"] = quote(Path(os.path.relpath(curation, out)).as_posix())
    report = write_report(out, rows, figures, title="What the models copy", settings=settings, links=links)
    return {"rows": rows, "copy_threshold": judge.threshold, "report": str(report)}


def write_table(out: str | Path, rows: Sequence[dict[str, Any]]) -> None:
    """``table.csv`` and ``table.json``."""
    out = Path(out)
    write_json(out / "table.json", {"rows": list(rows)})
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with write_atomic(out / "table.csv") as temporary:
        temporary.write_text(text.getvalue(), encoding="utf-8")

