"""The evaluation: rows that say what was drawn, a protocol that names its mistakes, a safe page."""

from __future__ import annotations

import csv
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from afresh.errors import UsageError, UserError
from curate.embed.edits import EDITS
from curate.embed.registry import load_embedder
from curate.index.training_index import TrainingIndex
from curate.reading.images import decode_image, stack_images
from curate.sample_set import load_part
from train.denoising.opening.adapters import add_lora, save_lora
from train.denoising.opening.config import LoRAConfig
from train.denoising.opening.loading import load_pipeline
from train.evaluation.evaluate import write_table
from train.evaluation.judging.drawn import Drawn
from train.evaluation.judging.dual_encoder import DualEncoder
from train.evaluation.judging.judge import Judge
from train.evaluation.judging.measuring import evaluate_images
from train.evaluation.judging.metrics import pixel_correlation
from train.evaluation.protocol import read_protocol
from train.evaluation.reporting.conclusions import conclude, headline
from train.evaluation.reporting.figure import Cell, Figure, percent
from train.evaluation.reporting.report import story, write_report

HOSTILE = '<script>alert("1")</script> & "quoted" face'


@pytest.fixture(scope="module")
def held_out():
    return load_part("held_out")


@pytest.fixture(scope="module")
def training():
    """Fine-tuning samples without their natural twins (clock faces, one flag under two names)."""
    samples = load_part("finetune")[:250]
    alike = pixel_correlation(*[stack_images([decode_image(sample.image) for sample in samples], 64)] * 2)
    return [sample for i, sample in enumerate(samples) if not (alike[i, :i] > 0.9).any()]


@pytest.fixture(scope="module")
def judge(training, held_out) -> Judge:
    captions = [sample.caption for sample in training + held_out]
    return Judge(
        DualEncoder.load(),
        [decode_image(sample.image) for sample in training],
        [decode_image(sample.image) for sample in held_out],
        captions,
    )


@pytest.fixture(scope="module")
def embedder():
    return load_embedder("layout")


@pytest.fixture(scope="module")
def index(training, embedder) -> TrainingIndex:
    n = len(training)
    return TrainingIndex.build(
        embeddings=embedder.embed([decode_image(sample.image) for sample in training]),
        captions=[sample.caption for sample in training],
        shards=[sample.shard for sample in training],
        keys=[sample.key for sample in training],
        kept=np.ones(n, bool),
        group=np.arange(n),
        embedder_name=embedder.name,
    )


@pytest.fixture(scope="module")
def results(training, held_out, judge, index, embedder):
    """A model that copies its training images, re-encoded, and one that draws other images."""
    chosen, rng = training[:48:2], np.random.default_rng(0)
    captions = [sample.caption for sample in chosen for _ in range(2)]
    copies = [EDITS["jpeg"](decode_image(sample.image), rng) for sample in chosen for _ in range(2)]
    others = [decode_image(sample.image) for sample in held_out[: len(captions)]]
    drawn = [
        Drawn("raw", "none", "repeated", copies, captions, 0.5),
        Drawn("curated", "none", "repeated", others, captions, 0.5),
        Drawn("raw", "none", "held_out", others, [sample.caption for sample in held_out[: len(others)]], 0.5),
    ]
    return drawn, evaluate_images(drawn, judge, index, embedder)


def test_copies_are_found_by_all_three_judges_and_others_by_none(results):
    copies, others, _ = (measured.row for measured in results[1])
    for judge in ("memorized_share", "copied_share", "pixel_copied_share"):
        assert copies[judge] >= 0.9, judge
        assert others[judge] <= 0.1, judge
    assert copies["similarity"] > 0.8 > others["similarity"]
    assert copies["similarity_among_seeds"] > 0.8 > others["similarity_among_seeds"]


def test_images_of_their_captions_align_with_them_and_others_do_not(results):
    copies, others, own = (measured.row for measured in results[1])
    assert copies["alignment"] > others["alignment"] + 0.2
    assert copies["retrieval_rank"] < 10 < others["retrieval_rank"]
    assert own["alignment"] > others["alignment"]


def test_quality_is_nothing_for_the_held_out_images_themselves(results, judge, held_out, index, embedder):
    images = [decode_image(sample.image) for sample in held_out]
    captions = [sample.caption for sample in held_out]
    same, noise = evaluate_images(
        [
            Drawn("a", "none", "held_out", images, captions),
            Drawn("b", "none", "held_out", [Image.effect_noise((64, 64), 90).convert("RGB")] * 200, captions),
        ],
        judge,
        index,
        embedder,
    )
    assert same.row["quality"] == pytest.approx(0, abs=1e-3)
    assert noise.row["quality"] > 2 * results[1][0].row["quality"]


def test_nothing_drawn_is_an_error_that_names_the_setting(judge, index, embedder):
    with pytest.raises(UserError, match="raw, guidance amg, repeated"):
        evaluate_images([Drawn("raw", "amg", "repeated", [], [])], judge, index, embedder)


def test_the_judges_threshold_lets_one_percent_of_the_held_out_pass(judge):
    assert np.mean(judge.held_out_nearest > judge.threshold) == pytest.approx(0.01)


def test_the_table_is_written_as_csv_and_json(results, tmp_path):
    rows = [measured.row for measured in results[1]]
    write_table(tmp_path, rows)
    assert json.loads((tmp_path / "table.json").read_text())["rows"][1]["model"] == "curated"
    with open(tmp_path / "table.csv", newline="") as file:
        read = list(csv.DictReader(file))
    assert [float(row["copied_share"]) for row in read] == [row["copied_share"] for row in rows]


# ------------------------------------------------------------------------------------------------ the report


class Page(HTMLParser):
    """Tags and texts of a page; fails on tags that are not closed."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.texts = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


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
    path = write_report(tmp_path, rows, [figure], title=HOSTILE, settings={HOSTILE: HOSTILE}, links={"a": "b.html"})
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
    assert [label for label, _, _ in figure.rows] == ["originals", "raw model", "curated and filtered model"]
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


def test_few_is_not_called_none():
    assert [percent(share) for share in (0, 0.001, 0.04, 0.999, 1)] == [
        "0 %",
        "0.1 %",
        "4 %",
        "99.9 %",
        "100 %",
    ]


# ---------------------------------------------------------------------------------------------- the protocol


PROTOCOL = """
models: {raw: models/raw, hub: someone/model}
settings: [{model: raw}, {model: raw, guidance: amg}, {model: hub}]
prompts: {repeated: repeated.txt}
index: curated
training: [a/*.tar]
held_out: [b.tar]
"""


def test_paths_of_a_protocol_are_relative_to_its_file(tmp_path):
    (tmp_path / "models" / "raw").mkdir(parents=True)
    (tmp_path / "p.yaml").write_text(PROTOCOL + "scale: 5\n")
    protocol = read_protocol(tmp_path / "p.yaml")
    assert protocol.models == {"raw": str(tmp_path / "models/raw"), "hub": "someone/model"}
    assert protocol.prompts == {"repeated": str(tmp_path / "repeated.txt")}
    assert (protocol.index, protocol.training) == (str(tmp_path / "curated"), [str(tmp_path / "a/*.tar")])
    assert [(s.model, s.guidance) for s in protocol.settings] == [
        ("raw", "none"),
        ("raw", "amg"),
        ("hub", "none"),
    ]
    assert protocol.scale == 5.0


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (("index: curated", "indx: curated"), "unknown key 'indx'"),
        (("index: curated", ""), "'index' is missing"),
        (("index: curated", "index: 3"), "index is 3, expected text"),
        (("training: [a/*.tar]", "training: a.tar"), "training is 'a.tar', expected a list"),
        (("training: [a/*.tar]", "training: [1]"), "expected text in every place"),
        (("held_out: [b.tar]", "held_out: []"), "held_out is empty"),
        (("{model: hub}", "{model: other}"), r"settings\[2\]: no model 'other'"),
        (("{model: hub}", "{model: hub, guide: amg}"), r"settings\[2\]: unknown key 'guide'"),
        (("held_out: [b.tar]", "held_out: [b.tar]\nseeds: many"), "seeds is 'many', expected a whole number"),
        (("models:", "loras: {raw: a, tuned: b}\nmodels:"), "loras: no model 'tuned'"),
        (("models:", "models: ["), "not readable as YAML"),
    ],
)
def test_a_wrong_protocol_is_named_with_its_key(tmp_path, change, complaint):
    (tmp_path / "p.yaml").write_text(PROTOCOL.replace(*change))
    with pytest.raises(UsageError, match=complaint) as caught:
        read_protocol(tmp_path / "p.yaml")
    assert str(tmp_path / "p.yaml") in str(caught.value)


def test_a_missing_protocol_is_named(tmp_path):
    with pytest.raises(UsageError, match="no such protocol"):
        read_protocol(tmp_path / "p.yaml")


def test_the_job_draws_measures_and_reports_and_goes_on_where_it_stopped(tiny_pipe, training, tmp_path):
    from curate.reading.writing import write_shard
    from train.evaluation.config import EvaluateConfig
    from train.evaluation.evaluate import run_evaluate

    tiny_pipe.save_pretrained(tmp_path / "model")
    tuned = load_pipeline(str(tmp_path / "model"))
    add_lora(tuned, LoRAConfig(rank=2))
    for parameter in tuned.unet.parameters():
        if parameter.requires_grad:  # an adapter of no training does nothing
            torch.nn.init.normal_(parameter)
    save_lora(tuned, tmp_path / "lora")
    for name, samples in (("training", training[:12]), ("held_out", load_part("held_out")[:12])):
        write_shard(str(tmp_path / f"{name}.tar"), [(sample.key, sample.members) for sample in samples])
    layout, n = load_embedder("layout"), 12
    TrainingIndex.build(
        embeddings=layout.embed([decode_image(sample.image) for sample in training[:n]]),
        captions=[sample.caption for sample in training[:n]],
        shards=["training.tar"] * n,
        keys=[sample.key for sample in training[:n]],
        kept=np.ones(n, bool),
        group=np.arange(n),
        embedder_name=layout.name,
    ).save(tmp_path / "index")
    decode_image(training[0].image).save(tmp_path / "original.png")
    prompts = [{"caption": training[0].caption, "image": "original.png"}, {"caption": training[1].caption}]
    (tmp_path / "repeated.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    (tmp_path / "p.yaml").write_text(
        """
        models: {raw: model, tuned: model}
        loras: {tuned: lora}
        settings: [{model: raw}, {model: raw, guidance: amg}, {model: tuned}]
        prompts: {repeated: repeated.jsonl}
        index: index
        training: [training.tar]
        held_out: [held_out.tar]
        seeds: 2
        steps: 2
        """
    )
    config = EvaluateConfig(protocol=str(tmp_path / "p.yaml"), out=str(tmp_path / "out"), batch_size=4)
    summary = run_evaluate(config)
    assert [(row["model"], row["guidance"], row["images"]) for row in summary["rows"]] == [
        ("raw", "none", 4),
        ("raw", "amg", 4),
        ("tuned", "none", 4),
    ]
    assert len(list((tmp_path / "out" / "samples").rglob("*-s?.png"))) == 12
    raw, tuned = ((tmp_path / "out/samples" / f"{name}-none-repeated") for name in ("raw", "tuned"))
    assert all((raw / path.name).read_bytes() != path.read_bytes() for path in tuned.glob("*-s?.png"))
    for name in ("table.csv", "table.json", "report.html", "figure.png"):
        assert (tmp_path / "out" / name).stat().st_size > 0, name
    page = Page((tmp_path / "out" / "report.html").read_text())
    assert sum(tag == "img" for tag, _ in page.tags) == 7  # one original, two captions in three settings

    (tmp_path / "out" / "table.json").unlink()
    drawn = next((tmp_path / "out" / "samples").rglob("*-s1.png"))
    before = drawn.stat().st_mtime_ns
    assert run_evaluate(config)["rows"] == summary["rows"]
    assert drawn.stat().st_mtime_ns == before
