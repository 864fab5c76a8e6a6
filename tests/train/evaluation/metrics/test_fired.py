"""What guidance did stands in the table: how many images it corrected, and whether they are those of another."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from train.evaluation.judging.drawn import Drawn, read_drawn
from train.evaluation.metrics.measuring import evaluate_images
from train.evaluation.metrics.registry import columns_of
from train.evaluation.reporting.conclusions import conclude, headline
from train.evaluation.reporting.report import story
from train.evaluation.reporting.tables import markdown
from train.sampling.config import SampleConfig
from train.sampling.job.job import run_sample


@pytest.fixture(scope="module")
def measured(metrics, training):
    """Images without guidance, the same with AMG that did nothing, and with AMG that changed one pixel of one."""
    plain = [Image.new("RGB", (64, 64), (20 * i, 90, 0)) for i in range(6)]
    changed = [image.copy() for image in plain]
    changed[4].putpixel((3, 3), (0, 0, 255))
    captions = [sample.caption for sample in training[:3] for _ in range(2)]
    drawn = [
        Drawn("raw", "none", "repeated", plain, captions),
        Drawn("raw", "amg", "repeated", [image.copy() for image in plain], captions, fired=0),
        Drawn("raw", "amg-strong", "repeated", changed, captions, fired=1),
        Drawn("curated", "none", "repeated", plain, captions),
    ]
    return drawn, evaluate_images(drawn, metrics, resamples=0)


def test_fired_and_identical_images_stand_in_the_rows(measured):
    rows = [result.row for result in measured[1]]
    assert [row.get("fired") for row in rows] == [None, 0, 1, None]
    assert [row.get("same_as") for row in rows] == [None, "none", None, None]  # another model's are no matter
    assert {row["embedder"] for row in rows} == {"layout"}


def test_the_table_the_figure_and_the_sentences_say_it(measured, metrics):
    drawn, results = measured
    rows = [result.row for result in results]
    table = markdown(rows, [], columns_of(metrics)).splitlines()
    guided = table[2].split(" | ").index("guided")
    assert [line.split(" | ")[guided] for line in table[4:8]] == ["–", "0", "1", "–"]
    said = conclude(rows)
    same = "the raw model with AMG draws the very images of the raw model: guidance changed none of 6."
    assert said[0] == f"For repeated captions, {same}"
    assert not any("raw model with AMG copies" in one for one in said)  # nothing is compared with itself
    assert any("raw model with strong AMG copies" in one for one in said)
    remarks = [remark for _, remark, _ in story("repeated", drawn, results, {}).rows]
    assert [remark.endswith(", the images of raw model") for remark in remarks] == [False, True, False, False]


def test_the_index_is_called_by_its_embedders_name(measured):
    rows = [result.row for result in measured[1]]
    assert "by layout, the index’s embedder" in " ".join(conclude(rows))
    for row in rows:
        row.pop("copied_share")  # the first judge that is left speaks in the headline
    only = [{k: v for k, v in row.items() if not k.startswith("imagenet")} for row in rows]
    assert "by layout, the index’s embedder" in headline(only)
    carried = [row | {"embedder": "copy-detector"} for row in only]
    assert "by the copy detector" in headline(carried)


def test_what_train_sample_counts_is_what_is_read(tiny_pipe, tmp_path):
    tiny_pipe.save_pretrained(tmp_path / "model")
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"caption": c}) + "\n" for c in ("red apple", "flag")))
    config = SampleConfig(
        str(tmp_path / "model"), str(tmp_path / "p.jsonl"), str(tmp_path / "out"), guidance="basin", seeds=1, steps=2,
        device="cpu",
    )  # fmt: skip
    run_sample(config)
    assert read_drawn(config.out, "raw", "basin", "x").fired == 2
    assert read_drawn(config.out, "raw", "none", "x").fired is None
