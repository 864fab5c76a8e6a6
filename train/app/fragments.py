"""Parts of the page as text: templates in which everything is escaped, and curves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from afresh.pages import render

if TYPE_CHECKING:
    from markupsafe import Markup

HERE = Path(__file__).parent / "page"
# The browser's side takes what it is sent for a template of Handlebars and of JavaScript.
NO_TEMPLATE = str.maketrans({"{": "&#123;", "}": "&#125;", "$": "&#36;", "`": "&#96;"})


def fragment(name: str, **values: Any) -> str:
    """The template ``page/NAME.html.jinja`` with values; texts are escaped, also against being run as a template."""
    return render(HERE / f"{name}.html.jinja", **values).translate(NO_TEMPLATE)


@dataclass(frozen=True)
class Curve:
    """A line of a chart."""

    name: str
    points: Sequence[tuple[float, float | None]]
    """``(x, y)``; None breaks the line."""
    style: str
    """Class of the line: plain, guided, limit."""


def chart(
    curves: Sequence[Curve], x_name: str, *, falling: bool = False, width: int = 640, height: int = 230
) -> Markup:
    """Curves over one axis as SVG, with a legend; nothing where no point is finite.

    Args:
        curves: to draw.
        x_name: below the axis.
        falling: x runs from the highest to the lowest.
        width, height: in pixels.
    """
    from markupsafe import Markup

    kept = [(curve, [(x, y) for x, y in curve.points if y is not None and math.isfinite(y)]) for curve in curves]
    kept = [(curve, points) for curve, points in kept if points]
    if not kept:
        return Markup("")
    left, right, top, bottom = 44, 12, 10, 34
    xs, ys = [x for _, points in kept for x, _ in points], [y for _, points in kept for _, y in points]
    x_0, x_1, y_0, y_1 = min(xs), max(xs), min(0.0, min(ys)), max(ys)
    if falling:
        x_0, x_1 = x_1, x_0
    across, up = (x_1 - x_0) or 1.0, (y_1 - y_0) or 1.0

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            round(left + (x - x_0) / across * (width - left - right), 1),
            round(height - bottom - (y - y_0) / up * (height - top - bottom), 1),
        )

    lines = [
        {"name": curve.name, "style": curve.style, "points": " ".join(f"{x},{y}" for x, y in (at(*p) for p in points))}
        for curve, points in kept
    ]
    ticks = [{"y": at(x_0, y)[1], "text": f"{y:.2g}"} for y in (y_0, (y_0 + y_1) / 2, y_1)]
    ends = [{"x": at(x, y_0)[0], "text": f"{x:g}"} for x in (x_0, x_1)]
    values = {"lines": lines, "ticks": ticks, "ends": ends, "x_name": x_name, "width": width, "height": height}
    return Markup(fragment("chart", left=left, right=right, bottom=bottom, **values))
