"""The figure of :mod:`benchmarks.mitigation`: copies and similarity over alignment, a marker a method."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

PANELS = (  # of x and of y: key of a row, label
    (("repeated.alignment", "alignment, of real images'"), ("repeated.independent", "copies by judge or pixels")),
    (("repeated.alignment", "alignment, of real images'"), ("repeated.similarity", "similarity, own embedder")),
    (("held_out.alignment", "alignment, of real images'"), ("repeated.independent", "copies by judge or pixels")),
)
MARKERS = "osD^vPX*<>ph8d"


def strength(row: dict[str, Any]) -> float:
    """Where a row lies on its curve: by the number in its strength, largest first."""
    number = re.search(r"[−\d.]+", row["strength"])
    return -float(number[0].replace("−", "-")) if number else 0.0


def value(row: dict[str, Any], key: str) -> float:
    """What a row has under ``kind.name``."""
    kind, _, name = key.partition(".")
    return row[kind][name]


def draw_figure(path: Path, rows: Sequence[dict[str, Any]], reference: dict[str, Any]) -> None:
    """Copies and similarity over alignment: a marker a method, a line a family whose strength differs.

    Args:
        path: of the image.
        rows: of the table.
        reference: the row of images that were never trained on, whose values are dotted lines.
    """
    from matplotlib.figure import Figure

    families: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["family"] != "ablation":
            families.setdefault(row["family"], []).append(row)
    for some in families.values():
        some.sort(key=strength)
    figure = Figure(figsize=(12.5, 11.5), layout="constrained", dpi=110)
    panels = figure.subplots(2, 2).flatten()
    for panel, ((x, x_label), (y, y_label)) in zip(panels, PANELS, strict=False):
        points, labels = [], []
        for number, (family, some) in enumerate(families.items()):
            at = [(value(row, x), value(row, y)) for row in some]
            style = {"color": f"C{number % 10}", "marker": MARKERS[number % len(MARKERS)]}
            if number >= 10:
                style["markeredgecolor"] = "black"
            panel.plot(*zip(*at, strict=True), **style, linewidth=1, markersize=7, label=family, alpha=0.85)
            points += at
            first, *others = some
            labels += [f"{family} {first['strength']}".strip() if others else family]
            labels += [row["strength"] for row in others]  # the colour tells the family
        panel.set(xlabel=x_label, ylabel=y_label)
        panel.margins(0.12)
        panel.spines[["top", "right"]].set_visible(False)
        if y.endswith("independent"):
            panel.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
        panel.axhline(value(reference, y), color="#888", linewidth=0.9, linestyle=":")
        place_labels(figure, panel, points, labels)
    panels[0].set_title("repeated captions", loc="left")
    panels[1].set_title("repeated captions", loc="left")
    panels[2].set_title("what held-out captions pay", loc="left")
    panels[3].axis("off")
    handles, names = panels[0].get_legend_handles_labels()
    handles.append(panels[0].lines[-1])
    names.append("real images, never trained on")
    title = "better: to the right and down"
    panels[3].legend(handles, names, loc="center left", frameon=False, fontsize=10, title=title)
    figure.savefig(path)


def place_labels(figure: Any, panel: Any, points: Sequence[tuple[float, float]], labels: Sequence[str]) -> None:
    """Write each label near its point where it covers the least of other labels and points; a line leads there."""
    figure.draw_without_rendering()  # the layout decides where points are
    at = panel.transData.transform(points)
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y in at]
    frame = panel.get_window_extent()
    pixels = figure.dpi / 72
    for (x, y), point, label in zip(at, points, labels, strict=True):
        if not label:
            continue
        width, height = (0.56 * 8 * len(label) + 2) * pixels, 10 * pixels
        best: tuple[float, float, float, float] | None = None
        for radius in (9, 18, 30, 44, 60):
            for angle in np.linspace(0, 2 * np.pi, 16, endpoint=False):
                # The label's nearest edge, not its middle, is ``radius`` away.
                cx = x + np.cos(angle) * (radius * pixels + width / 2)
                cy = y + np.sin(angle) * (radius * pixels + height / 2)
                box = (cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2)
                outside = box[0] < frame.x0 or box[2] > frame.x1 or box[1] < frame.y0 or box[3] > frame.y1
                cost = sum(overlap(box, other) for other in taken) + radius + 1e4 * outside
                if best is None or cost < best[0]:
                    best = (cost, cx, cy, radius)
        assert best is not None
        _, cx, cy, radius = best
        taken.append((cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2))
        line = {"arrowstyle": "-", "color": "#aaa", "linewidth": 0.6, "shrinkB": 4} if radius > 9 else None
        panel.annotate(
            label, point, xytext=panel.transData.inverted().transform((cx, cy)),
            ha="center", va="center", fontsize=8, arrowprops=line,
        )  # fmt: skip


def overlap(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """Area that two boxes ``(x0, y0, x1, y1)`` share."""
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
