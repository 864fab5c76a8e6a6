"""The audit's curves, figures and page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from afresh.files import write_atomic
from train.evaluation.reporting.figure import STYLE, Cell, Figure, data_url, escaped, figure_html, percent
from train.memorization.auditing import Audit
from train.memorization.config import MEMORIZED
from train.prompts import Prompt

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from PIL.Image import Image



KINDS = {"training": "training images", "control": "images never trained on"}
LOSS_MEAN = 10  # steps that a point of the loss curve is the mean of


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
        width, smooth = running_mean(loss)  # each step has noises and timesteps of its own
        mark = "o" if len(smooth) == 1 else None  # of one point there is no line
        axes[2].plot(np.arange(len(smooth)) + width, smooth, color=colour, linewidth=2.2, marker=mark)
    axes[0].axhline(MEMORIZED, color="#999", linewidth=0.8, linestyle=":")
    axes[0].legend(frameon=False, fontsize=8)
    of_steps = f", mean of {width} steps" if width > 1 else ""
    axes[2].set(xlabel="steps of the search", ylabel=f"diffusion loss{of_steps}")
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    chart.savefig(path, format="png", metadata={"Software": None})


def running_mean(loss: NDArray[np.floating]) -> tuple[int, NDArray[np.floating]]:
    """Of how many steps at a time, and the means: :data:`LOSS_MEAN`, but no more than a quarter of a short search."""
    width = max(1, min(LOSS_MEAN, len(loss) // 4))
    return width, np.convolve(loss, np.full(width, 1 / width), mode="valid")


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

