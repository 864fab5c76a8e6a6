"""What each family's runs save and measure, and which options they do without."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from afresh.errors import UsageError
from tests.train.families import tiny_flux, tiny_sd3, tiny_xl, tiny_z_image
from tests.train.finetune.runs import settings
from tests.train.finetune.test_stable_diffusion_3 import shards
from train.denoising.opening.adapters import text_encoders
from train.denoising.opening.loading import load_pipeline
from train.finetune.config import FilterConfig, Timesteps, ValidationConfig
from train.finetune.loop import run_finetune
from train.finetune.model.trained import Model

__all__ = ["shards"]
MODELS = {"xl": tiny_xl, "sd3": tiny_sd3, "flux": tiny_flux, "z-image": tiny_z_image}


@pytest.fixture(scope="module", params=MODELS)
def model(request, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp(request.param) / request.param
    MODELS[request.param]().save_pretrained(folder)
    return str(folder)


def test_half_weights_load_under_the_names_that_every_release_reads(request, model, shards, tmp_path):
    validation = ValidationConfig(
        every=1, prompts=["red apple"], shards=[shards], samples=2, steps=1, negative_prompt="blurred"
    )
    run_finetune(settings(model, shards, tmp_path, steps=2, save_dtype="float16", validation=validation))
    saved = tmp_path / "model"
    pipe = load_pipeline(str(saved), variant="fp16")
    assert all(p.isfinite().all() for p in pipe.vae.parameters())
    clip = 0
    for config in saved.glob("text_encoder*/config.json"):
        names = load_file(config.with_name("model.fp16.safetensors"))
        if json.loads(config.read_text())["model_type"].startswith("clip"):
            clip += 1
            assert all(name.startswith(("text_model.", "text_projection.")) for name in names)
        else:
            assert not any(name.startswith("text_model.") for name in names)
    assert clip or "z-image" in request.node.name
    losses = [json.loads(line) for line in (tmp_path / "validation" / "loss.jsonl").read_text().splitlines()]
    assert [line["step"] for line in losses] == [1, 2]
    assert all(torch.tensor(line["loss"]).isfinite() and line["samples"] == 2 for line in losses)
    assert len(list((tmp_path / "validation").glob("step-*/00000.png"))) == 2
    kind = json.loads((saved / "model_index.json").read_text())["_class_name"]
    assert f"from diffusers import {kind}" in (saved / "README.md").read_text()


@pytest.mark.parametrize("option", ["save_single_file", "clip_skip"])
def test_options_of_other_families_are_refused_before_training(model, shards, tmp_path, option):
    with pytest.raises(UsageError, match=f"{option}: not for "):
        run_finetune(settings(model, shards, tmp_path, **{option: 1}))
    assert not (tmp_path / "run.json").exists()


def test_timesteps_of_flow_matching_are_those_of_flow(model, shards, tmp_path):
    config = settings(model, shards, tmp_path, steps=1, timesteps=Timesteps(lowest=500))
    if model.endswith("xl"):
        assert run_finetune(config)["steps"] == 1
    else:
        with pytest.raises(UsageError, match="timesteps is for models with a schedule of betas"):
            run_finetune(config)


def test_once_embeddings_are_cached_no_encoder_is_called_and_the_saved_model_has_them(
    model, shards, tmp_path, monkeypatch
):
    parked, own = [], Model.encoders_to_cpu

    def never(*args, **given):
        raise AssertionError("an encoder was called")

    def park(self) -> None:
        own(self)
        for encoder in self.denoiser.encoders.values():
            encoder.register_forward_pre_hook(never)
            parked.append(encoder)

    monkeypatch.setattr(Model, "encoders_to_cpu", park)
    judge = FilterConfig("every_step", threshold=1e9)
    run_finetune(
        settings(model, shards, tmp_path / "run", steps=2, cache_text="memory", caption_dropout=0.5, filter=judge)
    )
    assert parked
    saved, base = load_pipeline(str(tmp_path / "run" / "model")), load_pipeline(model)
    for name, encoder in text_encoders(saved).items():
        for mine, theirs in zip(encoder.parameters(), getattr(base, name).parameters(), strict=True):
            assert torch.equal(mine, theirs)
