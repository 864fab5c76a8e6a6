"""What can be seen to be wrong at the start is said before torch, diffusers or a model are loaded."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from curate.reading.writing import write_shard
from curate.sample_set import load_part
from train.cli import VERBS
from train.sample_model.small import tiny_pipeline

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import contextlib, io, json, sys
from train.cli import main
found = []
for argv in json.load(sys.stdin):
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = main(argv)
    heavy = [name for name in ("torch", "diffusers", "transformers", "accelerate") if name in sys.modules]
    found.append([code, said.getvalue(), heavy])
print(json.dumps(found))
"""


def said_at_the_start(command_lines: list[list[str]], **env: str) -> list[tuple[int, str, list[str]]]:
    """Exit code, what stands on stderr, and which heavy packages are loaded after each of some command lines."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=json.dumps([[str(word) for word in words] for words in command_lines]),
        env=os.environ | {"PYTHONPATH": str(ROOT)} | env,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return [tuple(one) for one in json.loads(done.stdout.splitlines()[-1])]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a model that lacks a part, one that is cut short, a shard, and files of prompts."""
    folder = tmp_path_factory.mktemp("here")
    tiny_pipeline().save_pretrained(folder / "model")
    shutil.copytree(folder / "model", folder / "broken")
    shutil.rmtree(folder / "broken" / "vae")
    weights = (folder / "model" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    (folder / "cut.safetensors").write_bytes(weights[: len(weights) // 2])
    samples = load_part("finetune")[:3]
    write_shard(str(folder / "0.tar"), [(sample.key, dict(sample.members)) for sample in samples])
    rows = [{"caption": "a cat", "image": "gone.png"}, *({"caption": f"dog {n}", "label": 0} for n in range(3))]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "table.csv").write_text("words\na cat\n")
    return folder


def test_every_verb_that_opens_a_model_says_what_is_missing_before_anything_heavy_is_loaded(here):
    model, prompts = ["--model", here / "model"], ["--prompts", here / "prompts.jsonl"]
    detect, localize = ["detect", "--out", here / "s.parquet"], ["localize", "--out", here / "n.json"]
    audit, sample = ["audit", "--out", here / "audited"], ["sample", "--out", here / "drawn"]
    explain = ["explain", "--prompt", "a cat"]
    finetune = ["finetune", "--out", here / "run", "--shards", here / "0.tar"]
    cases = [
        ([*detect, *model, "--prompts", here / "none.txt"], "none.txt: no such prompt file"),
        ([*detect, *model, "--prompts", here / "table.csv"], "no column caption"),
        ([*detect, *prompts, "--model", here / "broken"], "lacks vae"),
        ([*detect, *prompts, *model, "--steps", 60], "steps is 60"),
        ([*detect, *model, "--prompts", here], "no index in"),
        ([*detect, *prompts, *model, "--lora", here / "a.safetensors"], "no such LoRA file"),
        ([*localize, *prompts, "--model", here / "nowhere" / "at" / "all"], "no such model folder"),
        ([*localize, *model, "--prompts", here / "none.txt"], "no such prompt file"),
        ([*localize, *prompts, *model, "--edited_model", here], "holds something else already"),
        ([*audit, *model, *prompts], "gone.png: the image of 'a cat' is missing"),
        ([*audit, *model, *prompts, "--seeds", 0], "seeds is 0"),
        ([*sample, *prompts, "--model", here / "cut.safetensors"], "not a whole safetensors file"),
        ([*sample, *prompts, *model, "--index", here], "no index in"),
        ([*sample, *model, "--prompts", here / "none.txt"], "no such prompt file"),
        ([*explain, "--model", here / "broken"], "lacks vae"),
        ([*explain, *model, "--out", "page.txt"], "ends in .html"),
        ([*finetune, "--model", here / "broken"], "lacks vae"),
        ([*finetune, *model, "--batch_size", 0], "batch_size must be positive"),
        ([*finetune, *model, "--shards", here / "1.tar"], "no such file"),
        ([*finetune, *model, "--filter.policy", "every_step", "--filter.threshold", "auto"], "there are no thresholds"),
        ([*finetune, *model, "--mixed_precision", "fp16"], "mixed_precision fp16 needs a GPU"),
        (["evaluate", "--protocol", here / "none.yaml", "--out", here / "e"], "no such protocol file"),
    ]
    found = said_at_the_start([argv for argv, _ in cases], ACCELERATE_USE_CPU="true")
    for (argv, needle), (code, said, heavy) in zip(cases, found, strict=True):
        assert code in (1, 2) and needle in said and said.count("\n") == 1, (argv, said)
        assert heavy == [], argv


def test_fp16_without_a_gpu_is_told_by_torch_alone(here):
    argv = ["finetune", "--model", here / "model", "--shards", here / "0.tar", "--out", here / "run"]
    ((code, said, heavy),) = said_at_the_start([[*argv, "--mixed_precision", "fp16"]], CUDA_VISIBLE_DEVICES="")
    assert code == 2 and "mixed_precision fp16 needs a GPU" in said
    assert heavy == ["torch"]


def test_a_device_and_a_guidance_that_do_not_exist_are_told_by_torch_alone(here):
    sample = ["sample", "--model", here / "model", "--prompts", here / "prompts.jsonl", "--out", here / "drawn"]
    cases = [[*sample, "--device", "cuda:99"], [*sample, "--guidance", "agm"]]
    needles = ("device cuda:99", "'agm' is not known")
    for (code, said, heavy), needle in zip(said_at_the_start(cases), needles, strict=True):
        assert code == 2 and needle in said
        assert heavy == ["torch"]


def test_what_is_right_passes_and_checking_starts_nothing(here):
    argv = ["--model", here / "model", "--prompts", here / "prompts.jsonl", "--check_config"]
    cases = [
        ["detect", *argv, "--out", here / "s.parquet"],
        ["localize", *argv, "--out", here / "n.json"],
        ["sample", *argv, "--out", here / "drawn"],
    ]
    before = sorted(here.iterdir())
    assert [(code, said) for code, said, _ in said_at_the_start(cases)] == [(0, "")] * 3
    assert sorted(here.iterdir()) == before


def test_every_verb_that_opens_a_model_has_a_check():
    assert {name for name, verb in VERBS.items() if not verb.check} == {"check", "quickstart", "verdicts", "reports"}
