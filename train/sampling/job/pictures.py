"""What was drawn, to look at: the grid of one guidance, and the comparison of several."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from afresh.files import write_atomic
from curate.reading.images import decode_image
from train.memorization.config import MEMORIZED

GRID_PROMPTS, GRID_SEEDS, THUMBNAIL = 40, 8, 128
ROWS, CELL, GAP, CAPTION, MARGIN, BETWEEN = 40, 192, 14, 256, 28, 56
"""Of the comparison: most rows; in pixels the side of an image, the space between two, the widths of captions and edge,
and the space between two blocks of rows."""
HEAD, NOTE = 84, 34
"""Heights of the column heads and of the line under an image, in pixels."""
INK, SOFT, COPY, TILE = "#1b1b1b", "#767676", "#c2293f", "#ececec"


@dataclass(frozen=True)
class Cell:
    """An image of the comparison."""

    image: Path | None
    """None leaves the cell empty."""
    note: str = ""
    marked: bool = False
    """Framed as a copy."""
    withheld: bool = False


@dataclass(frozen=True)
class Row:
    """Images of one prompt and seed."""

    caption: str
    detail: str
    cells: Sequence[Cell]


def draw_grid(path: Path, rows: Sequence[tuple[str, Sequence[Path | None]]]) -> None:
    """Prompts down, seeds across; the first of each where there are many.

    Args:
        path: of the PNG.
        rows: caption and images of each prompt; None for one that is withheld.
    """
    shown = [(caption, files[:GRID_SEEDS]) for caption, files in rows[:GRID_PROMPTS]]
    label, gap = 200, 4
    side = THUMBNAIL + gap
    grid = Image.new("RGB", (label + side * max(len(files) for _, files in shown), side * len(shown)), "white")
    draw = ImageDraw.Draw(grid)
    for y, (caption, files) in enumerate(shown):
        draw.multiline_text((gap, y * side + gap), wrapped(caption, 32, 8), fill="black")
        for x, file in enumerate(files):
            tile = _withheld(THUMBNAIL, 15) if file is None else _thumbnail(file, THUMBNAIL)
            grid.paste(tile, (label + x * side, y * side))
    _save(path, grid)


def draw_comparison(path: Path, heads: Sequence[tuple[str, str]], rows: Sequence[Row], legend: str) -> None:
    """Prompts and seeds down, guidances across, a line under each image; many rows in several blocks side by side.

    Args:
        path: of the PNG.
        heads: name of each column and what stands below it, small.
        rows: with as many cells as there are columns; the first ``ROWS`` are drawn.
        legend: at the foot.
    """
    rows = rows[:ROWS]
    across, down = CELL + GAP, CELL + NOTE
    block = CAPTION + across * len(heads) - GAP
    deep = _rows_in_a_block(len(rows), block + BETWEEN, down)
    blocks = [rows[start : start + deep] for start in range(0, len(rows), deep)]
    width = 2 * MARGIN + len(blocks) * (block + BETWEEN) - BETWEEN
    lines = wrapped(legend, int((width - 2 * MARGIN) / 9.2), 4).split("\n")
    height = MARGIN + HEAD + down * deep + 24 * len(lines) + MARGIN
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    for b, part in enumerate(blocks):
        left = MARGIN + b * (block + BETWEEN)
        for x, (name, below) in enumerate(heads):
            centre = left + CAPTION + x * across + CELL // 2
            draw.text((centre, MARGIN), name, fill=INK, font=_fitting(draw, name, 22, bold=True), anchor="ma")
            draw.text((centre, MARGIN + 34), below, fill=SOFT, font=_fitting(draw, below, 17), anchor="ma")
        for y, row in enumerate(part):
            top = MARGIN + HEAD + y * down
            new = not y or row.caption != part[y - 1].caption
            if new and y:
                draw.line((left, top - 5, left + block, top - 5), fill="#dddddd")
            text = wrapped(row.caption, 21, 5) if new else ""
            draw.multiline_text((left, top + 4), text, fill=INK, font=_font(19), spacing=6)
            draw.text((left, top + 6 + 26 * (text.count("\n") + 1)), row.detail, fill=SOFT, font=_font(16))
            for x, cell in enumerate(row.cells):
                _draw_cell(sheet, draw, left + CAPTION + x * across, top, cell)
    for i, line in enumerate(lines):
        draw.text((MARGIN, height - MARGIN - 24 * (len(lines) - i)), line, fill=SOFT, font=_font(16))
    _save(path, sheet)


def _rows_in_a_block(rows: int, width: int, height: int) -> int:
    """How many rows of a height stand above each other where blocks of a width make a sheet no taller than broad."""
    blocks = 1
    while math.ceil(rows / blocks) * height > 1.2 * blocks * width and blocks < rows:
        blocks += 1
    return math.ceil(rows / blocks)


def shown_seeds(prompts: int, seeds: int) -> int:
    """How many seeds of each prompt the comparison has room for."""
    return max(1, min(seeds, ROWS // max(1, prompts)))


def similarity_note(similarity: float | None) -> tuple[str, bool]:
    """What stands under an image, and whether it is a copy."""
    if similarity is None:
        return "", False
    return f"{similarity:.2f}".replace("-", "−"), similarity > MEMORIZED


def table_head(name: str, summary: Mapping[str, object]) -> tuple[str, str]:
    """A guidance's column head: its name, its copies and what was withheld."""
    words = []
    if summary["copies"] is not None:
        words.append(f"{summary['copies']} of {summary['images']} copies")
    if summary["withheld"]:
        words.append(f"{summary['withheld']} withheld")
    return name, ", ".join(words)


def wrapped(text: str, width: int, lines: int) -> str:
    """``text`` in at most so many lines of so many characters."""
    return "\n".join(textwrap.wrap(text, width, max_lines=lines, placeholder=" …"))


def _draw_cell(sheet: Image.Image, draw: ImageDraw.ImageDraw, left: int, top: int, cell: Cell) -> None:
    if cell.withheld:
        sheet.paste(_withheld(CELL, 20), (left, top))
    elif cell.image is not None:
        tile = _thumbnail(cell.image, CELL)
        place = (left + (CELL - tile.width) // 2, top + (CELL - tile.height) // 2)
        sheet.paste(tile, place)
        if cell.marked:
            box = (place[0] - 1, place[1] - 1, place[0] + tile.width, place[1] + tile.height)
            draw.rectangle(box, outline=COPY, width=4)
    ink = COPY if cell.marked else SOFT
    draw.text((left + CELL // 2, top + CELL + 3), cell.note, fill=ink, font=_font(17), anchor="ma")


def _thumbnail(path: Path, side: int) -> Image.Image:
    thumbnail = decode_image(path.read_bytes())
    scale = side / max(thumbnail.size)
    size = [max(1, round(length * scale)) for length in thumbnail.size]
    return thumbnail.resize(size, Image.Resampling.LANCZOS)


def _withheld(side: int, size: int) -> Image.Image:
    tile = Image.new("RGB", (side, side), TILE)
    ImageDraw.Draw(tile).text((side / 2, side / 2), "withheld", fill=SOFT, font=_font(size), anchor="mm")
    return tile


def _fitting(draw: ImageDraw.ImageDraw, text: str, size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """The largest font up to ``size`` in which ``text`` is no wider than its column."""
    while size > 8 and draw.textlength(text, _font(size, bold)) > CELL + GAP - 4:
        size -= 1
    return _font(size, bold)


@cache
def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, as matplotlib brings it: captions are in many alphabets."""
    import matplotlib

    file = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"DejaVuSans{'-Bold' if bold else ''}.ttf"
    return ImageFont.truetype(str(file), size)


def _save(path: Path, image: Image.Image) -> None:
    with write_atomic(path) as temporary:
        image.save(temporary, format="PNG")

