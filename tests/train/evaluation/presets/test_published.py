"""Published lists in their own forms: Wen et al.'s lines, MemBench's table; originals by number or URL; dead links."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from afresh.errors import UserError
from curate.reading.images import decode_image
from curate.sample_set import load_part
from train.evaluation.config import EvaluateConfig
from train.evaluation.evaluate import run_evaluate
from train.evaluation.presets.published import name_of, read_list, write_missing

HOST = "https://images.example/albumart"


@pytest.fixture(scope="module")
def samples():
    return load_part("finetune")[:6]


def write_wen(folder: Path, samples) -> Path:
    """As ``sdv1_500_memorized.jsonl`` and ``sdv1_500_mem_groundtruth/gt_images``: numbers of images, a folder each; the
    last two are not there.
    """
    (folder / "gt_images").mkdir(parents=True)
    lines = []
    for i, sample in enumerate(samples):
        index = 1030727993 + i
        lines.append({"caption": sample.caption, "index": index, "url": f"{HOST}/100{i}_16.jpg?v=6&s=a b"})
        if i < len(samples) - 2:
            (folder / "gt_images" / str(index)).mkdir()
            for k in range(1 + i % 2):
                decode_image(sample.image).save(folder / "gt_images" / str(index) / f"{k}.png")
    (folder / "gt_images" / str(1030727993 + len(samples) - 1)).mkdir()  # a folder without an image in it
    path = folder / "sdv1_500_memorized.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def write_membench(folder: Path, samples) -> Path:
    """As ``SD1_final.csv``: a column of numbers without a name, and URLs as a list in text; the last is not there, nor
    the second of the first.
    """
    (folder / "originals").mkdir(parents=True)
    path = folder / "SD1_final.csv"
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["", "prompt", "urls"])
        for i, sample in enumerate(samples):
            urls = [f"{HOST}/{i}.jpg?v=15,56"] + ([f"{HOST}/it's-{i}.png"] if i == 0 else [])
            writer.writerow([i, sample.caption, str(urls)])
            if i < len(samples) - 1:
                decode_image(sample.image).save(folder / "originals" / f"{name_of(urls[0])}.png")
    assert '"[' in path.read_text()  # lists of several stand in quotes
    return path


def test_a_list_by_number_finds_all_originals_of_a_prompt_and_names_the_dead_links(samples, tmp_path):
    path = write_wen(tmp_path, samples)
    listed = read_list(path, tmp_path / "gt_images")
    assert [one.caption for one in listed] == [sample.caption for sample in samples]
    assert [len(one.originals) for one in listed] == [1, 2, 1, 2, 0, 0]
    assert [name for one in listed for name, _ in one.missing] == ["1030727997", "1030727998"]
    assert write_missing(tmp_path / "dead.tsv", listed) == 2
    rows = [line.split("\t") for line in (tmp_path / "dead.tsv").read_text().splitlines()]
    assert rows[0] == ["1030727997", f"{HOST}/1004_16.jpg?v=6&s=a b", samples[4].caption]


def test_a_list_by_url_finds_each_under_a_name_made_of_it(samples, tmp_path):
    path = write_membench(tmp_path, samples)
    listed = read_list(path, tmp_path / "originals")
    assert [len(one.originals) for one in listed] == [1, 1, 1, 1, 1, 0]
    assert [url for one in listed for _, url in one.missing] == [f"{HOST}/it's-0.png", f"{HOST}/5.jpg?v=15,56"]
    assert len(name_of(HOST)) == 16 and name_of(HOST) != name_of(HOST + "/")


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"index": 1}, "neither caption nor prompt"),
        ({"caption": "a"}, "neither index nor url nor urls"),
        ({"prompt": "a", "urls": "['x', __import__('os')]"}, "urls are no list"),
        ({"prompt": "a", "urls": [1, 2]}, "something else than text"),
    ],
)
def test_a_row_of_no_known_form_is_named(row, complaint, tmp_path):
    (tmp_path / "l.jsonl").write_text(json.dumps({"caption": "fine", "index": 7}) + "\n" + json.dumps(row))
    with pytest.raises(UserError, match=f"l.jsonl: row 2: .*{complaint}"):
        read_list(tmp_path / "l.jsonl", tmp_path)


def test_a_missing_list_folder_or_reading_is_named(tmp_path):
    (tmp_path / "l.jsonl").write_text("{")
    for path, folder, complaint in (
        ("none.jsonl", ".", "no such list"),
        ("l.jsonl", "none", "no such folder of originals"),
        ("l.jsonl", ".", "cannot be read"),
    ):
        with pytest.raises(UserError, match=complaint):
            read_list(tmp_path / path, tmp_path / folder)


@pytest.mark.parametrize(("preset", "write", "left"), [("sd14-500", write_wen, 4), ("membench", write_membench, 5)])
def test_a_preset_draws_what_it_can_judge_with_a_small_model_in_the_place_of_sd14(
    preset, write, left, samples, tiny_pipe, tmp_path, capfd
):
    tiny_pipe.save_pretrained(tmp_path / "model")
    write(tmp_path / "data", samples)
    (tmp_path / "data" / "p.yaml").write_text(
        f"preset: {preset}\nmodels: {{sd14: ../model}}\n"
        "settings: [{model: sd14}, {model: sd14, guidance: tokens}]\nseeds: 1\nsteps: 2\nresamples: 20\n"
    )
    out = tmp_path / "out"
    summary = run_evaluate(
        EvaluateConfig(out=str(out), protocol=str(tmp_path / "data" / "p.yaml"), batch_size=8, device="cpu")
    )
    assert [(row["guidance"], row["images"]) for row in summary["rows"]] == [("none", left), ("tokens", left)]
    assert summary["not_measured"].keys() == {"sscd", "imagenet", "clip", "inception"}
    assert (out / "dead_links.tsv").read_text().count("\n") == 2
    said = capfd.readouterr().err
    assert "dead_links.tsv" in said and f"{len(samples) - left} of {len(samples)} prompts have none" in said
    assert "not measured" in said and said.index("not measured") < said.index("sd14, guidance none")
    assert summary["real"][0]["pixel_copied_share"] == 1  # the originals stand for the training images


def test_a_preset_without_any_original_draws_nothing(samples, tiny_pipe, tmp_path):
    tiny_pipe.save_pretrained(tmp_path / "model")
    write_membench(tmp_path, samples)
    for path in (tmp_path / "originals").iterdir():
        path.unlink()
    model = str(tmp_path / "model")
    config = EvaluateConfig(out=str(tmp_path / "out"), preset="membench", data=str(tmp_path), model=model)
    with pytest.raises(UserError, match="holds no original of the 6 prompts memorized"):
        run_evaluate(config)
    assert not (tmp_path / "out" / "samples").exists()
