"""``train evaluate``: draws, measures, reports, goes on, verifies; names everything that is missing beforehand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from afresh.errors import UsageError, UserError
from curate.embed.registry import load_embedder
from curate.index.training_index import TrainingIndex
from curate.reading.images import decode_image
from curate.reading.writing import write_shard
from tests.train.evaluation.pages import Page
from train.denoising.opening.adapters import add_lora, save_lora
from train.denoising.opening.config import LoRAConfig
from train.denoising.opening.loading import load_pipeline
from train.evaluation.config import EvaluateConfig
from train.evaluation.evaluate import run_evaluate, sampling_jobs
from train.evaluation.inputs import ready_inputs
from train.evaluation.protocol import protocol_of
from train.evaluation.verify import verify

PROTOCOL = """
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


@pytest.fixture(scope="module")
def folder(tiny_pipe, training, held_out, tmp_path_factory) -> Path:
    """Models, shards, index and prompts, as a protocol names them."""
    folder = tmp_path_factory.mktemp("evaluate")
    tiny_pipe.save_pretrained(folder / "model")
    tuned = load_pipeline(str(folder / "model"))
    add_lora(tuned, LoRAConfig(rank=2))
    for parameter in tuned.unet.parameters():
        if parameter.requires_grad:  # an adapter of no training does nothing
            torch.nn.init.normal_(parameter)
    save_lora(tuned, folder / "lora")
    for name, samples in (("training", training[:12]), ("held_out", held_out[:12])):
        write_shard(str(folder / f"{name}.tar"), [(sample.key, sample.members) for sample in samples])
    layout, n = load_embedder("layout"), 12
    TrainingIndex.build(
        embeddings=layout.embed([decode_image(sample.image) for sample in training[:n]]),
        captions=[sample.caption for sample in training[:n]],
        shards=["training.tar"] * n,
        keys=[sample.key for sample in training[:n]],
        kept=np.ones(n, bool),
        group=np.arange(n),
        embedder_name=layout.name,
    ).save(folder / "index")
    decode_image(training[0].image).save(folder / "original.png")
    prompts = [{"caption": training[0].caption, "image": "original.png"}, {"caption": training[1].caption}]
    (folder / "repeated.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    (folder / "p.yaml").write_text(PROTOCOL)
    return folder


@pytest.fixture(scope="module")
def config(folder) -> EvaluateConfig:
    return EvaluateConfig(protocol=str(folder / "p.yaml"), out=str(folder / "out"), batch_size=2, device="cpu")


@pytest.fixture(scope="module")
def summary(config) -> dict:
    return run_evaluate(config)


def test_the_job_draws_measures_and_reports_and_goes_on_where_it_stopped(summary, config, folder):
    assert [(row["model"], row["guidance"], row["images"]) for row in summary["rows"]] == [
        ("raw", "none", 4),
        ("raw", "amg", 4),
        ("tuned", "none", 4),
    ]
    assert [(row["model"], row["images"]) for row in summary["real"]] == [("real images", 1)]
    assert summary["real"][0]["pixel_copied_share"] == 1  # the original is a training image
    assert summary["not_measured"].keys() == {"sscd", "clip", "inception"}
    out = folder / "out"
    assert len(list((out / "samples").rglob("*-s?.png"))) == 12
    raw, tuned = ((out / "samples" / f"{name}-none-repeated") for name in ("raw", "tuned"))
    assert all((raw / path.name).read_bytes() != path.read_bytes() for path in tuned.glob("*-s?.png"))
    for name in ("csv", "json", "md", "tex"):
        assert (out / f"table.{name}").stat().st_size > 0, name
    page = Page((out / "report.html").read_text())
    assert sum(tag == "img" for tag, _ in page.tags) == 7  # one original, two captions in three settings

    (out / "table.json").unlink()
    drawn = next((out / "samples").rglob("*-s1.png"))
    before = drawn.stat().st_mtime_ns
    assert run_evaluate(config)["rows"] == summary["rows"]
    assert drawn.stat().st_mtime_ns == before


def test_verify_draws_a_tenth_again_and_finds_every_bit_or_names_what_differs(summary, config, folder):
    found = run_evaluate(replace(config, verify=True))["verified"]
    assert (found["images"], found["of"], found["different"]) == (2, 12, [])
    stored = json.loads((folder / "out" / "verify" / "verify.json").read_text())
    assert stored == found

    protocol = protocol_of(config)
    jobs = list(sampling_jobs(protocol, config, ready_inputs(protocol, folder / "out")).values())
    files = sorted((folder / "out" / "samples" / "raw-none-repeated").glob("*-s1.png"))
    kept = [path.read_bytes() for path in files]
    for path in files:
        with Image.open(path) as image:
            pixels, text = np.asarray(image).copy(), image.text
        pixels[0, 0, 0] ^= 1  # the least that can differ
        info = PngInfo()
        for key, value in text.items():
            info.add_itxt(key, value)
        Image.fromarray(pixels).save(path, pnginfo=info)
    try:
        complaint = r"1 of 2 images came out differently .*/raw-none-repeated/0000\d-.*-s1\.png"
        with pytest.raises(UserError, match=complaint):
            verify(jobs[:1], folder / "verified", seed=0)
    finally:
        for path, data in zip(files, kept, strict=True):
            path.write_bytes(data)
    assert verify(jobs[:1], folder / "verified", seed=0)["different"] == []


def test_everything_that_is_missing_is_named_in_one_line_before_anything_is_drawn(folder, tmp_path):
    text = PROTOCOL.replace("tuned: model", "tuned: nowhere/at/all").replace("index: index", "index: no_index")
    text = text.replace("repeated.jsonl", "none.jsonl").replace("[training.tar]", "[lost.tar]")
    (folder / "missing.yaml").write_text(text + "weights: {sscd: lost.pt, inception: there/is/none.pt}\n")
    config = EvaluateConfig(protocol=str(folder / "missing.yaml"), out=str(tmp_path / "out"))
    with pytest.raises(UserError) as caught:
        run_evaluate(config)
    said = str(caught.value)
    for what in ("model tuned", "prompts repeated", "index", "training", "weights of sscd", "weights of inception"):
        assert f"{what}: " in said, what
    assert "\n" not in said and not (tmp_path / "out").exists()


def test_settings_that_do_not_go_together_are_refused_before_anything_is_drawn(folder, tmp_path):
    (folder / "bad.yaml").write_text(PROTOCOL.replace("guidance: amg", "guidance: amgg"))
    with pytest.raises(UsageError, match="'amgg' is not known"):
        run_evaluate(EvaluateConfig(protocol=str(folder / "bad.yaml"), out=str(tmp_path / "out")))
    (folder / "bare.yaml").write_text(PROTOCOL.replace("index: index", ""))
    with pytest.raises(UsageError, match="amg needs --index"):
        run_evaluate(EvaluateConfig(protocol=str(folder / "bare.yaml"), out=str(tmp_path / "out")))
    assert not list(tmp_path.rglob("*.png"))


def test_of_a_kind_only_the_prompts_of_its_label_are_drawn(folder, training, tmp_path):
    rows = [{"caption": training[i].caption, "label": i % 2} for i in range(5)]
    (folder / "both.jsonl").write_text("\n".join(map(json.dumps, rows)))
    text = PROTOCOL.replace("{repeated: repeated.jsonl}", "{repeated: both.jsonl, held_out: both.jsonl}")
    text = text.replace("seeds: 2", "seeds: 1").replace("{model: raw, guidance: amg}, ", "")
    (folder / "labels.yaml").write_text(text + "labels: {repeated: 1, held_out: 0}\nmetrics: [pixels]\nresamples: 0\n")
    config = EvaluateConfig(protocol=str(folder / "labels.yaml"), out=str(tmp_path / "out"), batch_size=8, device="cpu")
    summary = run_evaluate(config)
    counts = {(row["model"], row["prompts"]): row["images"] for row in summary["rows"]}
    assert counts == {(m, p): n for m in ("raw", "tuned") for p, n in (("repeated", 2), ("held_out", 3))}
    assert summary["copy_threshold"] is None and set(summary["rows"][0]) == {
        "model", "guidance", "prompts", "images", "pixel_copied_share", "seconds_per_image",
    }  # fmt: skip


def test_held_out_images_that_are_training_images_are_refused(folder, tmp_path):
    (folder / "known.yaml").write_text(PROTOCOL.replace("held_out.tar", "training.tar"))
    with pytest.raises(UserError, match="held_out: 12 of 12 images are training images"):
        run_evaluate(EvaluateConfig(protocol=str(folder / "known.yaml"), out=str(tmp_path / "out"), device="cpu"))
