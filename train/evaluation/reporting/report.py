"""The evaluation's report: one self-contained page, and its figure as a PNG.

The figure tells the story at a look: rows = the originals and one row a setting, columns = captions; an image
that the independent judge counts as a copy has a red frame. Below it the conclusion in plain words, computed
from the numbers, and the table.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from afresh.files import write_atomic
from train.evaluation.reporting.conclusions import PROMPTS, conclude, headline, name_of, number
from train.evaluation.reporting.figure import STYLE, Cell, Figure, draw_figure, escaped, figure_html, percent

if TYPE_CHECKING:
    from train.evaluation.judging.drawn import Drawn, Measured


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
        rows: of the table (see :func:`~train.evaluation.judging.measuring.evaluate_images`).
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

