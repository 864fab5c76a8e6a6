"""The model card says what the run's records say, in a form that hubs read, and gives no path away."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import yaml

from train.denoising.opening.config import LoRAConfig
from train.finetune.config import Calibration, FilterConfig, FinetuneConfig
from train.finetune.model_card import Training, model_card, read_curations

CONFIG = FinetuneConfig(
    model="stable-diffusion-v1-5/stable-diffusion-v1-5",
    out="/home/someone/runs/birds",
    shards=["/home/someone/curated/shards"],
    steps=1000,
    batch_size=8,
    gradient_accumulation=2,
    mixed_precision="bf16",
    filter=FilterConfig("every_step", threshold=2.5),
)
CURATION = {
    "name": "curated",
    "samples": 1437,
    "kept": 521,
    "dropped": 915,
    "unreadable": 1,
    "reasons": {"exact_image": 300, "near_image": 615},
    "recall": 0.9981,
    "settings": {"threshold": 0.9, "image_embedder": "/home/someone/weights/sscd.pt"},
}
TRAINING = Training(
    base="stable-diffusion-v1-5/stable-diffusion-v1-5",
    base_on_hub=True,
    samples=521,
    shards=3,
    size=512,
    prediction="epsilon",
    curations=(CURATION,),
)
SUMMARY = {
    "steps": 1000,
    "samples_seen": 32000,
    "judged": 28800,
    "dropped": 417,
    "samples_dropped_at_least_once": 23,
    "skipped_steps": 2,
    "processes": 2,
    "thresholds": [2.5] * 10,
}


def read(card: str) -> tuple[dict, str]:
    _, head, body = card.split("---\n", 2)
    return yaml.safe_load(head), body


def test_the_front_matter_is_what_the_hub_understands():
    from huggingface_hub import ModelCard

    card = ModelCard(model_card(CONFIG, TRAINING, SUMMARY))
    assert card.data.license == "unknown"
    assert card.data.base_model == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert card.data.library_name == "diffusers" and card.data.pipeline_tag == "text-to-image"
    assert "stable-diffusion" in card.data.tags and "lora" not in card.data.tags
    assert read(model_card(replace(CONFIG, license="openrail"), TRAINING, SUMMARY))[0]["license"] == "openrail"


def test_data_filter_and_training_are_stated_with_their_counts():
    _, body = read(model_card(CONFIG, TRAINING, SUMMARY))
    for fact in (
        "521 captioned images in 3 shards",
        "kept 521 of 1,437 samples and dropped 915 as copies (exact_image 300, near_image 615)",
        "at a similarity of 0.9 or more by the embedder `sscd.pt`",
        "1 could not be read",
        "measured on a sample: 99.8%",
        "policy `every_step`, threshold 2.5, raw L2",
        "It judged 28,800 of 32,000 visits and left out 417, of 23 samples",
        "Steps without any update: 2",
        "| samples per step | 32 (batch 8 × accumulation 2 × processes 2) |",
        "| precision | bf16 |",
        "None of this rules out that the model gives back a training image",
    ):
        assert fact in body, fact


def test_thresholds_that_differ_by_timestep_are_stated_one_by_one():
    config = replace(CONFIG, filter=FilterConfig("every_step", threshold="/home/someone/filter.json"))
    card = model_card(config, TRAINING, SUMMARY | {"thresholds": [None] * 5 + [1.5, 2.0, 2.0, 2.0, 2.25]})
    assert "thresholds none, none, none, none, none, 1.5, 2, 2, 2, 2.25 by timestep band, raw L2" in card
    assert "/home" not in card


def test_without_filter_and_curation_the_card_says_so():
    config = replace(CONFIG, filter=FilterConfig("off"))
    _, body = read(model_card(config, replace(TRAINING, curations=()), SUMMARY))
    assert "No filter was used in training" in body and "judged" not in body
    assert "No record of a curation stands beside the shards" in body


@pytest.mark.parametrize("form", ["pipeline", "lora"])
def test_no_path_of_the_machine_stands_in_a_card(form):
    training = replace(TRAINING, base="my-model", base_on_hub=False)
    config = replace(CONFIG, model="/home/someone/my-model", lora=LoRAConfig(rank=8), push_to_hub="someone/birds")
    card = model_card(config, training, SUMMARY, form=form)
    assert "/home" not in card and "someone" not in card
    assert "base_model" not in read(card)[0]


def test_settings_stand_in_a_form_that_the_trainer_takes_back():
    from train.finetune.config import FinetuneConfig as Config

    _, body = read(model_card(CONFIG, TRAINING, SUMMARY))
    settings = yaml.safe_load(body.split("```yaml\n")[1].split("```")[0])
    of_filter = settings.pop("filter")
    filter_settings = FilterConfig(**of_filter | {"calibrate": Calibration(**of_filter["calibrate"])})
    again = Config(model="", out="", shards=[], **{k: v for k, v in settings.items() if not isinstance(v, dict)})
    assert filter_settings == CONFIG.filter and again.gradient_accumulation == 2 and again.steps == 1000


def test_adapters_have_a_card_that_says_how_to_add_them():
    config = replace(CONFIG, lora=LoRAConfig(rank=8))
    head, body = read(model_card(config, TRAINING, SUMMARY, form="lora"))
    assert head["base_model_relation"] == "adapter" and "lora" in head["tags"]
    assert 'pipe.load_lora_weights("FOLDER", weight_name="pytorch_lora_weights.safetensors")' in body
    assert "--model stable-diffusion-v1-5/stable-diffusion-v1-5 --lora FOLDER" in body
    assert "| adapters | lora, rank 8, alpha 8, on to_q, to_k, to_v, to_out.0 |" in body


def test_a_name_cannot_break_out_of_its_place():
    training = replace(TRAINING, base="a`|\n# heading", base_on_hub=False)
    _, body = read(model_card(CONFIG, training, SUMMARY))
    assert "\n# heading" not in body.replace("\n# birds", "")


def test_the_summary_of_a_curation_is_found_beside_its_shards(tmp_path):
    shards = tmp_path / "curated" / "shards"
    shards.mkdir(parents=True)
    (tmp_path / "curated" / "summary.json").write_text(json.dumps({k: v for k, v in CURATION.items() if k != "name"}))
    found = read_curations([str(shards / "000000.tar"), str(shards / "000001.tar"), "s3://bucket/shards/000000.tar"])
    assert found == [CURATION]
    (tmp_path / "curated" / "summary.json").write_text("{")
    assert read_curations([str(shards / "000000.tar")]) == []
    assert read_curations([str(tmp_path / "000000.tar")]) == []
