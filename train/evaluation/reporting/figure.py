"""Figures of an evaluation: originals and what settings draw, as a PNG and as a page's table."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from afresh.errors import printable


@dataclass(frozen=True)
class Cell:
    """One picture of the figure."""

    image: Image.Image | None
    copied: bool = False
    """Counted as a copy by the independent judge: gets the frame."""
    note: str = ""


@dataclass(frozen=True)
class Figure:
    """Rows of pictures under captions."""

    title: str
    columns: Sequence[str]
    """Captions."""
    rows: Sequence[tuple[str, str, Sequence[Cell]]]
    """``(label, remark, cells)``."""


def percent(share: float) -> str:
    """``0.0417`` → ``4 %``; what is not nothing is not called 0 %."""
    if not math.isfinite(share):
        return "–"
    if 0 < share < 0.005 or 0.995 < share < 1:
        return f"{100 * share:.1f} %"
    return f"{100 * share:.0f} %"


def escaped(value: str) -> str:
    """Text for a page."""
    return html.escape(printable(str(value)), quote=True)


def figure_html(figure: Figure) -> str:
    """The figure as part of a page that has :data:`STYLE`."""
    n = len(figure.columns)
    columns = f"grid-template-columns: minmax(120px, 1.5fr) repeat({n}, 1fr)"
    parts = [f'<div class="scroll"><div class="figure" style="{columns}"><div></div>']
    parts += [f'<div class="caption">{escaped(_short(caption))}</div>' for caption in figure.columns]
    for label, remark, cells in figure.rows:
        remark = f"<span>{escaped(remark)}</span>" if remark else ""
        parts.append(f'<div class="label">{escaped(label)}{remark}</div>')
        for caption, cell in zip(figure.columns, cells, strict=True):
            if cell.image is None:
                parts.append('<div class="none"></div>')
                continue
            words = f"{label}: {caption}" + (", a copy by the judge" if cell.copied else "")
            note = f' title="{escaped(cell.note)}"' if cell.note else ""
            frame = ' class="copied"' if cell.copied else ""
            parts.append(f'<img src="{data_url(cell.image)}" alt="{escaped(words)}"{note}{frame}>')
    parts.append("</div></div>")
    return "\n".join(parts)


def _short(caption: str, length: int = 60) -> str:
    caption = " ".join(caption.split())
    return caption if len(caption) <= length else caption[: length - 1].rstrip() + "…"


def data_url(image: Image.Image, largest: int = 192) -> str:
    """Inlined as PNG, large images brought down; the browser enlarges small ones smoothly."""
    image = image.convert("RGB")
    if max(image.size) > largest:
        image = image.copy()
        image.thumbnail((largest, largest), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def draw_figure(figure: Figure, side: int = 112) -> Image.Image:
    """The figure as one picture on white, for a README: ``side`` pixels an image."""
    gap, left, margin = 10, 190, 16
    font, small, bold = (ImageFont.load_default(size) for size in (15, 12, 16))
    captions = [_wrapped(caption, small, side) for caption in figure.columns]
    top = margin + max([len(lines) for lines in captions], default=1) * 15 + 8
    width = left + len(figure.columns) * (side + gap) + margin
    picture = Image.new("RGB", (width, top + len(figure.rows) * (side + gap) + margin - gap), "white")
    draw = ImageDraw.Draw(picture)
    for column, lines in enumerate(captions):
        x = left + column * (side + gap) + side / 2
        for line, text in enumerate(lines):
            y = top - 8 - (len(lines) - line) * 15
            draw.text((x, y), text, fill="#68717d", font=small, anchor="ma")
    for line, (label, remark, cells) in enumerate(figure.rows):
        y = top + line * (side + gap)
        words = _wrapped(label, bold, left - margin - gap, most=3)
        height = 20 * len(words) + (18 if remark else 0)
        at = y + (side - height) / 2
        for text in words:
            draw.text((margin, at), text, fill="#1d2228", font=bold)
            at += 20
        if remark:
            draw.text((margin, at + 1), remark, fill="#68717d", font=font)
        for column, cell in enumerate(cells):
            x = left + column * (side + gap)
            if cell.image is None:
                draw.rectangle((x, y, x + side - 1, y + side - 1), fill="#f6f7f9")
                continue
            image = cell.image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
            picture.paste(image, (x, y))
            colour, thickness = ("#d1364a", 3) if cell.copied else ("#e3e6ea", 1)
            reach = 2 if cell.copied else 0
            box = (x - reach, y - reach, x + side - 1 + reach, y + side - 1 + reach)
            draw.rounded_rectangle(box, 4, outline=colour, width=thickness)
    return picture


def _wrapped(text: str, font: Any, width: float, most: int = 4) -> list[str]:
    """Lines that fit; the last of ``most`` ends in an ellipsis where there is more."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    if len(lines) > most:
        lines = lines[:most]
        lines[-1] += " …"
    for i, line in enumerate(lines):
        while font.getlength(lines[i]) > width and len(line) > 1:
            line = line[:-1]
            lines[i] = line + "…"
    return lines or [""]


STYLE = """
:root { --ink: #1d2228; --soft: #68717d; --line: #e3e6ea; --paper: #ffffff; --tint: #f6f7f9; --copy: #d1364a;
  --good: #1d7f5f; --bar: #d1364a2e; color-scheme: light dark; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaed; --soft: #9aa3ae; --line: #343a42;
  --paper: #16191d; --tint: #1e2227; --copy: #ff6b7d; --good: #5ecfa6; --bar: #ff6b7d3d; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 40px 28px 64px; max-width: 1180px; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 6px; letter-spacing: -.01em; }
h2 { font-size: 19px; margin: 44px 0 12px; }
p, li { max-width: 78ch; } .soft { color: var(--soft); } ul { padding-left: 20px; }
.scroll { overflow-x: auto; padding: 3px; margin: 0 -3px; }
.figure { display: grid; gap: 8px 8px; align-items: center; min-width: 760px; margin: 18px 0 8px; }
.figure .caption { font-size: 12px; line-height: 1.25; color: var(--soft); align-self: end;
  text-align: center; overflow-wrap: anywhere; }
.figure .label { font-weight: 600; line-height: 1.25; padding-right: 10px; }
.figure .label span { display: block; font-weight: 400; font-size: 13px; color: var(--soft); }
.figure img, .figure .none { width: 100%; aspect-ratio: 1; display: block; border-radius: 6px;
  background: #fff; border: 1px solid var(--line); }
.figure img.copied { outline: 3px solid var(--copy); outline-offset: -1px; border-color: transparent; }
.figure .none { background: var(--tint); }
.key { display: inline-block; width: 13px; height: 13px; border: 3px solid var(--copy); border-radius: 3px;
  vertical-align: -2px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 14px; }
th { font-weight: 600; text-align: right; vertical-align: bottom; padding: 6px 10px; border-bottom: 2px solid
  var(--line); line-height: 1.25; } th:first-child, td:first-child { text-align: left; padding-left: 0; }
td { text-align: right; padding: 7px 10px; border-bottom: 1px solid var(--line); white-space: nowrap; }
tr.kind td { font-weight: 600; padding-top: 18px; }
tr.real td { color: var(--soft); } td span { display: block; font-size: 11px; font-weight: 400; color: var(--soft); }
td.share { background: linear-gradient(to right, var(--bar) var(--share), transparent var(--share)); }
td.best { color: var(--good); font-weight: 600; }
dt { font-weight: 600; margin-top: 8px; } dd { margin: 0; max-width: 78ch; color: var(--soft); }
details { margin-top: 28px; } summary { cursor: pointer; font-weight: 600; }
@media (max-width: 720px) { body { padding: 24px 16px; } }
"""
