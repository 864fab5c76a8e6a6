"""The figure of ``benchmarks.training``: copies over repeats, against alignment, and over the steps of training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def draw_figure(path: Path, table: Sequence[Row], rows: Sequence[Row], pixel_copy: float) -> None:
    """Three panels; copies by pixels, bars are 95 % intervals.

    Args:
        path: file to write, a PNG.
        table: a row a setting and number of repeats.
        rows: a row an image.
        pixel_copy: correlation above which an image is a copy.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.2), layout="constrained", dpi=130)
    repeats_panel, alignment_panel, steps_panel = figure.subplots(1, 3)
    names = list(dict.fromkeys(row["setting"] for row in table))
    for number, name in enumerate(names):
        mine = [row for row in table if row["setting"] == name]
        style = {"color": f"C{number % 10}", "markersize": 4, "linewidth": 1.2, "capsize": 2}
        marker = "os^vDP*Xd"[number % 9]
        shares = [row["pixels"] for row in mine]
        repeats_panel.errorbar(
            [row["repeats"] * 1.015**number for row in mine],  # side by side, or bars would hide each other
            [share[0] for share in shares], yerr=_bars(shares), fmt=f"{marker}-", label=name, **style,
        )  # fmt: skip
        drawn = [row for row in rows if row["setting"] == name and row["repeats"]]
        share, alignment = mine[0]["pixels_of_all"], mine[0]["held_out_alignment"]
        alignment_panel.errorbar(
            [alignment[0]], [share[0]], xerr=_bars([alignment]), yerr=_bars([share]), fmt=marker, **style
        )
        steps = sorted({row["step"] for row in drawn} - {0})
        watched = [[row["pixels"] > pixel_copy for row in drawn if row["step"] == step] for step in steps]
        steps_panel.plot(
            steps, [sum(some) / len(some) for some in watched], f"{marker}-", color=style["color"], markersize=4,
            linewidth=1.2,
        )  # fmt: skip
    repeats_panel.set(title="copies over repeats", xlabel="how often an image stands in the set", xscale="log")
    ticks = sorted({row["repeats"] for row in table})
    repeats_panel.set_xticks(ticks, [str(tick) for tick in ticks])
    repeats_panel.minorticks_off()
    alignment_panel.set(title="copies against alignment", xlabel="held-out alignment, share of real images'")
    steps_panel.set(title="copies while training", xlabel="optimizer steps")
    for panel in (repeats_panel, alignment_panel, steps_panel):
        panel.set(ylim=(-0.02, None), ylabel="share of images that are copies")
        panel.spines[["top", "right"]].set_visible(False)
    figure.legend(*repeats_panel.get_legend_handles_labels(), loc="outside lower center", ncol=5, frameon=False)
    figure.savefig(path)


def _bars(values: Sequence[Sequence[float]]) -> list[list[float]]:
    return [[mean - low for mean, low, _ in values], [high - mean for mean, _, high in values]]
