"""``train audit``: how often a search brings training images back, beside the same search for images never trained on.

The search is :func:`train.memorization.auditing.audit`; here its success is judged by a copy detector on SSCD's scale
and by plain pixels, and set against the control's: only what training images have beyond it speaks of memorization.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from afresh.errors import UserError
from afresh.files import write_atomic, write_json
from afresh.progress import get_logger, progress
from curate.reading.images import ImageError, decode_image, stack_images
from train.denoising.opening.loading import open_pipeline
from train.evaluation.checks import check_audit, images_to_audit
from train.evaluation.config import AuditConfig
from train.evaluation.judging.metrics import PIXEL_COPY, thumbnails
from train.evaluation.reporting.audit_report import draw_curves, figure_of, render, write_rows
from train.evaluation.reporting.figure import draw_figure
from train.memorization.auditing import Audit, Measure, audit, copy_similarity
from train.memorization.config import MEMORIZED
from train.memorization.detection.roc import bootstrap_interval, roc_auc
from train.memorization.neurons.blocking import blocked
from train.memorization.neurons.files import read_neurons
from train.prompts import Prompt

if TYPE_CHECKING:
    from PIL.Image import Image

    from curate.embed.protocol import Embedder


SIDE = 64  # of the squares whose pixels are compared, before they are averaged down
log = get_logger(__name__)


def run_audit(config: AuditConfig) -> dict[str, Any]:
    """The job behind ``train audit``: search, draw, judge, write the report.

    Returns:
        ``rows``, for each kind of image (``training``, ``control``) before and after the search: ``images``, ``step``,
        ``share`` of drawn images above 0.5, share of images that any restart and seed brought back (``reached``), mean
        ``similarity`` and ``pixel_correlation``, and ``pixel_share`` above 0.9; ``excess``, how much higher the
        training images' share is than the control's, after the search; ``auc`` of the similarity, training images
        against control, with a bootstrap interval; ``report``.

    Raises:
        UsageError: options that do not go together.
        UserError: an input is missing or does not fit.
    """
    check_audit(config)
    chosen = images_to_audit(config)
    if "control" not in chosen:
        log.warning("no control: without images never trained on, nobody can tell what the search draws by itself")
    originals = {kind: [_read_image(prompt) for prompt in prompts] for kind, prompts in chosen.items()}
    neurons = read_neurons(config.neurons)[0] if config.neurons else {}
    measures = _measures(config)
    pipe = open_pipeline(config)

    found: dict[str, Audit] = {}
    total = sum(map(len, chosen.values())) * config.restarts * config.search_steps
    with (
        blocked(pipe, neurons) if neurons else contextlib.nullcontext(),
        progress(total=total, desc="audit", unit="search steps") as bar,
    ):
        for kind, prompts in chosen.items():
            found[kind] = audit(
                pipe,
                originals[kind],
                [prompt.caption for prompt in prompts],
                steps=config.search_steps,
                learning_rate=config.learning_rate,
                noises=config.noises,
                restarts=config.restarts,
                search_seed=config.search_seed,
                measures=measures,
                measure_every=config.measure_every,
                seeds=range(config.first_seed, config.first_seed + config.seeds),
                num_inference_steps=config.steps,
                guidance_scale=config.scale,
                batch_size=config.batch_size,
                gradient_checkpointing=config.gradient_checkpointing,
                bar=bar,
            )

    summary: dict[str, Any] = {"rows": [row for kind, one in found.items() for row in rows_of(kind, one)]}
    summary |= compared(found, bootstrap=config.bootstrap)
    names = ("model", "neurons", "index", "search_steps", "learning_rate", "noises", "restarts")
    summary |= {name: getattr(config, name) for name in (*names, "seeds", "steps", "scale")}
    summary["report"] = str(Path(config.out) / "report.html")
    _write(Path(config.out), summary, found, chosen, originals)
    return summary


def rows_of(kind: str, found: Audit) -> list[dict[str, Any]]:
    """The table's rows of one kind of images: the prompts alone, and the embeddings that the search found."""
    rows = []
    for point in (0, -1):
        similarity, pixel = found.measures["similarity"][point], found.measures["pixel_correlation"][point]
        rows.append(
            {
                "kind": kind,
                "images": len(similarity),
                "step": int(found.points[point]),
                "share": float((similarity > MEMORIZED).mean()),
                "reached": float((similarity > MEMORIZED).any(axis=(1, 2)).mean()),
                "similarity": float(similarity.mean()),
                "pixel_share": float((pixel > PIXEL_COPY).mean()),
                "pixel_correlation": float(pixel.mean()),
            }
        )
    return rows


def compared(found: Mapping[str, Audit], *, bootstrap: int = 1000) -> dict[str, Any]:
    """Training images against the control after the search: ``excess`` share, ``auc`` and its interval; empty without
    a control.
    """
    if "control" not in found:
        return {}
    after = {kind: one.measures["similarity"][-1] for kind, one in found.items()}
    excess = float((after["training"] > MEMORIZED).mean() - (after["control"] > MEMORIZED).mean())
    # One number an image: its images under several seeds are no independent cases.
    scores = np.concatenate([after[kind].mean(axis=(1, 2)) for kind in ("training", "control")])
    labels = np.repeat([1, 0], [len(after["training"]), len(after["control"])])
    result: dict[str, Any] = {"excess": excess, "auc": roc_auc(scores, labels)}
    if bootstrap:
        result["auc_interval"] = bootstrap_interval(roc_auc, scores, labels, samples=bootstrap)
    return result


def row_correlation(drawn: Sequence[Image], originals: Sequence[Image]) -> NDArray[np.float32]:
    """Plain correlation ``[n]`` of each drawn image with its original at 16 × 16 pixels."""
    return (thumbnails(stack_images(drawn, SIDE)) * thumbnails(stack_images(originals, SIDE))).sum(axis=1)


def _read_image(prompt: Prompt) -> Image:
    assert prompt.image is not None
    try:
        return decode_image(prompt.image.read_bytes())
    except (OSError, ImageError) as error:
        raise UserError(f"{prompt.image}: cannot be read ({error})") from error


def _measures(config: AuditConfig) -> dict[str, Measure]:
    from curate.embed.registry import load_embedder

    if not config.index:
        embedder: Embedder = load_embedder(config.embedder or "copy-detector")
        return {"similarity": copy_similarity(embedder), "pixel_correlation": row_correlation}
    from train.sampling.pipelines.session import open_index

    index, embedder = open_index(config.index, config.embedder)
    cosine = copy_similarity(embedder)
    return {
        "similarity": lambda drawn, originals: index.calibrate(cosine(drawn, originals)),
        "pixel_correlation": row_correlation,
    }


def _write(
    out: Path,
    summary: Mapping[str, Any],
    found: Mapping[str, Audit],
    chosen: Mapping[str, Sequence[Prompt]],
    originals: Mapping[str, Sequence[Image]],
) -> None:
    from safetensors.torch import save_file

    write_rows(out / "audit.parquet", found, chosen)
    with write_atomic(out / "embeds.safetensors") as temporary:
        save_file({kind: one.embeds.contiguous() for kind, one in found.items()}, temporary)
    with write_atomic(out / "curves.png") as temporary:
        draw_curves(temporary, found)
    figures = [figure_of(kind, one, chosen[kind], originals[kind]) for kind, one in found.items()]
    with write_atomic(out / "figure.png") as temporary:
        draw_figure(figures[0]).save(temporary, format="PNG", optimize=True)
    with write_atomic(out / "report.html") as temporary:
        temporary.write_text(render(summary, figures, out / "curves.png"), encoding="utf-8")
    write_json(out / "summary.json", summary)
    log.info(f"wrote {out / 'report.html'}")

