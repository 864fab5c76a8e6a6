"""``train evaluate``: sample every setting of a protocol, measure, write the tables, the figure and the report."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from afresh.errors import UsageError
from afresh.progress import get_logger
from train.evaluation.config import EvaluateConfig, Protocol
from train.evaluation.inputs import Inputs, ready_inputs, refuse_missing
from train.evaluation.judging.drawn import Drawn, read_drawn
from train.evaluation.judging.originals import never_trained_on, read_images
from train.evaluation.protocol import protocol_of

if TYPE_CHECKING:
    from train.evaluation.metrics.protocol import Metric, Reference
    from train.sampling.config import SampleConfig


REAL = "real images"
"""Model of the rows that measure the originals of the prompts."""
log = get_logger(__name__)


def run_evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """The job behind ``train evaluate``: sample, measure, write the tables, the figure and the report.

    Every setting is drawn with the same prompts, seeds and scheduler into
    ``out/samples/MODEL-GUIDANCE-PROMPTS``; what is there already is kept, so a run that was stopped goes on.

    Returns:
        ``rows`` (see :func:`~train.evaluation.metrics.measuring.evaluate_images`), ``real``, the rows of the prompts'
        originals, the dual encoder's ``copy_threshold`` (None without it), ``not_measured``, what other metrics lack,
        ``report``, and with ``verify`` ``verified``. Of a run that was asked to stop, ``stopped``.

    Raises:
        UsageError: the protocol is malformed.
        UserError: something that it names is not there; or an image that was drawn again came out differently.
    """
    from train.evaluation.metrics.measuring import evaluate_images
    from train.evaluation.metrics.registry import chosen, columns_of, make, named
    from train.evaluation.reporting.tables import Compared, write_images, write_tables
    from train.evaluation.verify import verify
    from train.sampling.job.job import run_sample

    protocol, out = protocol_of(config), Path(config.out)
    refuse_missing(protocol)
    kinds, lacking = chosen(protocol)
    if lacking:
        log.warning(f"not measured, for want of what stands in brackets: {named(lacking)}")
    inputs = ready_inputs(protocol, out)
    jobs = sampling_jobs(protocol, config, inputs)
    reference = read_reference(protocol, inputs)
    metrics = make(kinds, reference)

    drawn = []
    for (model, guidance, kind), job in jobs.items():
        log.info(f"{model}, guidance {guidance}, {kind} prompts")
        if run_sample(job).get("stopped"):
            return {"stopped": True}
        drawn.append(read_drawn(job.out, model, guidance, kind))
    results = evaluate_images(drawn, metrics, resamples=protocol.resamples)
    real = evaluate_images(real_images(inputs), metrics, resamples=protocol.resamples)
    rows = [one.row for one in results]
    # Of itself, a real image earns the whole: that column says nothing there.
    real_rows = [{k: v for k, v in one.row.items() if not k.startswith("alignment_of_real")} for one in real]
    columns = columns_of(metrics)
    write_tables(out, rows, real_rows, columns)
    write_images(out, drawn, results)
    report = _report(config, protocol, inputs, metrics, drawn, results, real_rows, reference, lacking)
    # Last, so that what was measured stands even if something came out differently.
    verified = {"verified": verify(list(jobs.values()), out / "verify")} if config.verify else {}
    threshold = next((m.copies.threshold for m in metrics if m.name == "dual-encoder"), None)  # type: ignore[attr-defined]
    summary = {"rows": rows, "real": real_rows, "copy_threshold": threshold, "not_measured": lacking}
    return Compared({**summary, **verified, "report": str(report)}, columns)


def sampling_jobs(
    protocol: Protocol, config: EvaluateConfig, inputs: Inputs
) -> dict[tuple[str, str, str], SampleConfig]:
    """What is drawn, by model, guidance and kind of prompts; checked, all before the first image.

    Raises:
        UsageError: settings that do not go together.
    """
    from train.sampling.config import AMGConfig, SampleConfig
    from train.sampling.job.checks import check_guidance, check_options
    from train.sampling.presets.config import DEFAULT

    try:
        amg = AMGConfig(**{"preset": DEFAULT, **protocol.amg})  # type: ignore[arg-type]
    except TypeError as error:
        raise UsageError(f"{config.protocol}: amg: {error}") from None
    jobs = {}
    for setting in protocol.settings:
        for kind, file in inputs.files.items():
            job = SampleConfig(
                model=protocol.models[setting.model],
                lora=protocol.loras.get(setting.model),
                neurons=protocol.neurons.get(setting.model, ""),
                neurons_of="known",
                prompts=file,
                out=str(Path(config.out) / "samples" / f"{setting.model}-{setting.guidance}-{kind}"),
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
            check_options(job)
            check_guidance(job)
            jobs[setting.model, setting.guidance, kind] = job
    return jobs


def read_reference(protocol: Protocol, inputs: Inputs) -> Reference:
    """What images are compared with: shards, originals and the index."""
    from train.evaluation.metrics.protocol import Reference
    from train.sampling.pipelines.session import open_index

    index, embedder = open_index(protocol.index) if protocol.index else (None, None)
    training, captions = read_images(protocol.training) if protocol.training else ([], [])
    held_out, more = read_images(protocol.held_out) if protocol.held_out else ([], [])
    training = training or [image for images in inputs.originals.values() for image in images]
    return Reference(
        training=training,
        held_out=never_trained_on(held_out, training),
        captions=captions + more + [prompt.caption for some in inputs.prompts.values() for prompt in some],
        originals=inputs.originals,
        index=index,
        embedder=embedder,
        weights=protocol.weights,
    )


def real_images(inputs: Inputs) -> list[Drawn]:
    """The originals of each kind of prompts as a setting of their own: what the metrics say of real images."""
    found = []
    for kind, prompts in inputs.prompts.items():
        pairs = [(image, p.caption) for p in prompts for image in inputs.originals.get(p.caption, ())]
        if pairs:
            images, captions = zip(*pairs, strict=True)
            found.append(Drawn(REAL, "none", kind, images, captions))
    return found


def _report(
    config: EvaluateConfig,
    protocol: Protocol,
    inputs: Inputs,
    metrics: Sequence[Metric],
    drawn: Sequence[Drawn],
    results: Sequence[Any],
    real: Sequence[Mapping[str, Any]],
    reference: Reference,
    lacking: Mapping[str, str],
) -> Path:
    from train.evaluation.metrics.registry import columns_of
    from train.evaluation.reporting.report import story, write_report

    out = Path(config.out)
    originals = {caption: images[0] for caption, images in inputs.originals.items()}
    figures = [story(kind, drawn, results, originals, columns=protocol.columns) for kind in inputs.prompts]
    judges = {metric.name: metric.copies for metric in metrics if hasattr(metric, "copies")}
    settings = {
        "protocol": f"preset {protocol.preset}" if protocol.preset else config.protocol,
        "images per prompt": protocol.seeds,
        "denoising steps": protocol.steps,
        "guidance scale": protocol.scale,
        "intervals": f"95 %, {protocol.resamples} choices of prompts" if protocol.resamples else "none",
        "training images of the judges": len(reference.training),
        "held-out images": len(reference.held_out),
        **{f"judge {metric.name}": metric.about for metric in metrics},
        **{f"copy threshold of {name}": f"{copies.threshold:.3f}" for name, copies in judges.items()},
        **{f"not measured: {name}": what for name, what in lacking.items()},
        "candidate captions of the retrieval rank": len(dict.fromkeys(reference.captions)),
        **{f"model {name}": path for name, path in protocol.models.items()},
        **{f"adapters of {name}": path for name, path in protocol.loras.items()},
        **{f"neurons blocked in {name}": path for name, path in protocol.neurons.items()},
    }
    links = {}
    curation = Path(protocol.index) / "report.html"
    if protocol.index and curation.is_file():
        links["What curation kept and dropped"] = quote(Path(os.path.relpath(curation, out)).as_posix())
    rows = [result.row for result in results]
    return write_report(
        out,
        rows,
        figures,
        title="What the models copy",
        columns=columns_of(metrics),
        real=real,
        settings=settings,
        links=links,
    )
