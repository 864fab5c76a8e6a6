"""Signals and guidance terms of one's own: by file from the command line, and as an installed package's."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest

from afresh.errors import UsageError
from tests.conftest import ROOT

PARTS = '''
import torch
from train.sampling import Correction, Part


class Alignment:
    name, looks_at, noise_level, unconditional = "alignment", "first step", None, True
    attention = compares_seeds = False

    def observe(self, seen):
        return torch.cosine_similarity(seen.eps_cond.flatten(1), seen.eps_uncond.flatten(1))

    def combine(self, observed):
        return observed.mean(dim=1)

    def of_prompt(self, values):
        return values.mean()


class Less:
    """Halves the step away from the prediction without a prompt."""

    name = "less"

    def start(self, run):
        def step(state):
            rows = torch.arange(run.batch_size, device=state.x_t.device)
            towards = state.guidance_scale * (state.eps_cond - state.eps_uncond)
            return Correction({"less": Part(rows, -SHARE * towards)})

        return step


SHARE = 0.5
'''
ENTRY_POINTS = """
[afresh.signals]
alignment = my_installed_models:Alignment

[afresh.guidance]
less = my_installed_models:Less
"""


@pytest.fixture(scope="module")
def model(tiny_pipe, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_pipe.save_pretrained(folder)
    (folder / "prompts.txt").write_text("red apple\ngrinning face\n")
    return folder


@pytest.fixture(params=["file", "entry point"])
def names(request, tmp_path, monkeypatch) -> dict[str, str]:
    """What the parts are called, and ``PYTHONPATH``."""
    if request.param == "file":
        (tmp_path / "my_models.py").write_text(PARTS)
        return {"signal": "my_models:Alignment", "term": "my_models:Less", "PYTHONPATH": str(ROOT)}
    site = tmp_path / "site"
    about = site / "my_installed_models-1.0.dist-info"
    about.mkdir(parents=True)
    (site / "my_installed_models.py").write_text(PARTS)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: my-installed-models\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(ENTRY_POINTS)
    return {"signal": "alignment", "term": "less", "PYTHONPATH": f"{ROOT}{os.pathsep}{site}"}


def test_prompts_are_scored_by_ones_own_signal_beside_ours(model, names, tmp_path, run_cli):
    options = ["--seeds", "2", "--signals", f"magnitude,{names['signal']}", "--device", "cpu"]
    done = run_cli(
        "train", "detect", "--model", model, "--prompts", model / "prompts.txt", "--out", "scores.parquet", *options,
        PYTHONPATH=names["PYTHONPATH"],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    table = parquet.read_table(tmp_path / "scores.parquet").to_pydict()
    assert len(table["alignment"]) == 4 and all(-1 <= value <= 1.001 for value in table["alignment"])
    assert json.loads((tmp_path / "scores.json").read_text())["signals"] == ["magnitude", "alignment"]


def test_images_are_drawn_with_ones_own_term(model, names, tmp_path, run_cli):
    done = run_cli(
        "train", "sample", "--model", model, "--prompts", model / "prompts.txt", "--out", "less", "--steps", "2",
        "--seeds", "1", "--guidance", names["term"], "--device", "cpu", PYTHONPATH=names["PYTHONPATH"],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    fired = parquet.read_table(tmp_path / "less" / "trace.parquet")["fired"].to_pylist()
    assert fired and all("less" in names for names in fired)


def test_images_of_a_terms_former_code_are_not_taken_over(tmp_path, monkeypatch):
    from afresh import plugins
    from train.sampling.config import SampleConfig
    from train.sampling.terms import registry as terms

    monkeypatch.syspath_prepend(str(tmp_path))
    config = SampleConfig("model", "prompts.txt", "out", guidance="own_changing_models:Less+tokens")
    settings = []
    for share in ("0.5", "0.5", "0.25"):
        (tmp_path / "own_changing_models.py").write_text(PARTS.replace("SHARE = 0.5", f"SHARE = {share}"))
        plugins._code.cache_clear()
        terms.check(config)
        settings.append(terms.settings(config))
    assert settings[0] == settings[1] != settings[2] and list(settings[0]) == config.guidance.split("+")


def test_parts_that_lack_something_are_refused_by_name(tmp_path, monkeypatch):
    from train.memorization.signals.registry import find_signals
    from train.sampling.config import SampleConfig
    from train.sampling.terms import registry as terms

    (tmp_path / "own_lacking_models.py").write_text("class Part:\n    name = 'part'\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UsageError, match="signals 'own_lacking_models:Part' lacks unconditional, .* of_prompt: see"):
        find_signals(["own_lacking_models:Part"], "l2", 1)
    with pytest.raises(UsageError, match="unknown signal magnitud: choose from magnitude, .*, or your own as module:n"):
        find_signals(["magnitud"], "l2", 1)
    config = SampleConfig("model", "prompts.txt", "out", guidance="own_lacking_models:Part")
    with pytest.raises(UsageError, match="--guidance 'own_lacking_models:Part' lacks start"):
        terms.check(config)
    with pytest.raises(UsageError, match="'am' is not known; choose of none, amg, .*, or your own as module:name"):
        terms.names("am")


def test_guidance_that_follows_images_needs_an_embedder_that_can_be_differentiated():
    from curate.index.training_index import TrainingIndex
    from train.sampling.similarity import ObjectLevel

    class Flat:
        name, dim, size, digest = "flat", 2, 8, "flat"

    index = TrainingIndex.build(
        np.eye(2, dtype=np.float16), ["a", "b"], ["s"] * 2, ["x", "y"], np.ones(2, bool), np.arange(2), "flat"
    )
    with pytest.raises(UsageError, match="the embedder 'flat' has no features"):
        ObjectLevel(index, Flat())
