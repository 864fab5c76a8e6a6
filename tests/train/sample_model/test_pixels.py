"""The recipe of the small pixel-space models, at a few steps."""

from __future__ import annotations

import json

import pytest
import torch

from afresh.errors import UserError
from train.sample_model import pixels
from train.sample_model.pixels import PixelsConfig, pixel_set, run
from train.sampling import GuidedUnconditional


def test_the_set_has_repeats_and_classes():
    data = pixel_set(4, 4, 45)
    assert sorted(data.copies.unique().tolist()) == [1, 45] and int((data.copies > 1).sum()) == 4
    assert len(set(data.keys)) == len(data.keys) == len(data.pixels) and data.pixels.shape[1:] == (3, 32, 32)
    assert "Flags" in data.class_names and int(data.labels.max()) == data.null_class - 1


def test_a_stopped_run_ends_with_the_weights_of_one_that_never_stopped(tmp_path, monkeypatch):
    config = PixelsConfig(classes=True, every=40, repeated=2, copies=3, steps=4, batch_size=4, checkpoint_every=2)
    data = pixel_set(40, 2, 3)
    whole, _ = pixels.train(PixelsConfig(**{**vars(config), "out": str(make(tmp_path / "whole"))}), data)

    stopped = PixelsConfig(**{**vars(config), "out": str(make(tmp_path / "stopped"))})
    rate = pixels.learning_rate

    def stop_at_3(step, config):
        if step == 3:
            raise KeyboardInterrupt
        return rate(step, config)

    monkeypatch.setattr(pixels, "learning_rate", stop_at_3)
    with pytest.raises(KeyboardInterrupt):
        pixels.train(stopped, data)
    monkeypatch.undo()
    resumed, _ = pixels.train(stopped, data)
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name
    with pytest.raises(UserError, match="other settings"):
        pixels.train(PixelsConfig(**{**vars(stopped), "lr": 1e-4}), data)


def test_the_result_is_a_pipeline_that_says_what_it_was_trained_on(tmp_path):
    from diffusers import DDPMPipeline

    out = tmp_path / "model"
    run(PixelsConfig(out=str(out), classes=True, every=40, repeated=2, copies=3, steps=1, batch_size=2))
    about = json.loads((out / "training_set.json").read_text())
    assert sum(about["copies"]) == len(about["keys"]) + 2 * 2
    pipe = GuidedUnconditional.from_pipe(
        DDPMPipeline.from_pretrained(out, local_files_only=True),
        null_class=len(about["class_names"]),
        class_names=about["class_names"],
    )
    call = {"class_labels": about["class_names"][0], "num_inference_steps": 2, "guidance_scale": 2.0}
    assert pipe(generator=torch.Generator().manual_seed(0), **call).images[0].size == (32, 32)


def make(folder):
    folder.mkdir()
    return folder
