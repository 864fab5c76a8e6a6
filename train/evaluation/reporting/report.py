"""The evaluation's report: one self-contained page, and its figure as a PNG.

The figure tells the story at a look: rows = the originals and one row a setting, columns = captions; an image
that the independent judge counts as a copy has a red frame. Below it the conclusion in plain words, computed
from the numbers, and the table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from afresh.files import write_atomic
from train.evaluation.metrics.protocol import Column
from train.evaluation.reporting.conclusions import JUDGES, PROMPTS, conclude, headline, name_of
from train.evaluation.reporting.figure import STYLE, Cell, Figure, draw_figure, escaped, figure_html, percent
from train.evaluation.reporting.tables import NOTE, cell, clear_best, parts, shown

if TYPE_CHECKING:
    from train.evaluation.judging.drawn import Drawn, Measured


SAID = {"similarity": "similarity", "judged": "judge", "sscd": "SSCD", "imagenet": "ImageNet", "pixel": "pixels"}
"""Numbers of an image that its cell in the figure tells, and what they are called there."""


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
        judge = next((key for key in JUDGES if key in result.row), None)
        cells = []
        for caption in captions:
            i = first.get(caption)
            if i is None:
                cells.append(Cell(None))
            else:
                said = [f"{words} {result.images[key][i]:.2f}" for key, words in SAID.items() if key in result.images]
                copied = judge is not None and bool(result.images[judge][i])
                cells.append(Cell(one.images[i], copied, ", ".join(said)))
        remark = f"{percent(result.row[judge])} copied" if judge else ""
        if (twin := result.row.get("same_as")) is not None:
            remark += f"{', ' * bool(remark)}the images of {name_of(one.model, twin)}"
        rows.append((name_of(one.model, one.guidance), remark, cells))
    return Figure(PROMPTS.get(prompts, prompts), captions, rows)


def write_report(
    out: str | Path,
    rows: Sequence[Mapping[str, Any]],
    figures: Sequence[Figure],
    *,
    title: str,
    columns: Sequence[Column],
    real: Sequence[Mapping[str, Any]] = (),
    settings: Mapping[str, Any] | None = None,
    links: Mapping[str, str] | None = None,
) -> Path:
    """Write ``report.html`` and ``figure.png`` (the first figure) into ``out``.

    The page holds everything it shows; captions and names are escaped.

    Args:
        out: folder.
        rows: of the table (see :func:`~train.evaluation.metrics.measuring.evaluate_images`).
        figures: the first one leads the page.
        title: of the page.
        columns: of the table; those that no row has are left out.
        real: rows of the prompts' originals.
        settings: listed at the end.
        links: further files to point to, as ``{"what curation dropped": "curated/report.html"}``.

    Returns:
        Path of the page.
    """
    out = Path(out)
    columns = shown(columns, rows)
    page = render(rows, figures, title=title, columns=columns, real=real, settings=settings or {}, links=links or {})
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
    columns: Sequence[Column],
    real: Sequence[Mapping[str, Any]],
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
            parts += ["<h2>The table</h2>", _table(rows, real, columns)]
    if not figures:
        parts += ["<h2>The table</h2>", _table(rows, real, columns)]
    if links:
        parts.append("<h2>More</h2><ul>")
        parts += [f'<li><a href="{escaped(href)}">{escaped(words)}</a></li>' for words, href in links.items()]
        parts.append("</ul>")
    parts.append("<details open><summary>How to read the columns</summary><dl>")
    parts += [f"<dt>{escaped(c.title)}</dt><dd>{escaped(c.explanation)}</dd>" for c in columns]
    parts.append("</dl></details>")
    if settings:
        parts.append("<details><summary>Settings</summary><dl>")
        parts += [f"<dt>{escaped(key)}</dt><dd>{escaped(str(value))}</dd>" for key, value in settings.items()]
        parts.append("</dl></details>")
    parts.append("</body></html>\n")
    return "\n".join(parts)


def _table(rows: Sequence[Mapping[str, Any]], real: Sequence[Mapping[str, Any]], columns: Sequence[Column]) -> str:
    lines = ['<div class="scroll"><table><thead><tr><th>setting</th>']
    lines += [f'<th title="{escaped(column.explanation)}">{escaped(column.title)}</th>' for column in columns]
    lines.append("</tr></thead><tbody>")
    for kind, group, originals in parts(rows, real):
        counts = sorted({row["images"] for row in group if "images" in row})
        images = f", {'/'.join(map(str, counts))} images a row" if counts else ""
        words = PROMPTS.get(kind, kind)
        lines.append(f'<tr class="kind"><td colspan="{len(columns) + 1}">{escaped(words + images)}</td></tr>')
        best = {column.key: clear_best(group, column) for column in columns}
        for i, row in enumerate([*group, *originals]):
            of_real = "" if i < len(group) else ' class="real"'
            lines.append(f"<tr{of_real}><td>{escaped(name_of(row['model'], row['guidance']))}</td>")
            lines += [_td(row, column, i < len(group) and best[column.key][i]) for column in columns]
            lines.append("</tr>")
    lines.append(f'</tbody></table></div><p class="soft">{escaped(NOTE)}</p>')
    return "\n".join(lines)


def _td(row: Mapping[str, Any], column: Column, best: bool) -> str:
    words, span = cell(row, column)
    if words == "–":
        return "<td>–</td>"
    kinds = ["share"] * (column.form == "share") + ["best"] * best
    kind = f' class="{" ".join(kinds)}"' if kinds else ""
    bar = f' style="--share: {100 * min(max(row[column.key], 0), 1):.1f}%"' if column.form == "share" else ""
    return f"<td{kind}{bar}>{words}{f'<span>{span}</span>' if span else ''}</td>"
