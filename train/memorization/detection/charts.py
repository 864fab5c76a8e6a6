"""Pictures of scores: histograms and ROC curves, and how signals run along the trajectory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from afresh.files import write_atomic
from train.memorization.detection.roc import roc_auc, roc_curve

CLASSES = ((0, "#4c78a8", "not memorized"), (1, "#d1495b", "memorized"), (-1, "#8a8a8a", "unlabelled"))
"""Label, colour and words of the prompts that are told apart."""


def draw_chart(path: str | Path, labels: ArrayLike, values: Mapping[str, NDArray[np.float32]], note: str = "") -> None:
    """A PNG with, for every signal, the histogram of both labels' prompts and the ROC.

    Args:
        path: of the file.
        labels: ``[n]`` of 1, 0 and -1 (unknown, left out); both 1 and 0 must occur.
        values: signal → ``[n]``.
        note: what to add to a signal's name.
    """
    labels = np.asarray(labels)
    figure, axes = _figure(len(values), 2)
    for (histogram, roc), (name, column) in zip(axes, values.items(), strict=True):
        bins = np.linspace(column.min(), column.max() + 1e-9, 31)
        for label, colour, words in CLASSES[:2]:
            chosen = column[labels == label]
            share = np.full(len(chosen), 1 / max(1, len(chosen)))
            histogram.hist(chosen, bins, weights=share, color=colour, alpha=0.7, label=f"{words} ({len(chosen)})")
        histogram.set(xlabel=f"{name}{note}", ylabel="share of prompts")
        histogram.legend(frameon=False)
        known = labels >= 0
        fpr, tpr = roc_curve(column[known], labels[known])
        roc.plot(fpr, tpr, color="#222", drawstyle="steps-post")
        roc.plot([0, 1], [0, 1], color="#bbb", linewidth=0.8, linestyle="--")
        roc.axvline(0.01, color="#d1495b", linewidth=0.8, linestyle=":")
        roc.set(
            xlabel="false-positive rate",
            ylabel="true-positive rate",
            title=f"AUC {roc_auc(column[known], labels[known]):.3f}",
            xlim=(-0.01, 1),
            ylim=(0, 1.01),
        )
    _save(figure, path)


def draw_trajectories(
    path: str | Path, labels: ArrayLike, timesteps: Sequence[int], curves: Mapping[str, NDArray[np.float32]]
) -> None:
    """A PNG with, for every signal, its course from the first step on: the mean and the middle 80 % of each label's
    prompts.

    Args:
        path: of the file.
        labels: ``[n]`` of 1, 0 and -1 (unknown).
        timesteps: ``[steps]``, falling.
        curves: signal → ``[n, steps]``, as ``scores.magnitudes.mean(axis=1)``.
    """
    labels = np.asarray(labels)
    figure, axes = _figure(len(curves), 1)
    for (axis,), (name, lines) in zip(axes, curves.items(), strict=True):
        for label, colour, words in CLASSES:
            chosen = lines[labels == label]
            if len(chosen):
                low, high = np.quantile(chosen, [0.1, 0.9], axis=0)
                axis.fill_between(timesteps, low, high, color=colour, alpha=0.2, linewidth=0)
                axis.plot(timesteps, chosen.mean(axis=0), color=colour, label=f"{words} ({len(chosen)})")
        axis.set(xlabel="timestep", ylabel=name)
        axis.invert_xaxis()
        axis.legend(frameon=False)
    _save(figure, path)


def _figure(rows: int, columns: int) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4 * rows), layout="constrained", dpi=130)
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _save(figure: Any, path: str | Path) -> None:
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    with write_atomic(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})

