"""The table as files: CSV and JSON for programs, Markdown and LaTeX for papers; and what it rests on, by image."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from afresh.errors import printable
from afresh.files import write_atomic, write_json
from afresh.summaries import format_summary
from train.evaluation.judging.drawn import Drawn, Measured
from train.evaluation.metrics.protocol import Column
from train.evaluation.reporting.conclusions import PROMPTS, name_of, number
from train.evaluation.reporting.figure import percent

Row = Mapping[str, Any]
NOTE = (
    "In brackets 95 % intervals over prompts (bootstrap; of shares that rest on fewer than 5 prompts exact binomial). "
    "Bold: better than every other row of the part, and no interval touches. Real images: the originals of the prompts."
)
LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}", "’": "'",
}  # fmt: skip


class Compared(dict[str, Any]):
    """The job's summary, which a terminal shows with a column a setting.

    Args:
        summary: with ``rows`` and ``real``, and whatever else.
        columns: of the table.
    """

    def __init__(self, summary: Mapping[str, Any], columns: Sequence[Column]):
        super().__init__(summary)
        self._columns = columns

    def view(self, colour: bool = False) -> str:
        """The tables and, below, what else there is; ``colour`` marks the best that are beyond the intervals."""
        columns = shown(self._columns, self["rows"])
        blocks = []
        for kind, settings, originals in parts(self["rows"], self["real"]):
            group = [*settings, *originals]
            lines = [["", *(printable(name_of(row["model"], row["guidance"])) for row in group)]]
            marked = [[False] * len(lines[0])]
            for column in columns:
                lines.append([printable(column.title), *(" ".join(cell(row, column)).strip() for row in group)])
                marked.append([False, *clear_best(settings, column), *(False for _ in originals)])
            widths = [max(len(line[i]) for line in lines) for i in range(len(group) + 1)]
            blocks.append(printable(PROMPTS.get(kind, kind) + _counted(settings)))
            for line, marks in zip(lines, marked, strict=True):
                cells = []
                for words, width, mark in zip(line, widths, marks, strict=True):
                    gap = " " * (width - len(words))
                    cells.append((f"\033[1m{words}\033[0m" if mark and colour else words) + gap)
                blocks.append("  ".join(cells).rstrip())
            blocks.append("")
        rest = {key: value for key, value in self.items() if key not in ("rows", "real") and value not in (None, {})}
        return "\n".join([*blocks, format_summary(rest)])


def write_tables(out: str | Path, rows: Sequence[Row], real: Sequence[Row], columns: Sequence[Column]) -> None:
    """``table.csv``, ``table.json``, ``table.md`` and ``table.tex``.

    Args:
        out: folder.
        rows: of the settings.
        real: of the prompts' originals.
        columns: those that no row has are left out.
    """
    out = Path(out)
    write_json(out / "table.json", {"rows": list(rows), "real": list(real)})
    text = io.StringIO()
    names = list(dict.fromkeys(name for row in [*rows, *real] for name in row))
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows([*rows, *real])
    for name, content in (
        ("table.csv", text.getvalue()),
        ("table.md", markdown(rows, real, columns)),
        ("table.tex", latex(rows, real, columns)),
    ):
        with write_atomic(out / name) as temporary:
            temporary.write_text(content, encoding="utf-8")


def write_images(out: str | Path, drawn: Sequence[Drawn], results: Sequence[Measured]) -> None:
    """``images.parquet``: a row an image, with its setting, caption and number, and what each metric says of it."""
    import pyarrow
    import pyarrow.parquet

    rows = [
        {"model": one.model, "guidance": one.guidance, "prompts": one.prompts, "image": i, "caption": one.captions[i]}
        | {key: values[i].item() for key, values in result.images.items()}
        for one, result in zip(drawn, results, strict=True)
        for i in range(len(one.images))
    ]
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = pyarrow.table({name: [row.get(name) for row in rows] for name in names})
    with write_atomic(Path(out) / "images.parquet") as temporary:
        pyarrow.parquet.write_table(table, temporary)


def parts(rows: Sequence[Row], real: Sequence[Row]) -> list[tuple[str, list[Row], list[Row]]]:
    """The table's parts: ``(kind of prompts, its settings, its real images)``."""
    kinds = dict.fromkeys(row["prompts"] for row in rows)
    return [(kind, *([row for row in some if row["prompts"] == kind] for some in (rows, real))) for kind in kinds]


def shown(columns: Sequence[Column], rows: Sequence[Row]) -> list[Column]:
    """The columns that any row has."""
    return [column for column in columns if any(column.key in row for row in rows)]


def clear_best(group: Sequence[Row], column: Column) -> list[bool]:
    """Of each row whether it has the best value of a column, and no row of another value has an interval that touches
    its own.
    """
    low, high = f"{column.key}_low", f"{column.key}_high"
    none = [False] * len(group)
    known = [row for row in group if _known(row.get(column.key)) and _known(row.get(low)) and _known(row.get(high))]
    values = [row[column.key] for row in known]
    if not column.better or len(set(values)) < 2:
        return none
    best = max(values) if column.better > 0 else min(values)
    ours = [row for row in known if row[column.key] == best]
    others = [row for row in known if row[column.key] != best]
    if any(row[low] <= other[high] and other[low] <= row[high] for row in ours for other in others):
        return none
    return [any(row is one for one in ours) for row in group]


def cell(row: Row, column: Column) -> tuple[str, str]:
    """A number and its interval in brackets, as words; the second is empty where there is none."""
    value: Any = row.get(column.key)
    if not _known(value):
        return "–", ""
    limits: list[Any] = [end for end in (row.get(f"{column.key}_low"), row.get(f"{column.key}_high")) if _known(end)]
    ends = [f"{100 * end:.0f}" if column.form == "share" else number(end) for end in limits]
    words = {"share": percent, "rank": lambda rank: f"{rank:.0f}"}.get(column.form, number)(value)
    return words, f"[{', '.join(ends)}]" if len(ends) == 2 else ""


def markdown(rows: Sequence[Row], real: Sequence[Row], columns: Sequence[Column]) -> str:
    """The table as Markdown, a table a kind of prompts."""
    columns = shown(columns, rows)
    lines = []
    for kind, settings, originals in parts(rows, real):
        best = {column.key: clear_best(settings, column) for column in columns}
        lines += [f"**{_plain(PROMPTS.get(kind, kind))}**{_counted(settings)}", ""]
        lines += ["| " + " | ".join(["setting", *(_plain(column.title) for column in columns)]) + " |"]
        lines += ["|---" * (len(columns) + 1) + "|"]
        for i, row in enumerate([*settings, *originals]):
            cells = []
            for column in columns:
                value, ends = cell(row, column)
                bold = i < len(settings) and best[column.key][i]
                cells.append(f"**{value}** {ends}".strip() if bold else f"{value} {ends}".strip())
            lines.append("| " + " | ".join([_plain(name_of(row["model"], row["guidance"])), *cells]) + " |")
        lines.append("")
    return "\n".join([*lines, NOTE, "", *(f"- *{_plain(c.title)}*: {c.explanation}" for c in columns), ""])


def latex(rows: Sequence[Row], real: Sequence[Row], columns: Sequence[Column]) -> str:
    r"""The table as LaTeX, to be taken in by ``\input``."""
    columns = shown(columns, rows)
    width = len(columns) + 1
    lines = [
        r"% needs \usepackage{booktabs}",
        r"\begin{table*}",
        r"\centering\footnotesize\setlength{\tabcolsep}{3pt}",
        rf"\begin{{tabular}}{{l*{{{len(columns)}}}{{r}}}}",
        r"\toprule",
        " & ".join(["", *(_tex(column.title) for column in columns)]) + r" \\",
    ]
    for kind, settings, originals in parts(rows, real):
        best = {column.key: clear_best(settings, column) for column in columns}
        title = _tex(PROMPTS.get(kind, kind) + _counted(settings))
        lines += [r"\midrule", rf"\multicolumn{{{width}}}{{l}}{{\emph{{{title}}}}} \\"]
        for i, row in enumerate([*settings, *originals]):
            names, ends = [_tex(name_of(row["model"], row["guidance"]))], [""]
            for column in columns:
                value, span = (_tex(words) for words in cell(row, column))
                names.append(rf"\textbf{{{value}}}" if i < len(settings) and best[column.key][i] else value)
                ends.append(rf"\scriptsize {span}" if span else "")
            lines.append(" & ".join(names) + r" \\")
            if any(ends):
                lines.append(" & ".join(ends) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}", rf"\caption{{{_tex(NOTE)}}}", r"\end{table*}"]
    return "\n".join(lines) + "\n"


def _counted(group: Sequence[Row]) -> str:
    counts = sorted({row["images"] for row in group if "images" in row})
    return f", {'/'.join(map(str, counts))} images a row" if counts else ""


def _known(value: Any) -> bool:
    return value is not None and math.isfinite(value)


def _plain(text: str) -> str:
    """Text inside a Markdown table."""
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("*", "\\*").replace("<", "&lt;")


def _tex(text: str) -> str:
    return "".join(LATEX.get(letter, letter) for letter in " ".join(text.split()))
