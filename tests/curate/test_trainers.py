"""Folders that other trainers read: what each is told, with repeats and several captions, and the way back."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
import yaml

from afresh.errors import UsageError
from curate.config import DedupConfig, ExportConfig
from curate.dedup import run_dedup
from curate.export import run_export
from curate.reading.writing import write_shard
from tests.curate.made_sources import fields, ingest, lay_out, picture, png, samples_of

WORDS = ["a dog\non grass", "dog {sleeping}"]


@pytest.fixture(scope="module")
def curated(tmp_path_factory) -> Path:
    """Four samples: one that is seen three times under two captions, one whose key stands in both shards, one bare."""
    folder = tmp_path_factory.mktemp("trainers")
    pooled = {"repeats": 3, "afresh": {"duplicates": 1, "captions": WORDS[1:]}}
    one = {"png": png(0), "txt": WORDS[0].encode(), "json": json.dumps(pooled).encode()}
    write_shard(folder / "a.tar", [("dogs/one", one), ("two", {"png": png(1), "txt": b"\xef\xbb\xbfa cat"})])
    write_shard(folder / "b.tar", [("TWO", {"png": png(2), "txt": b"a bird"}), ("bare", {"png": png(3)})])
    shards = [str(folder / name) for name in ("a.tar", "b.tar")]
    run_dedup(DedupConfig(shards=shards, out=str(folder / "out"), workers=1, missing_caption="empty"))
    return folder / "out"


def export(out: Path, dest: Path, how: str, **settings) -> Path:
    assert run_export(ExportConfig(out=str(out), dest=str(dest), format=how, **settings))["samples"] == 4
    return dest


def groups_of(dest: Path, how: str) -> dict[Path, tuple[int, dict]]:
    """Folder → how often the trainer shows its images in an epoch, and what it is told of the folder."""
    if how == "kohya":
        told = tomllib.loads((dest / "dataset.toml").read_text())
        assert told["general"]["enable_wildcard"] is True and told["general"]["caption_extension"] == ".txt"
        return {Path(one["image_dir"]): (one["num_repeats"], one) for one in told["datasets"][0]["subsets"]}
    if how == "simpletuner":
        *sets, texts = json.loads((dest / "multidatabackend.json").read_text())
        assert texts["dataset_type"] == "text_embeds" and texts["default"] is True
        return {Path(one["instance_data_dir"]): (one["repeats"] + 1, one) for one in sets}
    if how == "onetrainer":
        concepts = json.loads((dest / "concepts.json").read_text())
        assert {one["balancing_strategy"] for one in concepts} == {"REPEATS"}
        return {Path(one["path"]): (one["balancing"], one) for one in concepts}
    sets = yaml.safe_load((dest / "datasets.yaml").read_text())["datasets"]
    return {Path(one["folder_path"]): (one["num_repeats"], one) for one in sets}


@pytest.mark.parametrize("how", ["kohya", "simpletuner", "onetrainer", "ai-toolkit"])
def test_a_trainer_is_told_of_each_folder_how_often_its_images_are_seen(how, curated, tmp_path):
    dest = export(curated, tmp_path / "dest", how, concept="sks dog")
    groups = groups_of(dest, how)
    assert {path: seen for path, (seen, _) in groups.items()} == {dest / "1_sks dog": 1, dest / "3_sks dog": 3}
    images = list(dest.rglob("*.png"))
    assert sorted(path.read_bytes() for path in images) == sorted(png(number) for number in range(4))
    assert [path.read_bytes() for path in (dest / "3_sks dog").glob("*.png")] == [png(0)]
    assert len({path.name.lower() for path in images}) == 4  # whatever the file system tells apart
    if how == "kohya":
        assert {one["class_tokens"] for _, one in groups.values()} == {"sks dog"}


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("kohya", "a dog on grass\ndog {{sleeping}}"),
        ("simpletuner", "a dog on grass\ndog {sleeping}"),
        ("onetrainer", "a dog on grass\ndog {sleeping}"),
        ("ai-toolkit", "a dog on grass"),
    ],
)
def test_captions_stand_a_line_each_and_an_absent_one_has_no_file(how, text, curated, tmp_path):
    dest = export(curated, tmp_path / "dest", how)
    texts = {path.with_suffix(".png").read_bytes(): path.read_text() for path in dest.rglob("*.txt")}
    assert texts == {png(0): text, png(1): "a cat", png(2): "a bird"}


def test_an_imagefolder_loads_in_datasets_with_its_captions(curated, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    dest = export(curated, tmp_path / "dest", "imagefolder")
    rows = list(datasets.load_dataset("imagefolder", data_dir=str(dest), split="train"))
    assert [row["text"] for row in rows] == [WORDS[0], "a cat", "a bird", None]
    assert [row["captions"] for row in rows] == [WORDS, ["a cat"], ["a bird"], []]
    assert [row["repeats"] for row in rows] == [3, 1, 1, 1]
    assert [row["image"].tobytes() for row in rows] == [picture(number).tobytes() for number in range(4)]


@pytest.mark.parametrize("how", ["imagefolder", "kohya", "simpletuner", "onetrainer"])
def test_what_a_trainer_was_given_is_imported_again_with_repeats_and_captions(how, curated, tmp_path):
    dest = export(curated, tmp_path / "dest", how, concept="dog")
    text = {"text_column": "text"} if how == "imagefolder" else {"caption_lines": True}
    ingest(dest, tmp_path / "again", **text)
    found = {sample.image: sample for sample in samples_of(tmp_path / "again")}
    assert {image: sample.number("repeats") for image, sample in found.items()} == {
        png(0): 3, png(1): 1, png(2): 1, png(3): 1
    }  # fmt: skip
    assert [" ".join(one.replace("{{", "{").replace("}}", "}").split()) for one in found[png(0)].captions] == [
        "a dog on grass", "dog {sleeping}"
    ]  # fmt: skip
    assert found[png(3)].caption == (None if how == "imagefolder" else "dog")


def test_what_trainers_leave_in_their_folders_hides_no_repeats(tmp_path):
    files = {"10_dog/a.png": png(0), "10_dog/a.caption": "sks\r\n\r\nsks dog\r\n", "10_dog/a.npz": b"PK\3\4"}
    files |= {"2_cat/b.png": png(1), "2_cat/b.txt": "ein Kätzchen\nKatze".encode("utf-16")}
    files |= {"dataset.toml": "[general]", "_latent_cache/a.safetensors": b"\0" * 16, "2_cat/metadata_cache.json": "{}"}
    ingest(lay_out(tmp_path / "src", files), tmp_path / "out", caption_lines=True)
    found = {fields(sample)["source"]: sample for sample in samples_of(tmp_path / "out")}
    assert set(found) == {"10_dog/a.png", "2_cat/b.png"}
    dog, cat = found["10_dog/a.png"], found["2_cat/b.png"]
    assert (dog.number("repeats"), cat.number("repeats")) == (10, 2)
    assert (dog.captions, cat.captions) == (("sks", "sks dog"), ("ein Kätzchen", "Katze"))
    assert cat.members["txt"] == "ein Kätzchen".encode()


def test_without_a_word_a_text_file_is_one_caption(tmp_path):
    src = lay_out(tmp_path / "src", {"a.png": png(0), "a.txt": "first\nsecond"})
    ingest(src, tmp_path / "out")
    (sample,) = samples_of(tmp_path / "out")
    assert sample.captions == ("first\nsecond",)


@pytest.mark.parametrize("concept", ["", "..", "a/b", "a\nb"])
def test_a_concept_is_the_name_of_a_folder(concept, curated, tmp_path):
    with pytest.raises(UsageError, match="concept"):
        export(curated, tmp_path / "dest", "kohya", concept=concept)
    assert not (tmp_path / "dest").exists()
