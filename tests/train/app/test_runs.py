"""The tab Runs: logs that are being written, tables, figures."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from afresh.errors import UsageError
from train.app.runs import chosen, figures_of, find_runs, log_lines, progress_of, tables_of

LINE = {"step": 10, "loss": 0.5, "kept": 12, "dropped": 4, "judged": 8, "magnitude": 1.25, "learning_rate": 1e-4}


def write_log(folder, *lines: object, tail: str = "") -> None:
    folder.mkdir(parents=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)


def test_runs_that_go_on_stand_first_and_hidden_folders_and_links_nowhere(tmp_path):
    write_log(tmp_path / "done", LINE)
    (tmp_path / "done" / "summary.json").write_text("{}")
    write_log(tmp_path / "deep" / "going", LINE)
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "table.md").write_text("| a |\n|---|\n| 1 |\n")
    write_log(tmp_path / ".hidden", LINE)
    (tmp_path / "link").symlink_to(tmp_path / "done")
    (tmp_path / "empty").mkdir()
    assert [run.name for run in find_runs(tmp_path)] == ["deep/going", "eval", "done"]
    assert chosen(tmp_path, "eval").path == tmp_path / "eval"
    for name in ("../..", "/etc", "empty", ".hidden"):
        with pytest.raises(UsageError):
            chosen(tmp_path, name)


def test_a_log_is_read_while_it_is_written(tmp_path):
    write_log(tmp_path / "run", LINE, LINE | {"step": 20, "loss": 0.25, "magnitude": None}, tail='{"step": 30, "lo')
    (tmp_path / "run" / "run.json").write_text('{"steps": 40}')
    found = progress_of(chosen(tmp_path, "run"))
    assert found is not None and (found["step"], found["planned"], found["finished"]) == (20, 40, False)
    assert found["loss"] == [(10, 0.5), (20, 0.25)] and found["dropped"] == [(10, 0.25), (20, 0.25)]
    assert found["magnitude"] == [(10, 1.25)]


def test_lines_of_a_log_that_are_no_lines_are_passed_over(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'[1]\n{"step": "x"}\n\xff\xfe\n{"step": 1, "loss": 2.0}\nnull\n')
    assert log_lines(path) == [{"step": 1, "loss": 2.0}]
    assert log_lines(tmp_path / "nothing") is None


def test_tables_come_with_their_titles_and_what_is_bold(tmp_path):
    text = "**held-out captions**, 2 images\n\n| setting | a \\| b |\n|---|---|\n"
    text += "| raw | **0.5** [0, 1] |\n| <b> | – |\n\nnote\n"
    (tmp_path / "table.md").write_text(text)
    (table,) = tables_of(chosen(tmp_path, "."))
    assert table["title"] == "held-out captions, 2 images" and table["head"] == ["setting", "a | b"]
    assert table["rows"] == [[("raw", False), ("0.5 [0, 1]", True)], [("<b>", False), ("–", False)]]


def test_figures_that_cannot_be_read_are_left_out(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "figure.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    assert [name for name, _ in figures_of(chosen(tmp_path, "."))] == ["figure.png"]


def test_a_folder_of_drawn_images_shows_its_sheets_alone(tmp_path):
    for name in ("grid", "00000-cat-s0"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    (tmp_path / "samples.parquet").write_bytes(b"")
    assert [name for name, _ in figures_of(chosen(tmp_path, "."))] == ["grid.png"]
