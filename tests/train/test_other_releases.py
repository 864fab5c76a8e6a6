"""What a run saves is loaded and drawn with by releases of diffusers and transformers that others use."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from curate.reading.writing import write_shard
from curate.sample_set import load_part
from train.denoising.opening.adapters import WEIGHTS
from train.denoising.opening.config import LoRAConfig
from train.denoising.opening.loading import load_pipeline, sample_model_dir
from train.denoising.opening.original import save_single_file
from train.denoising.opening.saving import save_pipeline
from train.finetune.config import FinetuneConfig
from train.finetune.loop import run_finetune
from train.sample_model.small import tiny_pipeline

OLD = ("diffusers==0.31.0", "transformers==4.46.3", "tokenizers==0.20.3", "huggingface-hub==0.26.5", "peft==0.13.2")
"""The oldest that is in wide use; all else is shared with this environment."""
DRAW = """
import sys
import diffusers, numpy, torch, transformers

folder, variant, adapters, out = sys.argv[1:]
options = {"variant": variant} if variant else {}
pipe = diffusers.StableDiffusionPipeline.from_pretrained(
    folder, torch_dtype=torch.float32, safety_checker=None, local_files_only=True, **options
)
if adapters:
    folder, _, name = adapters.rpartition("/")
    pipe.load_lora_weights(folder, weight_name=name, local_files_only=True)
draw = torch.Generator().manual_seed(0)
image = pipe("grinning face, red apple", num_inference_steps=4, generator=draw, output_type="np").images[0]
numpy.save(out, image)
print(diffusers.__version__, transformers.__version__)
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model with an image processor, as Stable Diffusion 1.x has one."""
    from transformers import CLIPImageProcessor

    pipe = tiny_pipeline()
    pipe.register_modules(feature_extractor=CLIPImageProcessor())
    folder = tmp_path_factory.mktemp("base")
    save_pipeline(pipe, folder)
    return str(folder)


@pytest.fixture(scope="module")
def runs(base: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of runs: weights, half precision, adapters, and from a single file."""
    folder = tmp_path_factory.mktemp("runs")
    samples = load_part("finetune")[:4]
    write_shard(str(folder / "000000.tar"), [(s.key, dict(s.members)) for s in samples])
    save_single_file(load_pipeline(base), folder / "base.safetensors")
    adapters = LoRAConfig(rank=4, alpha=8)
    for name, changes in {
        "full": {"train_text_encoder": True, "save_single_file": True},
        "half": {"save_dtype": "float16"},
        "adapters": {"lora": adapters, "train_text_encoder": True, "learning_rate": 0.1},
        "single": {"model": str(folder / "base.safetensors"), "model_config": base},
    }.items():
        values = {"model": base, "steps": 2, "batch_size": 2, "learning_rate": 1e-3, "workers": 0}
        values |= {"mixed_precision": "no", **changes}
        run_finetune(FinetuneConfig(shards=[str(folder / "000000.tar")], out=str(folder / name), **values))
    return folder


@pytest.fixture(scope="module")
def old_python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The interpreter of an environment with the old releases."""
    folder = tmp_path_factory.mktemp("old") / "environment"
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    packages = next(folder.glob("lib/python*/site-packages"))
    (packages / "shared.pth").write_text(sysconfig.get_paths()["purelib"])
    install = [folder / "bin" / "python", "-m", "pip", "install", "--no-deps", "--quiet", *OLD]
    done = subprocess.run(install, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"the old releases cannot be installed here: {done.stderr.splitlines()[-1]}")
    return str(folder / "bin" / "python")


def drawn(python: str, folder: Path, out: Path, variant: str = "", adapters: str = "") -> tuple[str, np.ndarray]:
    """The versions that drew an image, and the image."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    command = [python, "-c", DRAW, str(folder), variant, adapters, str(out)]
    done = subprocess.run(command, env=env, cwd=out.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), np.load(out)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_old_and_new_releases_load_what_is_saved_and_draw_the_same_image(base, runs, old_python, tmp_path):
    cases = {
        "full": (runs / "full" / "model", "", ""),
        "half": (runs / "half" / "model", "fp16", ""),
        "fused": (runs / "adapters" / "model", "", ""),
        "adapters": (Path(base), "", str(runs / "adapters" / "lora" / WEIGHTS)),
        "kohya": (Path(base), "", str(runs / "adapters" / "lora" / "kohya.safetensors")),
        "single": (runs / "single" / "model", "", ""),
        "carried": (sample_model_dir(), "", ""),
    }
    images = {}
    for name, (folder, variant, adapters) in cases.items():
        old, a = drawn(old_python, folder, tmp_path / "old.npy", variant, adapters)
        new, b = drawn(sys.executable, folder, tmp_path / "new.npy", variant, adapters)
        assert old == "0.31.0 4.46.3" and new != old
        np.testing.assert_allclose(a, b, atol=2e-4, err_msg=name)
        images[name] = b
    assert np.abs(images["adapters"] - images["full"]).max() > 1e-2  # they do something
    for name in ("adapters", "kohya"):
        np.testing.assert_allclose(images[name], images["fused"], atol=2e-4, err_msg=name)


def test_names_in_the_saved_files_are_those_of_the_hubs_models(runs):
    for model in (*(runs / name / "model" for name in ("full", "adapters", "single")), sample_model_dir()):
        with safe_open(model / "text_encoder" / "model.safetensors", "pt") as file:
            assert all(key.startswith("text_model.") for key in file.keys())  # noqa: SIM118
        assert {path.name for path in (model / "tokenizer").iterdir()} >= {"vocab.json", "merges.txt"}
    index = json.loads((runs / "full" / "model" / "model_index.json").read_text())
    assert index["feature_extractor"] == ["transformers", "CLIPImageProcessor"]
    assert "Pil" not in "".join(path.read_text() for path in (runs / "full/model/feature_extractor").iterdir())
    lora = load_file(runs / "adapters" / "lora" / WEIGHTS)
    assert {key.partition(".encoder")[0] for key in lora if key.startswith("text")} == {"text_encoder.text_model"}


def test_half_precision_is_saved_as_the_variant_that_it_is(runs):
    model = runs / "half" / "model"
    assert (model / "unet" / "diffusion_pytorch_model.fp16.safetensors").is_file()
    assert all(v.dtype == torch.float16 for v in load_file(model / "text_encoder" / "model.fp16.safetensors").values())
    assert load_pipeline(str(model), variant="fp16").unet.dtype == torch.float32


def test_adapters_for_other_interfaces_hold_the_same_weights_and_the_scale(runs):
    ours = load_file(runs / "adapters" / "lora" / WEIGHTS)
    theirs = load_file(runs / "adapters" / "lora" / "kohya.safetensors")
    layer = "text_model_encoder_layers_0_self_attn_q_proj"
    assert theirs[f"lora_te_{layer}.alpha"] == 8 and theirs[f"lora_te_{layer}.lora_down.weight"].shape[0] == 4
    assert all(value == 8 for key, value in theirs.items() if key.endswith(".alpha"))
    weights = {key: value for key, value in theirs.items() if not key.endswith(".alpha")}
    assert len(weights) == len(ours)
    scaled = [value * (2 if ".lora_up." in key else 1) for key, value in weights.items()]  # alpha / rank
    found = [sorted(float(v.sum()) for v in state) for state in (scaled, ours.values())]
    assert found[0] == pytest.approx(found[1], rel=1e-5, abs=1e-7)
