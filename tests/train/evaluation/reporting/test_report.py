"""The evaluation's page: safe, whole, nothing picked; and sentences that follow the numbers."""

from __future__ import annotations

import re

from PIL import Image

from tests.train.evaluation.pages import Page
from train.evaluation.metrics.registry import METRICS, columns_of
from train.evaluation.reporting.conclusions import conclude, headline
from train.evaluation.reporting.figure import Cell, Figure, percent
from train.evaluation.reporting.report import story, write_report

HOSTILE = '<script>alert("1")</script> & "quoted" face'
COLUMNS = columns_of(list(METRICS.values()))


def row(model: str, guidance: str, prompts: str, **values) -> dict:
    base = {
        "memorized_share": 0.8,
        "copied_share": 0.75,
        "pixel_copied_share": 0.7,
        "similarity": 0.6,
        "similarity_among_seeds": 0.5,
        "alignment": 0.4,
        "retrieval_rank": 3.0,
        "quality": 12.0,
        "seconds_per_image": 0.5,
        "images": 96,
    }
    return {"model": model, "guidance": guidance, "prompts": prompts, **base, **values}


def test_a_number_stands_in_the_page_with_its_interval_and_is_marked_only_beyond_those_of_the_others(tmp_path):
    near = {"alignment_low": 0.35, "alignment_high": 0.45}
    rows = [row("a", "none", "x", **near), row("b", "none", "x", alignment=0.43, alignment_low=0.4, alignment_high=0.5)]
    text = write_report(tmp_path, rows, [], title="t", columns=COLUMNS).read_text()
    assert "<td>0.4<span>[0.35, 0.45]</span></td>" in text and 'class="best"' not in text
    rows[1] |= {"alignment": 0.7, "alignment_low": 0.6, "alignment_high": 0.8}
    text = write_report(tmp_path, rows, [], title="t", columns=COLUMNS).read_text()
    assert '<td class="best">0.7<span>[0.6, 0.8]</span></td>' in text


def test_the_page_is_whole_and_holds_everything_it_shows(tmp_path):
    image = Image.new("RGB", (64, 64), "red")
    figure = Figure(
        "repeated captions",
        [HOSTILE, "b"],
        [
            ("originals", "", [Cell(image), Cell(None)]),
            ("raw model", "50 % copied", [Cell(image, True, HOSTILE)] * 2),
        ],
    )
    rows = [row("raw", "none", "repeated"), row(HOSTILE, "amg", "repeated", quality=float("nan"))]
    path = write_report(
        tmp_path,
        rows,
        [figure],
        title=HOSTILE,
        columns=COLUMNS,
        real=rows[:1],
        settings={HOSTILE: HOSTILE},
        links={"a": "b.html"},
    )
    text = path.read_text()
    page = Page(text)
    assert "script" not in {tag for tag, _ in page.tags}
    assert HOSTILE in page.texts
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 3
    assert all(attributes["src"].startswith("data:image/png;base64,") for attributes in images)
    assert [attributes.get("class") for attributes in images] == [None, "copied", "copied"]
    assert not re.search(r"https?://", text)
    with Image.open(tmp_path / "figure.png") as picture:
        assert picture.width > picture.height > 200


def test_the_story_shows_the_first_captions_and_seeds_in_order(results):
    drawn, measured = results
    captions = list(dict.fromkeys(drawn[0].captions))
    originals = {captions[0]: drawn[0].images[0]}
    figure = story("repeated", drawn, measured, originals, columns=5)
    assert figure.columns == captions[:5]
    assert [label for label, _, _ in figure.rows] == ["originals", "raw model", "curated model"]
    assert [cell.image is None for cell in figure.rows[0][2]] == [False, True, True, True, True]
    assert [cell.image for cell in figure.rows[1][2]] == [drawn[0].images[2 * i] for i in range(5)]
    assert figure.rows[1][1] == f"{percent(measured[0].row['copied_share'])} copied"
    assert len(story("held_out", drawn, measured, {}, columns=5).rows) == 1


def test_the_conclusion_follows_the_numbers():
    rows = [
        row("raw", "none", "repeated"),
        row("raw", "amg", "repeated", memorized_share=0.0, copied_share=0.125, alignment=0.3),
        row("raw", "none", "held_out"),
        row("curated", "none", "held_out", alignment=0.5, quality=12.0),
    ]
    assert headline(rows).endswith("raw model 75 %, raw model with AMG 12 %.")
    text = " ".join(conclude(rows))
    assert "75 % of what the raw model draws are copies" in text
    assert "raw model with AMG copies 12 % by the judge and 0 % by the copy detector" in text
    assert "25 % worse alignment (0.3 against 0.4)" in text
    assert "25 % better alignment (0.5 against 0.4) and the same Fréchet distance (12)" in text


def test_the_conclusion_says_when_a_difference_is_within_the_intervals():
    wide = {"alignment_low": 0.2, "alignment_high": 0.6}
    rows = [row("raw", "none", "repeated", **wide), row("raw", "amg", "repeated", **wide | {"alignment": 0.5})]
    assert "25 % better alignment (0.5 against 0.4), within the intervals." in conclude(rows)[1]
    apart = {"alignment": 0.9, "alignment_low": 0.8, "alignment_high": 1.0}
    assert conclude([rows[0], row("raw", "amg", "repeated", **apart)])[1].endswith("(0.9 against 0.4).")


def test_the_conclusion_speaks_of_the_judges_that_there_are():
    rows = [
        {"model": "sd14", "guidance": guidance, "prompts": "memorized", "sscd_share": share, "clip_score": score}
        for guidance, share, score in (("none", 0.8, 0.3), ("tokens", 0.2, 0.27))
    ]
    assert headline(rows).endswith("by SSCD: sd14 80 %, sd14 with tokens 20 %.")
    assert conclude(rows)[1] == "The sd14 with tokens copies 20 % by SSCD; 10 % worse CLIP score (0.27 against 0.3)."
    bare = [{"model": "a", "guidance": "none", "prompts": "x", "brightness": 3.0}] * 2
    assert headline(bare) == "" and conclude(bare) == []


def test_few_is_not_called_none():
    assert [percent(share) for share in (0, 0.001, 0.04, 0.999, 1)] == [
        "0 %",
        "0.1 %",
        "4 %",
        "99.9 %",
        "100 %",
    ]
