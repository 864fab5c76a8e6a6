"""Pages to look at: templates whose every text is escaped, curves as SVG, pictures in the file, an index of pages."""

from __future__ import annotations

import base64
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from afresh.errors import printable
from afresh.files import write_atomic

if TYPE_CHECKING:
    from markupsafe import Markup
    from PIL.Image import Image

BASE = Path(__file__).with_name("page.html.jinja")
"""What the pages share: ``{% extends "base" %}`` with the blocks ``title`` and ``body``."""
Point = tuple[float, float]


@lru_cache(maxsize=32)
def _template(path: Path) -> Any:
    import jinja2

    sources = {"base": BASE.read_text(encoding="utf-8"), "page": path.read_text(encoding="utf-8")}
    environment = jinja2.Environment(
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        loader=jinja2.DictLoader(sources),
        finalize=lambda value: printable(value) if type(value) is str else value,  # not what is markup already
    )
    environment.filters["count"] = lambda number: f"{number:,}"
    environment.filters["percent"] = lambda share: f"{100 * share:.1f} %"
    environment.filters["number"] = lambda value: "–" if value is None else f"{value:.4g}"
    return environment.get_template("page")


def write_page(path: Path, template: Path, **values: Any) -> None:
    """Render a template into a file that loads nothing from elsewhere.

    Args:
        path: of the page; written whole or not at all.
        template: a jinja file that extends ``base``.
        values: what it names; texts are escaped, control characters among them.
    """
    text = render(template, **values)
    with write_atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def render(template: Path, **values: Any) -> str:
    """A template with the values that it names, as :func:`write_page` writes it: a page, or a part of one."""
    return _template(template).render(**values)


def picture(image: Image, largest: int = 160) -> str:
    """An image as a data URL, at most ``largest`` pixels wide and high."""
    small = image.convert("RGB")
    small.thumbnail((largest, largest))
    data = io.BytesIO()
    small.save(data, format="JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"


def line_chart(points: Sequence[Point], name: str, *, width: int = 640, height: int = 200) -> Markup:
    """A curve as SVG, with its axes' ends; points that are not finite break it.

    Args:
        points: ``(x, y)``, by x.
        name: what it shows, for readers that see no picture.
        width, height: in pixels.
    """
    from markupsafe import Markup, escape

    finite = [(x, y) for x, y in points if math.isfinite(y)]
    if not finite:
        return Markup("<p>nothing to show yet</p>")
    left, right, top, bottom = 64, 12, 12, 26
    xs, ys = [x for x, _ in finite], [y for _, y in finite]
    x_0, x_1, y_0, y_1 = min(xs), max(xs), min(0.0, min(ys)), max(ys)
    across, up = (x_1 - x_0) or 1.0, (y_1 - y_0) or 1.0

    def at(x: float, y: float) -> str:
        right_of = left + (x - x_0) / across * (width - left - right)
        return f"{right_of:.1f},{height - bottom - (y - y_0) / up * (height - top - bottom):.1f}"

    runs: list[list[str]] = [[]]
    for x, y in points:
        if math.isfinite(y):
            runs[-1].append(at(x, y))
        elif runs[-1]:
            runs.append([])
    lines = "".join(f'<polyline points="{" ".join(run if len(run) > 1 else run * 2)}"/>' for run in runs if run)
    texts = (
        (left - 6, height - bottom, "end", f"{y_0:.4g}"),
        (left - 6, top + 8, "end", f"{y_1:.4g}"),
        (left, height - 8, "start", f"{x_0:g}"),
        (width - right, height - 8, "end", f"{x_1:g}"),
    )
    words = "".join(f'<text x="{x}" y="{y}" text-anchor="{anchor}">{text}</text>' for x, y, anchor, text in texts)
    frame = f"M{left},{top}V{height - bottom}H{width - right}"
    return Markup(
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(printable(name))}">'
        f'<path class="axis" d="{frame}"/>{lines}{words}</svg>'
    )


def write_index(folder: Path) -> list[str]:
    """Write ``folder/index.html``, which links every page below the folder; their paths, sorted.

    A page is a ``.html`` file that has a ``<title>``; hidden folders and other indexes are left out.
    """
    pages = []
    for path in sorted(folder.rglob("*.html")):
        inner = path.relative_to(folder)
        if path.name == "index.html" or any(part.startswith(".") for part in inner.parts):
            continue
        title = title_of(path)
        if title is not None:
            pages.append({"link": quote(inner.as_posix()), "path": inner.as_posix(), "title": title})
    write_page(folder / "index.html", Path(__file__).with_name("index.html.jinja"), pages=pages, folder=folder.name)
    return [page["path"] for page in pages]


def title_of(path: Path) -> str | None:
    """The title in the head of a page; None where there is none."""
    import html

    with open(path, encoding="utf-8", errors="replace") as file:
        head = file.read(1 << 16)
    begin, found, rest = head.partition("<title>")
    return html.unescape(rest.partition("</title>")[0]).strip() if found else None


def read_lines(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The whole lines of a file of JSON objects; none where there is no file."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text.split("\n")[:-1] if line]


def facts(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names and values as a page lists them: numbers in groups of three, nothing nested."""
    shown = []
    for name, value in values.items():
        if isinstance(value, bool) or value is None or isinstance(value, (list, dict, tuple)):
            continue
        text = f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else str(value)
        shown.append((name.replace("_", " "), text))
    return shown
