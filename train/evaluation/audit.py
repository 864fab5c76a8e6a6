"""``train audit``: how often a search brings training images back, beside the same search for images never trained on.

The search is :func:`train.memorization.audit.audit`; here its success is judged by a copy detector on SSCD's scale and
by plain pixels, and set against the control's: only what training images have beyond it speaks of memorization.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from curate.console import UsageError, UserError, get_logger, progress, write_atomic, write_json
from curate.images import ImageError, decode_image, stack_images
from train.components import open_pipeline
from train.evaluation.config import AuditConfig
from train.evaluation.metrics import thumbnails
from train.evaluation.protocol import PIXEL_COPY
from train.evaluation.report import STYLE, Cell, Figure, data_url, draw_figure, escaped, figure_html, percent
from train.memorization.audit import Audit, Measure, audit, copy_similarity
from train.memorization.config import MEMORIZED
from train.memorization.neurons import blocked, read_neurons
from train.memorization.roc import bootstrap_interval, roc_auc
from train.prompts import Prompt, read_prompts

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from PIL.Image import Image

    from curate.embed import Embedder

KINDS = {"training": "training images", "control": "images never trained on"}
LOSS_MEAN = 10  # steps that a point of the loss curve is the mean of
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
    _check(config)
    chosen = {kind: prompts for kind, prompts in _chosen(config).items() if prompts}
    if not chosen.get("training"):
        raise UserError(f"{config.prompts}: no row of label 1 or without label has an image to bring back")
    if "control" not in chosen:
        log.warning("no control: without images never trained on, nobody can tell what the search draws by itself")
    originals = {kind: [_read_image(prompt) for prompt in prompts] for kind, prompts in chosen.items()}
    neurons = read_neurons(config.neurons)[0] if config.neurons else {}
    measures = _measures(config)
    pipe = open_pipeline(config)

    found: dict[str, Audit] = {}
    total = sum(map(len, chosen.values())) * config.restarts * config.search_steps
    with (
        blocked(pipe.unet, neurons) if neurons else contextlib.nullcontext(),
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


def _check(config: AuditConfig) -> None:
    for option, least in (
        ("images", 0),
        ("search_steps", 1),
        ("noises", 1),
        ("restarts", 1),
        ("measure_every", 1),
        ("seeds", 1),
        ("first_seed", 0),
        ("search_seed", 0),
        ("steps", 1),
        ("batch_size", 1),
        ("bootstrap", 0),
    ):
        if getattr(config, option) < least:
            raise UsageError(f"{option} is {getattr(config, option)}: expected at least {least}")
    if not config.learning_rate > 0:
        raise UsageError(f"learning_rate is {config.learning_rate}: expected more than 0")


def _chosen(config: AuditConfig) -> dict[str, list[Prompt]]:
    """The prompts with images: those to attack, and the control."""
    prompts = read_prompts(config.prompts)
    chosen = {
        "training": [prompt for prompt in prompts if prompt.label != 0],
        "control": [prompt for prompt in prompts if prompt.label == 0],
    }
    if config.control:
        chosen["control"] = read_prompts(config.control)
    chosen = {kind: [prompt for prompt in some if prompt.image is not None] for kind, some in chosen.items()}
    if config.control and not chosen["control"]:
        raise UserError(f"{config.control}: no row has an image")
    return {kind: some[: config.images or None] for kind, some in chosen.items()}


def _read_image(prompt: Prompt) -> Image:
    assert prompt.image is not None
    try:
        return decode_image(prompt.image.read_bytes())
    except (OSError, ImageError) as error:
        raise UserError(f"{prompt.image}: cannot be read ({error})") from error


def _measures(config: AuditConfig) -> dict[str, Measure]:
    from curate.embed import load_embedder

    if not config.index:
        embedder: Embedder = load_embedder(config.embedder or "copy-detector")
        return {"similarity": copy_similarity(embedder), "pixel_correlation": row_correlation}
    from train.sampling.job import open_index

    index, embedder = open_index(config.index, config.embedder)
    cosine = copy_similarity(embedder)
    return {
        "similarity": lambda drawn, originals: index.calibrate(cosine(drawn, originals)),
        "pixel_correlation": row_correlation,
    }


# ------------------------------------------------------------------------------------------------ what is written


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


def write_rows(path: Path, found: Mapping[str, Audit], chosen: Mapping[str, Sequence[Prompt]]) -> None:
    """One row an image that was drawn: ``kind, image`` (its row among its kind), ``caption, restart, draw, step,
    similarity, pixel_correlation``; ``draw`` counts the seeds.
    """
    import pyarrow
    import pyarrow.parquet

    rows = [
        {
            "kind": kind,
            "image": image,
            "caption": chosen[kind][image].caption,
            "restart": restart,
            "draw": draw,
            "step": int(one.points[point]),
            **{name: float(values[point, image, restart, draw]) for name, values in one.measures.items()},
        }
        for kind, one in found.items()
        for point, image, restart, draw in np.ndindex(one.measures["similarity"].shape)
    ]
    with write_atomic(path) as temporary:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), temporary)


def figure_of(kind: str, found: Audit, prompts: Sequence[Prompt], originals: Sequence[Image], most: int = 10) -> Figure:
    """Originals, what their prompts draw, and what the found embeddings draw with the same noise."""
    count = min(most, len(originals))
    rows: list[tuple[str, str, Sequence[Cell]]] = [("originals", "", [Cell(image) for image in originals[:count]])]
    for label, point, images in (("the prompt alone", 0, found.before), ("after the search", -1, found.after)):
        similarity = found.measures["similarity"][point]
        first = similarity[:, 0, 0]
        cells = [Cell(images[i], bool(first[i] > MEMORIZED), f"similarity {first[i]:.2f}") for i in range(count)]
        rows.append((label, f"{percent(float((similarity > MEMORIZED).mean()))} copies", cells))
    return Figure(KINDS[kind], [prompt.caption for prompt in prompts[:count]], rows)


def draw_curves(path: Path, found: Mapping[str, Audit]) -> None:
    """A PNG: similarity, pixel correlation and loss along the search, the mean and each image's own line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Chart

    chart = Chart(figsize=(10.5, 3.3), layout="constrained", dpi=130)
    FigureCanvasAgg(chart)
    axes: Sequence[Axes] = chart.subplots(1, 3)
    for (kind, one), colour in zip(found.items(), ("#d1495b", "#4c78a8"), strict=False):
        for axis, name in zip(axes[:2], ("similarity", "pixel_correlation"), strict=True):
            values = one.measures[name].mean(axis=3).reshape(len(one.points), -1)
            axis.plot(one.points, values, color=colour, alpha=0.25, linewidth=0.8)
            axis.plot(one.points, values.mean(axis=1), color=colour, linewidth=2.2, label=KINDS[kind])
            axis.set(xlabel="steps of the search", ylabel=name.replace("_", " "))
        loss = one.loss.reshape(-1, one.loss.shape[-1]).mean(axis=0)
        width = min(LOSS_MEAN, len(loss))  # each step has noises and timesteps of its own
        smooth = np.convolve(loss, np.full(width, 1 / width), mode="valid")
        axes[2].plot(np.arange(len(smooth)) + width, smooth, color=colour, linewidth=2.2)
    axes[0].axhline(MEMORIZED, color="#999", linewidth=0.8, linestyle=":")
    axes[0].legend(frameon=False, fontsize=8)
    axes[2].set(xlabel="steps of the search", ylabel=f"diffusion loss, mean of {LOSS_MEAN} steps")
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    chart.savefig(path, format="png", metadata={"Software": None})


def conclude(summary: Mapping[str, Any]) -> str:
    """What the numbers say, in a sentence or two."""
    rows = {(row["kind"], row["step"] > 0): row for row in summary["rows"]}
    before, after = rows["training", False], rows["training", True]
    text = (
        f"The prompts alone draw {percent(before['share'])} copies of the training images, the embeddings that the "
        f"search found {percent(after['share'])}; {percent(after['reached'])} of the images came back at least once. "
    )
    if ("control", True) not in rows:
        return text + "There was no control, so this does not tell what the search can draw by itself."
    control = rows["control", True]
    text += (
        f"For images that were never trained on the same search ends at {percent(control['share'])} "
        f"({percent(control['reached'])} at least once). "
    )
    low, high = summary.get("auc_interval", (math.nan, math.nan))
    interval = f" (95 % interval {low:.2f} to {high:.2f})" if low == low else ""
    text += (
        f"What speaks of memorization is the difference, {100 * summary['excess']:+.0f} points; similarity tells "
        f"training images from the others with an AUC of {summary['auc']:.2f}{interval}."
    )
    return text


def render(summary: Mapping[str, Any], figures: Sequence[Figure], curves: Path) -> str:
    """The page as one string, which loads nothing from elsewhere."""
    from PIL import Image

    with Image.open(curves) as image:
        chart = data_url(image, largest=max(image.size))
    settings = "".join(
        f"<dt>{escaped(key)}</dt><dd>{escaped(value)}</dd>"
        for key, value in summary.items()
        if not isinstance(value, (list, tuple, dict))
    )
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>What can be brought back</title><style>{STYLE}</style></head><body>",
        "<h1>What can be brought back</h1>",
        f"<p>{escaped(conclude(summary))}</p>",
        f'<img src="{chart}" alt="Similarity, pixel correlation and loss along the search" style="max-width: 100%">',
        '<p class="soft">Thick lines are means, thin ones single images. A red frame marks images above 0.5. The first '
        "images in order, the first noise; nothing is picked by its outcome.</p>",
    ]
    for figure in figures:
        parts += [f"<h2>{escaped(figure.title[:1].upper() + figure.title[1:])}</h2>", figure_html(figure)]
    parts += [f"<details><summary>Settings</summary><dl>{settings}</dl></details>", "</body></html>\n"]
    return "\n".join(parts)
