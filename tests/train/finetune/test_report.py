"""The page over a run: at a checkpoint and at the end, with what happened on it."""

from __future__ import annotations

import re

import torch

from curate.reading.writing import write_shard
from curate.sample_set import load_part
from tests.afresh.test_pages import Parts
from tests.train.finetune.runs import settings, stop_after
from train.cli import main
from train.finetune.config import FilterConfig, ValidationConfig
from train.finetune.filter.table import VerdictTable
from train.finetune.loop import run_finetune

NASTY = "<b>a cat</b> \x1b[31m\u202e"


def test_a_run_has_a_page_from_its_first_checkpoint_on(model, tmp_path, monkeypatch):
    (tmp_path / "shards").mkdir()
    samples = [(sample.key, dict(sample.members) | {"txt": NASTY.encode()}) for sample in load_part("finetune")[:4]]
    write_shard(str(tmp_path / "shards" / "0.tar"), samples)
    out = tmp_path / "runs" / "one"
    config = settings(
        model, str(tmp_path / "shards"), out, caption_dropout=0.0, filter=FilterConfig("every_step", threshold=1e-9),
        validation=ValidationConfig(every=2, prompts=["<i>a dog</i>"], steps=2),
    )  # fmt: skip
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        run_finetune(config)
    page = Parts((out / "report.html").read_text(encoding="utf-8"))
    assert "2 of 4 steps, not finished" in page.words
    run_finetune(config)
    text = (out / "report.html").read_text(encoding="utf-8")
    page = Parts(text)
    assert "4 of 4 steps." in page.words and "b" not in page.tags and "i" not in page.tags
    assert page.words.count("<b>a cat</b> \\x1b[31m\\u202e") == 4 and "<i>a dog</i>" in page.words
    assert not re.search("[\x00-\x08\x0b-\x1f\u202e]", text)
    assert len(page.links) == 4 + 2 and all(link.startswith("data:image/") for link in page.links)
    assert page.tags.count("svg") == 2
    assert main(["reports", str(tmp_path / "runs")]) == 0
    assert Parts((tmp_path / "runs" / "index.html").read_text(encoding="utf-8")).links == ["one/report.html"]


def test_a_page_that_cannot_be_written_does_not_end_the_run(model, shards, tmp_path, capsys):
    config = settings(model, shards, tmp_path / "run", steps=1)
    (tmp_path / "run" / "report.html" / "in the way").mkdir(parents=True)
    assert run_finetune(config)["steps"] == 1
    assert "report.html: the page could not be written" in capsys.readouterr().err


def test_the_samples_that_were_left_out_most_often_are_found():
    table = VerdictTable(6)
    for row, times in ((4, 3), (1, 5), (2, 0), (5, 1)):
        for visit in range(6):
            dropped = torch.tensor([visit < times])
            table.record(torch.tensor([row]), torch.tensor([9]), torch.tensor([2.0 + row]), dropped, dropped)
    assert table.most_dropped(2) == [(1, 5, 3.0), (4, 3, 6.0)]
    assert [row for row, *_ in table.most_dropped(10)] == [1, 4, 5]
    assert VerdictTable(6, judges=False).most_dropped(3) == []
