"""The evaluation's report: one self-contained page, and its figure as a PNG.

The figure tells the story at a look: rows = the originals and one row a setting, columns = captions; an image
that the independent judge counts as a copy has a red frame. Below it the conclusion in plain words, computed
from the numbers, and the table.
"""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageDraw, ImageFont

from curate.console import write_atomic

if TYPE_CHECKING:
    from train.evaluation.drawn import Drawn, Measured

MODELS = {"raw": "raw model", "curated": "curated and filtered model"}
GUIDANCES = {"none": "", "amg": "AMG", "amg-strong": "strong AMG"}
PROMPTS = {"repeated": "repeated captions", "held_out": "held-out captions"}


@dataclass(frozen=True)
class Column:
    """One column of the table."""

    key: str
    title: str
    explanation: str
    form: str = "number"
    """``share`` (with a bar), ``number``, ``rank`` or ``seconds``."""
    better: int = 0
    """-1 where lower is better, 1 where higher is, 0 where neither."""


COLUMNS = (
    Column(
        "memorized_share",
        "memorized",
        "Share of images whose nearest training image is above 0.5 by the copy detector, on SSCD’s scale. "
        "Guidance steers by this detector, so under guidance it is no independent evidence.",
        "share",
        -1,
    ),
    Column(
        "copied_share",
        "copied (independent judge)",
        "Share of images that a dual encoder which nothing optimises holds for copies: nearer to a training "
        "image than 99 % of the held-out images are.",
        "share",
        -1,
    ),
    Column(
        "pixel_copied_share",
        "copied (pixels)",
        "Share of images whose 16 × 16 pixels correlate above 0.9 with a training image.",
        "share",
        -1,
    ),
    Column(
        "similarity",
        "similarity",
        "Mean similarity to the nearest training image, on SSCD’s scale.",
        better=-1,
    ),
    Column(
        "similarity_among_seeds",
        "among seeds",
        "Mean similarity of images drawn for one caption from different noises: a memorized caption draws one image.",
        better=-1,
    ),
    Column(
        "alignment",
        "alignment",
        "Mean cosine of image and caption in the dual encoder’s joint space.",
        better=1,
    ),
    Column(
        "retrieval_rank",
        "caption rank",
        "Median rank of the image’s own caption among all captions at hand, under the dual encoder.",
        "rank",
        -1,
    ),
    Column(
        "quality",
        "Fréchet distance",
        "Fréchet distance to the held-out images on the dual encoder’s image features (not Inception’s; "
        "comparable only between rows with equally many images of the same captions).",
        better=-1,
    ),
    Column("seconds_per_image", "s / image", "Seconds per image on the machine that drew them.", "seconds", -1),
)


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


def name_of(model: str, guidance: str) -> str:
    """How a setting is called in the report: ``raw model with AMG``."""
    model = MODELS.get(model, f"model {model}" if len(model) < 3 else model)
    guidance = GUIDANCES.get(guidance, guidance)
    return f"{model} with {guidance}" if guidance else model


def story(
    prompts: str,
    drawn: Sequence[Drawn],
    results: Sequence[Measured],
    originals: Mapping[str, Image.Image],
    *,
    columns: int = 8,
) -> Figure:
    """The figure for one kind of prompts: the first captions in the order drawn, each setting's first seed.

    Nothing is picked by its outcome.

    Args:
        prompts: kind of prompts, as ``repeated``.
        drawn: all settings.
        results: their measurements, in the same order.
        originals: training (or held-out) image of a caption, where there is one.
        columns: captions shown.
    """
    chosen = [(one, result) for one, result in zip(drawn, results, strict=True) if one.prompts == prompts]
    captions = list(dict.fromkeys(caption for one, _ in chosen[:1] for caption in one.captions))[:columns]
    rows: list[tuple[str, str, Sequence[Cell]]] = []
    if any(caption in originals for caption in captions):
        rows.append(("originals", "", [Cell(originals.get(caption)) for caption in captions]))
    for one, result in chosen:
        first = {caption: i for i, caption in reversed(list(enumerate(one.captions)))}
        cells = []
        for caption in captions:
            i = first.get(caption)
            if i is None:
                cells.append(Cell(None))
            else:
                note = f"similarity {result.similarity[i]:.2f}, judge {result.judged[i]:.2f}"
                cells.append(Cell(one.images[i], bool(result.copied[i]), note))
        rows.append((name_of(one.model, one.guidance), f"{percent(result.row['copied_share'])} copied", cells))
    return Figure(PROMPTS.get(prompts, prompts), captions, rows)


def headline(rows: Sequence[Mapping[str, Any]]) -> str:
    """The shares of copies of the first kind of prompts, in one sentence."""
    kind = rows[0]["prompts"]
    shares = [
        f"{name_of(row['model'], row['guidance'])} {percent(row['copied_share'])}"
        for row in rows
        if row["prompts"] == kind
    ]
    return (
        f"Copies of training images among what is drawn for {PROMPTS.get(kind, kind)}, "
        f"by a judge that nothing optimises: {', '.join(shares)}."
    )


def conclude(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the numbers say, in sentences; the first setting is what the others are compared with."""
    sentences = []
    kinds = list(dict.fromkeys(row["prompts"] for row in rows))
    for kind in kinds:
        first, *others = [row for row in rows if row["prompts"] == kind]
        words, base = PROMPTS.get(kind, kind), name_of(first["model"], first["guidance"])
        if kind == "held_out":
            for row in others:
                alignment = _compared("alignment", first["alignment"], row["alignment"], 1)
                quality = _compared("Fréchet distance", first["quality"], row["quality"], -1)
                sentences.append(
                    f"On {words}, never trained on, the {name_of(row['model'], row['guidance'])} has "
                    f"{alignment} and {quality}, compared with the {base}."
                )
            continue
        sentences.append(
            f"For {words}, {percent(first['copied_share'])} of what the {base} draws are copies of training "
            f"images by the independent judge, and {percent(first['memorized_share'])} by the copy detector."
        )
        for row in others:
            name, alignment = name_of(row["model"], row["guidance"]), row["alignment"]
            sentences.append(
                f"The {name} copies {percent(row['copied_share'])} by the judge and "
                f"{percent(row['memorized_share'])} by the copy detector; "
                f"{_compared('alignment', first['alignment'], alignment, 1)}."
            )
    return sentences


def _compared(name: str, before: float, after: float, better: int) -> str:
    if not (math.isfinite(before) and math.isfinite(after)) or before == 0:
        return f"{name} {number(after)}"
    change = (after - before) / abs(before)
    if abs(change) < 0.005:
        return f"the same {name} ({number(after)})"
    verdict = "better" if change * better > 0 else "worse"
    return f"{100 * abs(change):.0f} % {verdict} {name} ({number(after)} against {number(before)})"


def percent(share: float) -> str:
    """``0.0417`` → ``4 %``; what is not nothing is not called 0 %."""
    if not math.isfinite(share):
        return "–"
    if 0 < share < 0.005 or 0.995 < share < 1:
        return f"{100 * share:.1f} %"
    return f"{100 * share:.0f} %"


def number(value: float) -> str:
    """Three significant digits."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def write_report(
    out: str | Path,
    rows: Sequence[Mapping[str, Any]],
    figures: Sequence[Figure],
    *,
    title: str,
    settings: Mapping[str, Any] | None = None,
    links: Mapping[str, str] | None = None,
) -> Path:
    """Write ``report.html`` and ``figure.png`` (the first figure) into ``out``.

    The page holds everything it shows; captions and names are escaped.

    Args:
        out: folder.
        rows: of the table (see :func:`~train.evaluation.protocol.evaluate_images`).
        figures: the first one leads the page.
        title: of the page.
        settings: listed at the end.
        links: further files to point to, as ``{"what curation dropped": "curated/report.html"}``.

    Returns:
        Path of the page.
    """
    out = Path(out)
    page = render(rows, figures, title=title, settings=settings or {}, links=links or {})
    with write_atomic(out / "report.html") as temporary:
        temporary.write_text(page, encoding="utf-8")
    if figures:
        picture = draw_figure(figures[0])
        with write_atomic(out / "figure.png") as temporary:
            picture.save(temporary, format="PNG", optimize=True)
    return out / "report.html"


# ------------------------------------------------------------------------------------------------- the page

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
td.share { background: linear-gradient(to right, var(--bar) var(--share), transparent var(--share)); }
td.best { color: var(--good); font-weight: 600; }
dt { font-weight: 600; margin-top: 8px; } dd { margin: 0; max-width: 78ch; color: var(--soft); }
details { margin-top: 28px; } summary { cursor: pointer; font-weight: 600; }
@media (max-width: 720px) { body { padding: 24px 16px; } }
"""


def render(
    rows: Sequence[Mapping[str, Any]],
    figures: Sequence[Figure],
    *,
    title: str,
    settings: Mapping[str, Any],
    links: Mapping[str, str],
) -> str:
    """The page as one string."""
    sentences = conclude(rows)
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escaped(title)}</title><style>{STYLE}</style></head><body>",
        f"<h1>{escaped(title)}</h1>",
    ]
    if rows:
        parts.append(f'<p class="soft">{escaped(headline(rows))}</p>')
    for position, figure in enumerate(figures):
        if position:
            parts.append(f"<h2>{escaped(figure.title[:1].upper() + figure.title[1:])}</h2>")
        parts.append(figure_html(figure))
        if position == 0:
            parts.append(
                '<p class="soft"><span class="key"></span> counted as a copy of a training image by the '
                "independent judge. The first captions in order and the same noise in every row; nothing is "
                "picked by its outcome. Point at an image for its numbers.</p>"
            )
            if sentences:
                parts.append("<h2>What the numbers say</h2><ul>")
                parts += [f"<li>{escaped(sentence)}</li>" for sentence in sentences]
                parts.append("</ul>")
            parts += ["<h2>The table</h2>", _table(rows)]
    if not figures:
        parts += ["<h2>The table</h2>", _table(rows)]
    if links:
        parts.append("<h2>More</h2><ul>")
        parts += [f'<li><a href="{escaped(href)}">{escaped(words)}</a></li>' for words, href in links.items()]
        parts.append("</ul>")
    parts.append("<details open><summary>How to read the columns</summary><dl>")
    parts += [f"<dt>{escaped(c.title)}</dt><dd>{escaped(c.explanation)}</dd>" for c in COLUMNS]
    parts.append("</dl></details>")
    if settings:
        parts.append("<details><summary>Settings</summary><dl>")
        parts += [f"<dt>{escaped(key)}</dt><dd>{escaped(str(value))}</dd>" for key, value in settings.items()]
        parts.append("</dl></details>")
    parts.append("</body></html>\n")
    return "\n".join(parts)


def escaped(value: str) -> str:
    """Text for a page."""
    return html.escape(str(value), quote=True)


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


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    parts = ['<div class="scroll"><table><thead><tr><th>setting</th>']
    parts += [f'<th title="{escaped(column.explanation)}">{escaped(column.title)}</th>' for column in COLUMNS]
    parts.append("</tr></thead><tbody>")
    for kind in dict.fromkeys(row["prompts"] for row in rows):
        group = [row for row in rows if row["prompts"] == kind]
        counts = sorted({row["images"] for row in group if "images" in row})
        images = f", {'/'.join(map(str, counts))} images a row" if counts else ""
        words = PROMPTS.get(kind, kind)
        parts.append(f'<tr class="kind"><td colspan="{len(COLUMNS) + 1}">{escaped(words + images)}</td></tr>')
        best = {column.key: _best(group, column) for column in COLUMNS}
        for row in group:
            parts.append(f"<tr><td>{escaped(name_of(row['model'], row['guidance']))}</td>")
            parts += [_td(row.get(column.key), column, best[column.key]) for column in COLUMNS]
            parts.append("</tr>")
    parts.append("</tbody></table></div>")
    return "\n".join(parts)


def _best(group: Sequence[Mapping[str, Any]], column: Column) -> float | None:
    """The best value of a column, where there is something to compare."""
    values = [row[column.key] for row in group if row.get(column.key) is not None]
    values = [value for value in values if math.isfinite(value)]
    if len(set(values)) < 2 or not column.better:
        return None
    return max(values) if column.better > 0 else min(values)


def _td(value: float | None, column: Column, best: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "<td>–</td>"
    kinds = ["share"] * (column.form == "share") + ["best"] * (best is not None and value == best)
    kind = f' class="{" ".join(kinds)}"' if kinds else ""
    if column.form == "share":
        return f'<td{kind} style="--share: {100 * min(max(value, 0), 1):.1f}%">{percent(value)}</td>'
    return f"<td{kind}>{f'{value:.0f}' if column.form == 'rank' else number(value)}</td>"


# --------------------------------------------------------------------------------- the figure as PNG


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
