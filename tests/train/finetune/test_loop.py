"""The fine-tuning loop on real shards and a tiny random model: one process and two, settings, bad input."""

from __future__ import annotations

import json

import pyarrow.parquet as pq
import pytest
import torch

from curate.console import UsageError, UserError
from tests.train.finetune.runs import launch, log_lines, same, settings
from train.components import load_pipeline
from train.finetune.config import FilterConfig
from train.finetune.loop import resolve_precision, run_finetune


@pytest.mark.parametrize("amx, precision", [(True, "bf16"), (False, "no")])
def test_auto_precision_is_bf16_only_where_it_is_fast(monkeypatch, amx, precision):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": amx}, raising=False)
    assert resolve_precision("auto") == precision
    assert resolve_precision("fp16") == "fp16"


def test_training_changes_the_unet_alone_and_leaves_a_pipeline_that_diffusers_loads(model, shards, tmp_path):
    from diffusers import StableDiffusionPipeline

    summary = run_finetune(settings(model, shards, tmp_path / "run", cache_latents=True))
    assert summary["samples_seen"] == 16 and summary["dropped"] == 0
    before = load_pipeline(model)
    after = StableDiffusionPipeline.from_pretrained(summary["model"], safety_checker=None)
    assert not same(before.unet.state_dict(), after.unet.state_dict())
    assert same(before.text_encoder.state_dict(), after.text_encoder.state_dict())
    assert [line["step"] for line in log_lines(tmp_path / "run")] == [1, 2, 3, 4]
    assert run_finetune(settings(model, shards, tmp_path / "run", cache_latents=True)) == summary


def test_accumulated_batches_give_the_gradient_of_the_whole_batch(model, shards, tmp_path):
    run_finetune(settings(model, shards, tmp_path / "whole", steps=1, batch_size=8))
    run_finetune(settings(model, shards, tmp_path / "parts", steps=1, batch_size=4, gradient_accumulation=2))
    (whole,), (parts_,) = log_lines(tmp_path / "whole"), log_lines(tmp_path / "parts")
    assert parts_["loss"] == pytest.approx(whole["loss"], rel=1e-4)
    assert parts_["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-3)


@pytest.mark.timeout(300)
def test_two_processes_train_as_one_with_the_doubled_batch_though_one_rank_drops_all(model, shards, tmp_path):
    # The first position is judged and dropped or kept by a threshold between the two ranks' magnitudes.
    whole = settings(
        model, shards, tmp_path / "one", steps=3, batch_size=2, caption_dropout=0.0,
        filter=FilterConfig("every_step", threshold=1e9),
    )  # fmt: skip
    run_finetune(whole)
    rows = pq.read_table(tmp_path / "one" / "verdicts.parquet").to_pylist()
    magnitudes = sorted(m for row in rows for m in row["magnitude_by_band"] if m is not None)
    threshold = (magnitudes[len(magnitudes) // 2 - 1] + magnitudes[len(magnitudes) // 2]) / 2
    some = FilterConfig("every_step", threshold=threshold)
    changes = {"steps": 3, "caption_dropout": 0.0, "filter": some}
    one = run_finetune(settings(model, shards, tmp_path / "single", batch_size=2, **changes))
    two = settings(model, shards, tmp_path / "double", batch_size=1, **changes)
    process = launch(two, processes=2)
    assert process.wait(timeout=240) == 0, process.communicate()[1]
    summary = json.loads((tmp_path / "double" / "summary.json").read_text())
    assert summary["processes"] == 2
    assert 0 < one["dropped"] == summary["dropped"] < 6  # with one sample a rank, a dropped one empties the rank
    for a, b in zip(log_lines(tmp_path / "single"), log_lines(tmp_path / "double"), strict=True):
        assert (a["kept"], a["dropped"]) == (b["kept"], b["dropped"])
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-3, abs=1e-6)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-2, abs=1e-6)


def test_a_folder_begun_with_other_settings_is_refused_by_name(model, shards, tmp_path):
    run_finetune(settings(model, shards, tmp_path / "run", steps=1))
    with pytest.raises(UsageError, match="learning_rate"):
        run_finetune(settings(model, shards, tmp_path / "run", steps=1, learning_rate=2e-3))


def test_a_model_with_a_part_missing_is_named(model, shards, tmp_path):
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    shutil.rmtree(broken / "vae")
    with pytest.raises(UserError, match="lacks vae"):
        run_finetune(settings(str(broken), shards, tmp_path / "run"))


@pytest.mark.parametrize(
    ("change", "word"),
    [({"steps": 0}, "steps"), ({"caption_dropout": 1.0}, "caption_dropout"), ({"learning_rate": -1.0}, "learning_")],
)
def test_settings_out_of_range_are_named(model, shards, tmp_path, change, word):
    with pytest.raises(UsageError, match=word):
        run_finetune(settings(model, shards, tmp_path / "run", **change))
