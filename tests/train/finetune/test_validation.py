"""Validation images: where they go, what they show, and that training does not notice them."""

from __future__ import annotations

import contextlib
import json

import numpy as np
import pytest
import torch
from PIL import Image

from afresh.errors import UsageError
from curate.embed.registry import load_embedder
from curate.index.training_index import TrainingIndex
from tests.train.finetune.runs import log_lines, same, settings, stop_after, weights
from train.denoising.opening.loading import load_pipeline
from train.finetune.checks import check_validation
from train.finetune.config import ValidationConfig
from train.finetune.loop import run_finetune
from train.finetune.validation import Validation

PROMPTS = ["grinning face", "red apple"]


def test_a_run_with_validation_ends_as_one_without_and_shows_what_it_would_save(model, shards, tmp_path):
    changes = {"ema_decay": 0.9, "train_text_encoder": True}
    show = ValidationConfig(every=2, prompts=PROMPTS, steps=3, seed=5)
    run_finetune(settings(model, shards, tmp_path / "without", **changes))
    torch.manual_seed(1)
    run_finetune(settings(model, shards, tmp_path / "with", validation=show, **changes))
    assert log_lines(tmp_path / "with") == log_lines(tmp_path / "without")
    assert same(weights(tmp_path / "with"), weights(tmp_path / "without"))

    files = sorted((tmp_path / "with" / "validation").rglob("*.png"))
    names = [str(file.relative_to(tmp_path / "with" / "validation")) for file in files]
    assert names == [f"step-00000{step}/0000{n}.png" for step in (2, 4) for n in (0, 1)]
    # The last images are those of the saved model, which holds the averaged weights.
    saved = load_pipeline(str(tmp_path / "with" / "model"))
    for prompt, file in zip(PROMPTS, files[2:], strict=True):
        g = torch.Generator().manual_seed(5)
        expected = saved(prompt, num_inference_steps=3, guidance_scale=7.5, generator=g).images[0]
        with Image.open(file) as image:
            difference = np.abs(np.asarray(image, int) - np.asarray(expected, int))
            assert image.text["prompt"] == prompt
        assert difference.max() <= 2  # drawn together there and alone here
    with Image.open(files[0]) as first, Image.open(files[2]) as last:
        assert np.abs(np.asarray(first, int) - np.asarray(last, int)).max() > 2


def test_drawing_leaves_the_pipeline_and_the_random_state_as_they_were(tiny_pipe, tmp_path):
    tiny_pipe.unet.train()
    tiny_pipe.vae.eval()
    scheduler, state = tiny_pipe.scheduler, torch.get_rng_state()
    timesteps = scheduler.timesteps.clone()
    config = ValidationConfig(1, ["a"], steps=2)
    Validation(config, torch.device("cpu"), contextlib.nullcontext).draw(tmp_path, tiny_pipe)
    assert tiny_pipe.unet.training and not tiny_pipe.vae.training
    assert tiny_pipe.scheduler is scheduler and torch.equal(scheduler.timesteps, timesteps)
    assert torch.equal(torch.get_rng_state(), state)
    tiny_pipe.unet.eval()


def test_images_are_guided_away_from_what_the_index_holds(tiny_pipe, tmp_path):
    def draw(name: str, **guidance) -> np.ndarray:
        config = ValidationConfig(1, PROMPTS, steps=4, **guidance)
        images = Validation(config, torch.device("cpu"), contextlib.nullcontext).draw(tmp_path / name, tiny_pipe)
        return np.stack([np.asarray(image) for image in images])

    drawn = draw("none")
    vectors = load_embedder("layout").embed([Image.fromarray(image) for image in drawn])
    index = TrainingIndex.build(vectors, PROMPTS, ["s", "s"], ["a", "b"], [True, True], [0, 1], "layout")
    index.save(tmp_path / "curated" / "index")
    guided = draw("amg", guidance="amg-strong", index=str(tmp_path / "curated"))
    assert (guided != drawn).any(axis=(1, 2, 3)).all()


def test_the_loss_on_held_out_samples_is_of_the_weights_alone_and_training_does_not_notice(
    model, shards, tmp_path, monkeypatch
):
    show = ValidationConfig(every=2, shards=[shards], samples=7)
    changes = {"steps": 4, "learning_rate": 1e-2, "ema_decay": 0.5}
    run_finetune(settings(model, shards, tmp_path / "without", **changes))
    run_finetune(settings(model, shards, tmp_path / "with", validation=show, **changes))
    assert log_lines(tmp_path / "with") == log_lines(tmp_path / "without")
    assert same(weights(tmp_path / "with"), weights(tmp_path / "without"))

    def lines(out: str) -> list[dict]:
        text = (tmp_path / out / "validation" / "loss.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines()]

    found = lines("with")
    assert [(line["step"], line["samples"]) for line in found] == [(2, 7), (4, 7)]
    assert found[1]["loss"] != found[0]["loss"]
    # The same weights give the same number again, in a run that was stopped too.
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        run_finetune(settings(model, shards, tmp_path / "cut", validation=show, **changes))
    run_finetune(settings(model, shards, tmp_path / "cut", validation=show, **changes))
    assert lines("cut") == found


def test_images_have_the_size_and_the_negative_prompt_that_are_asked_for(tiny_pipe, tmp_path):
    def draw(**changes) -> list[Image.Image]:
        config = ValidationConfig(1, ["a red apple"], steps=2, **changes)
        return Validation(config, torch.device("cpu"), contextlib.nullcontext).draw(tmp_path, tiny_pipe)

    (plain,), (wide,) = draw(), draw(width=96)
    assert plain.size == (64, 64) and wide.size == (96, 64)
    (against,) = draw(negative_prompt="grinning face")
    assert (np.asarray(against) != np.asarray(plain)).any()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ValidationConfig(every=5, prompts=["a"], width=100), "validation.width"),
        (ValidationConfig(every=-1), "validation.every"),
        (ValidationConfig(every=5), "validation.prompts"),
        (ValidationConfig(every=5, prompts=["a"], steps=0), "validation.steps"),
        (ValidationConfig(every=5, prompts=["a"], guidance="amg"), "validation.guidance amg needs validation.index"),
    ],
)
def test_options_that_do_not_go_together_are_named(config, message):
    with pytest.raises(UsageError, match=message):
        check_validation(config)
