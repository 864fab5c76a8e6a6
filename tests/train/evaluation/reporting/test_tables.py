"""The table as files: every number with its interval, bold only beyond the intervals of all others."""

from __future__ import annotations

import csv
import json
import re

import numpy as np
import pyarrow.parquet as parquet
import pytest

from afresh.summaries import as_json, as_text
from train.evaluation.metrics.protocol import Column
from train.evaluation.metrics.registry import METRICS, columns_of
from train.evaluation.reporting.tables import Compared, clear_best, latex, markdown, write_images, write_tables

LESS = Column("loss", "loss", "Less is better.", better=-1)
COLUMNS = columns_of(list(METRICS.values()))


def row(value: float, low: float, high: float, model: str = "a", key: str = "loss") -> dict:
    ends = {key: value, f"{key}_low": low, f"{key}_high": high}
    return {"model": model, "guidance": "none", "prompts": "x", "images": 8, **ends}


@pytest.mark.parametrize(
    ("rows", "bold"),
    [
        ([(1, 0, 2), (5, 4, 6), (9, 8, 9)], [True, False, False]),
        ([(1, 0, 4.5), (5, 4, 6), (9, 8, 9)], [False, False, False]),  # touches the second
        ([(0, 0, 1), (0, 0, 2), (9, 8, 9)], [True, True, False]),  # equal, and both beyond the third
        ([(0, 0, 1), (0, 0, 8.5), (9, 8, 9)], [False, False, False]),
        ([(1, 0, 2), (1, 0, 2)], [False, False]),  # nothing to compare
        ([(1, np.nan, np.nan), (5, np.nan, np.nan)], [False, False]),  # no intervals
    ],
)
def test_the_best_is_marked_only_beyond_the_intervals_of_every_other_row(rows, bold):
    assert clear_best([row(*numbers) for numbers in rows], LESS) == bold


def test_a_column_without_a_better_and_a_row_without_the_column_are_not_marked():
    rows = [row(1, 0, 2), row(5, 4, 6)]
    assert clear_best(rows, Column("loss", "", "")) == [False, False]
    assert clear_best([{"model": "a"}, *rows], LESS) == [False, True, False]


@pytest.fixture
def written(results, tmp_path):
    rows = [measured.row for measured in results[1]]
    real = [{**rows[0], "model": "real images"}]
    write_tables(tmp_path, rows, real, COLUMNS)
    return tmp_path, rows, real


def test_the_csv_and_the_json_hold_every_number(written):
    folder, rows, real = written
    stored = json.loads((folder / "table.json").read_text())
    assert stored["rows"][1]["model"] == "curated" and stored["real"][0]["model"] == "real images"
    with open(folder / "table.csv", newline="") as file:
        read = list(csv.DictReader(file))
    assert [row["model"] for row in read] == ["raw", "curated", "raw", "real images"]
    for key in ("copied_share", "alignment_low", "imagenet_distance_high"):
        assert [float(row[key]) for row in read[:3]] == [row[key] for row in rows]


def test_markdown_has_a_row_a_setting_and_an_interval_a_number(written):
    folder, rows, _ = written
    text = (folder / "table.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1  # every line has every column
    (first, *_) = [line for line in lines if line.startswith("| raw model |")]
    share, low, high = (100 * rows[0][f"copied_share{end}"] for end in ("", "_low", "_high"))
    assert re.search(rf"{share:.0f} %\**  ?\[{low:.0f}, {high:.0f}\]|{share:.0f} %\** \[{low:.0f}, {high:.0f}\]", first)
    assert sum(line.startswith("| real images |") for line in lines) == 1
    assert "copied (SSCD)" not in text  # which nothing measured


def test_latex_is_balanced_and_escapes_what_latex_takes_for_commands():
    rows = [row(0.5, 0.4, 0.6, model="50%_{a}\\b#&$~^", key="copied_share")]
    text = latex(rows, [], COLUMNS)
    assert r"50\%\_\{a\}\textbackslash{}b\#\&\$\textasciitilde{}\textasciicircum{}" in text
    assert r"50 \%" in text and r"\scriptsize [40, 60]" in text
    bare = text.replace("\\\\", "").replace(r"\{", "").replace(r"\}", "")
    assert bare.count("{") == bare.count("}")
    assert re.findall(r"\\begin\{(.+?)\}", text) == ["table*", "tabular"]
    widths = {line.count(" & ") for line in text.splitlines() if line.endswith(r"\\") and "multicolumn" not in line}
    assert widths == {1}  # the setting, and the one column that there is


def test_a_terminal_shows_a_column_a_setting_and_then_the_rest(results):
    rows = [measured.row for measured in results[1]]
    summary = Compared({"rows": rows, "real": [], "copy_threshold": None, "report": "out/report.html"}, COLUMNS)
    assert json.loads(as_json(summary))["rows"][0]["model"] == "raw"
    text = as_text(summary)
    first, heads, *lines = text.splitlines()
    assert first == "repeated captions, 48 images a row"
    assert heads.split("  ", 1)[1].split("   ")[-1].strip() == "curated model"
    (copied,) = [line for line in lines[: lines.index("")] if line.startswith("copied (pixels)")]
    ends = [100 * rows[1][f"pixel_copied_share{end}"] for end in ("", "_low", "_high")]
    assert copied.endswith("{:.0f} % [{:.0f}, {:.0f}]".format(*ends))
    assert text.endswith("report  out/report.html") and "copy_threshold" not in text
    marked = summary.view(colour=True)
    assert "\033[1m" in marked and marked.replace("\033[1m", "").replace("\033[0m", "") == text
    hostile = Compared({"rows": [row(1, 0, 2, model="a\x1b[31m")], "real": []}, [LESS])
    assert "\x1b[31m" not in hostile.view()


def test_markdown_names_hold_no_cell_ends():
    text = markdown([row(1, 0, 2, model="a|b*<i>")], [], [LESS])
    assert r"| a\|b\*&lt;i> |" in text


def test_what_the_table_rests_on_is_kept_image_by_image(results, tmp_path):
    drawn, measured = results
    write_images(tmp_path, drawn, measured)
    table = parquet.read_table(tmp_path / "images.parquet").to_pylist()
    assert len(table) == sum(len(one.images) for one in drawn)
    first = [one for one in table if (one["model"], one["prompts"]) == ("raw", "repeated")]
    assert [one["caption"] for one in first] == list(drawn[0].captions)
    assert np.mean([one["copied_share"] for one in first]) == measured[0].row["copied_share"]
    assert np.mean([one["similarity"] for one in first]) == pytest.approx(measured[0].row["similarity"])
