"""A caption that is not there is no caption: sets without captions are curated by their images, and said to be."""

from __future__ import annotations

import json

import pytest

from afresh.errors import UserError
from curate.check import run_check
from curate.config import CheckConfig, ReportConfig, SearchConfig
from curate.dedup import run_dedup
from curate.reading.writing import write_shard
from curate.report import run_report
from curate.results.ledger import read_ledger
from curate.sample_set import load_part
from curate.search import run_search
from tests.curate.made_mess import settings


@pytest.fixture
def images() -> list[bytes]:
    return [sample.image for sample in load_part("held_out")[:3]]


def test_a_set_without_captions_simply_works_and_says_so_in_a_line(tmp_path, images, capsys):
    a, b, c = images
    write_shard(tmp_path / "s.tar", [("a", {"png": a}), ("b", {"png": b, "json": b'{"n": 1}'}), ("c", {"png": a})])
    summary = run_dedup(settings(tmp_path / "s.tar", tmp_path / "out"))
    assert (summary["kept"], summary["dropped"], summary["unreadable"]) == (2, 1, 0)
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if "caption" in line] == [
        "no sample has a caption: the set is curated by its images alone"
    ]
    row = read_ledger(tmp_path / "out").to_pylist()[2]
    assert (row["reason"], row["caption"], row["caption_similarity"]) == ("exact_image", None, None)
    checked = run_check(CheckConfig(shards=[str(tmp_path / "s.tar")], workers=1))
    assert checked["readable"] == summary["samples"] == 3
    assert (checked["problems"], checked["listed"], checked.exit_code) == (0, [], 0)
    assert "(empty)" not in (tmp_path / "out" / "report.html").read_text()
    run_report(ReportConfig(out=str(tmp_path / "out")))


def test_search_does_not_take_a_missing_caption_for_a_word(tmp_path, images, run_cli):
    (tmp_path / "query.png").write_bytes(images[0])
    write_shard(tmp_path / "s.tar", [("a", {"png": images[0]}), ("b", {"png": images[1]})])
    run_dedup(settings(tmp_path / "s.tar", tmp_path / "out"))
    with pytest.raises(UserError, match="no sample of this set has one; search it by --image"):
        run_search(SearchConfig(out=str(tmp_path / "out"), caption="None"))
    found = run_search(SearchConfig(out=str(tmp_path / "out"), image=str(tmp_path / "query.png")))
    assert [row["caption"] for row in found["nearest"]] == [None, None]
    write_shard(tmp_path / "t.tar", [("a", {"png": images[0]}), ("b", {"png": images[1], "txt": b"a word or two"})])
    run_dedup(settings(tmp_path / "t.tar", tmp_path / "mixed", missing_caption="empty"))
    (nearest,) = run_search(SearchConfig(out=str(tmp_path / "mixed"), caption="None"))["nearest"]
    assert (nearest["key"], nearest["caption"]) == ("b", "a word or two")
    shown = run_cli("curate", "search", tmp_path / "out", "--image", tmp_path / "query.png")
    assert "None" not in shown.stdout


def test_where_some_have_captions_a_missing_one_is_a_loss_that_is_said(tmp_path, images, capsys):
    write_shard(tmp_path / "s.tar", [("a", {"png": images[0], "txt": b"words"}), ("b", {"png": images[1]})])
    run_dedup(settings(tmp_path / "s.tar", tmp_path / "out"))
    assert read_ledger(tmp_path / "out")["status"].to_pylist() == ["kept", "unreadable"]
    said = capsys.readouterr().err
    assert "1 samples cannot be read; 1 lack nothing but a caption: --missing_caption empty takes them" in said
    assert run_check(CheckConfig(shards=[str(tmp_path / "s.tar")], workers=1))["readable"] == 1


@pytest.mark.parametrize(
    ("members", "changes"),
    [
        ({"txt": "caption é".encode("cp1252")}, {}),
        ({"json": b"{"}, {}),
        ({"json": b'{"n": 1}'}, {"caption_field": "alt"}),
    ],
)
def test_captions_that_cannot_be_read_are_no_missing_ones_and_the_way_out_is_named(tmp_path, images, members, changes):
    write_shard(tmp_path / "s.tar", [("a", {"png": images[0], **members})])
    with pytest.raises(UserError, match="--missing_caption empty"):
        run_dedup(settings(tmp_path / "s.tar", tmp_path / "out", **changes))
    check = CheckConfig(shards=[str(tmp_path / "s.tar")], workers=1, **changes)
    assert run_check(check)["readable"] == 0
    assert run_dedup(settings(tmp_path / "s.tar", tmp_path / "out", missing_caption="empty", **changes))["kept"] == 1


def test_an_export_and_the_index_leave_it_absent(tmp_path, images):
    write_shard(tmp_path / "s.tar", [("a", {"png": images[0]})])
    run_dedup(settings(tmp_path / "s.tar", tmp_path / "out"))
    from curate.index.training_index import TrainingIndex

    index = TrainingIndex.load(tmp_path / "out")
    assert index.captions == [None] and index.counts.tolist() == [0]
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["settings"]["missing_caption"] == "auto"
