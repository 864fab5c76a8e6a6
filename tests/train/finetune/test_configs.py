"""The configs that are shipped, run as their first lines say, on a small model: what they set holds anywhere."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from curate.cli import main as curate
from tests.train import families
from tests.train.finetune.runs import REPOSITORY, log_lines, make_environment
from tests.train.finetune.test_options import photographs
from tests.train.finetune.test_processes import finish
from train.cli import main
from train.denoising.opening.adapters import WEIGHTS
from train.finetune.config import FilterConfig, FinetuneConfig

CONFIGS = REPOSITORY / "configs"
SMALL = {"steps": 2, "batch_size": 2, "workers": 0, "buckets.step": 32, "warmup_steps": 1}


def words(model: str, shards: str, out: Path, **changes: object) -> list[str]:
    values = {"model": model, "shards": f"[{shards}]", "out": out, **SMALL, **changes}
    return [f"--{name}={value}" for name, value in values.items()]


@pytest.mark.parametrize("name", ["finetune", "finetune_lora"])
def test_shipped_configs_run_on_a_machine_without_a_gpu(model, shards, tmp_path, name):
    out = tmp_path / "run"
    assert main(["finetune", "--config", str(CONFIGS / f"{name}.yaml"), *words(model, shards, out)]) == 0
    assert (out / "model" / "model_index.json").is_file() and len(log_lines(out)) == 1
    run = json.loads((out / "run.json").read_text())
    assert run["mixed_precision"] in ("no", "bf16") and run["crop"] == "center" and run["buckets"]["step"] == 32
    chosen = [run["filter"][name] for name in ("policy", "verdict_of", "evidence", "threshold")]
    assert chosen == ["noisy_steps", "caption", "window", None] and run["filter"]["calibrate"]["quantile"] == 0.8


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("sdxl", families.tiny_xl),
        ("sd3", families.tiny_sd3),
        ("flux", families.tiny_flux),
        ("z_image", families.tiny_z_image),
    ],
)
def test_shipped_configs_of_other_families_run_at_a_small_size(shards, tmp_path, name, family):
    family().save_pretrained(tmp_path / "model")
    out, path = tmp_path / "run", str(CONFIGS / f"finetune_{name}_lora.yaml")
    small = words(str(tmp_path / "model"), shards, out, resolution=64, gradient_accumulation=1, batch_size=1)
    assert main(["finetune", "--config", path, *small]) == 0
    run = json.loads((out / "run.json").read_text())
    assert run["cache_text"] == run["cache_latents"] == "disk" and run["filter"]["policy"] == "noisy_steps"
    assert (out / "lora" / WEIGHTS).is_file() and (out / "model" / "model_index.json").is_file()


def test_a_folder_of_photographs_becomes_adapters_that_diffusers_loads_by_one_command(model, tmp_path):
    from diffusers import StableDiffusionPipeline

    out = tmp_path / "run"
    options = words(model, photographs(tmp_path / "photos", 6), out, epochs=1)
    command = ["finetune", "--config", str(CONFIGS / "finetune_lora.yaml"), *options, "--tags.trigger=sks"]
    assert main(command) == 0
    assert json.loads((out / "summary.json").read_text())["steps"] == 3
    pipe = StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    pipe.load_lora_weights(str(out / "lora"), weight_name=WEIGHTS)
    assert pipe.get_active_adapters()


def test_the_curation_config_runs(shards, tmp_path):
    out = tmp_path / "curated"
    command = ["dedup", "--config", str(CONFIGS / "dedup.yaml"), f"--shards=[{shards}]", f"--out={out}"]
    assert curate([*command, "--workers=1"]) == 0
    assert json.loads((out / "summary.json").read_text())["samples"] == 20


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("config", "options"),
    [
        ("finetune", ["--processes", "2"]),
        ("finetune", ["--accelerate", str(CONFIGS / "accelerate" / "fsdp.yaml"), "--processes", "2"]),
        ("finetune", ["--accelerate", str(CONFIGS / "accelerate" / "zero2.yaml"), "--processes", "2"]),
        ("finetune_lora", ["--processes", "2"]),
    ],
)
def test_shipped_configs_run_under_the_commands_that_they_name(model, shards, tmp_path, config, options):
    make_environment(tmp_path / "environment")
    env = os.environ | {"VIRTUAL_ENV": str(tmp_path / "environment"), "PYTHONPATH": str(REPOSITORY)}
    command = [str(REPOSITORY / "launch.sh"), str(CONFIGS / f"{config}.yaml"), *options]
    command += words(model, shards, tmp_path / "run")
    pipes = {"stderr": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    finish(subprocess.Popen(command, env=env | {"OMP_NUM_THREADS": "1"}, **pipes))
    assert json.loads((tmp_path / "run" / "run.json").read_text())["processes"] == 2


def test_the_defaults_are_those_of_the_shipped_config_and_of_the_filters_page():
    config = FinetuneConfig(model="", out="", shards=[])
    assert (config.mixed_precision, config.crop, config.buckets.step) == ("auto", "center", 64)
    found = config.filter.settled()
    page = (REPOSITORY / "docs" / "filter.md").read_text(encoding="utf-8")
    row = f"`recommended`, the default | `{found.policy}` | `{found.verdict_of}` | `{found.evidence}` | "
    assert row + f"{found.calibrate.quantile:g} |" in page and found.threshold is None


def test_axes_win_over_a_preset_and_who_names_a_policy_leaves_it():
    paper = FilterConfig(preset="paper").settled()
    assert (paper.policy, paper.verdict_of, paper.evidence) == ("every_step", "sample", "visit")
    mixed = FilterConfig(preset="recommended", evidence="visit", threshold=2.0).settled()
    assert (mixed.policy, mixed.verdict_of, mixed.evidence) == ("noisy_steps", "caption", "visit")
    named = FilterConfig("one_in_k").settled()
    assert (named.verdict_of, named.evidence, named.calibrate.quantile) == ("sample", "visit", 0.9)
    assert FilterConfig(preset="none").settled().policy == "off" and named.settled() == named
