"""The filter in a training loop that is not ours."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from afresh.errors import UsageError, UserError
from curate.reading.samples import read_samples
from tests.documents import ROOT, run_page
from train.filter import Calibration, MemorizationFilter


def judge(**settings) -> MemorizationFilter:
    """A filter whose unconditional prediction is zero: a magnitude is the norm of what the model gave."""
    return MemorizationFilter(DDPMScheduler(), lambda x, t: torch.zeros_like(x), **settings)


def batch(magnitudes: list[float]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    output = torch.zeros(len(magnitudes), 1, 2, 2)
    output[:, 0, 0, 0] = torch.tensor(magnitudes)
    return output, torch.zeros_like(output), torch.full((len(magnitudes),), 950)


def test_what_reaches_the_threshold_weighs_nothing_but_not_without_its_caption():
    memorization = judge(threshold=2.0)
    assert memorization(*batch([1.0, 3.0, 3.0]), ["a", "b", ""]).tolist() == [1, 0, 1]
    assert {**memorization.report(), "thresholds": None} == {
        "seen": 3, "judged": 2, "dropped": 1, "dropped_share": 0.333, "thresholds": None
    }  # fmt: skip


def test_captions_may_be_token_ids():
    empty = torch.tensor([9, 9])
    memorization = judge(threshold=2.0, empty=empty)
    ids = torch.tensor([[1, 9], [2, 9], [9, 9]])
    assert memorization(*batch([1.0, 3.0, 3.0]), ids).tolist() == [1, 0, 1]


def test_only_judged_rows_are_asked_without_their_caption_and_no_gradient_is_kept():
    asked = []

    def unconditional(x, t):
        asked.append((len(x), torch.is_grad_enabled()))
        return torch.zeros_like(x)

    memorization = MemorizationFilter(
        DDPMScheduler(), unconditional, policy="noisy_steps", min_timestep=900, threshold=2.0
    )
    output, x_t, t = batch([3.0, 3.0, 3.0])
    t[0] = 10
    weights = memorization(output.requires_grad_(), x_t, t, ["a", "b", ""])
    assert asked == [(1, False)] and not weights.requires_grad and weights.tolist() == [1, 0, 1]


def test_the_threshold_is_found_in_the_run_and_the_record_grows_with_the_captions():
    memorization = judge(calibrate=Calibration(steps=10, quantile=0.9, per_band=False, window=0))
    generator = torch.Generator().manual_seed(0)
    for call in range(10):
        magnitudes = (1 + torch.rand(20, generator=generator)).tolist()
        assert memorization(*batch(magnitudes), [f"caption {call} {n}" for n in range(20)]).tolist() == [1] * 20
    found = memorization.report()["thresholds"][0]
    assert 1.8 < found < 2.0
    assert memorization(*batch([found + 0.1, found - 0.1]), ["new", "caption 0 0"]).tolist() == [0, 1]
    assert memorization.report()["seen"] == 202


def test_a_state_that_is_taken_over_decides_as_if_nothing_had_happened():
    settings = {"calibrate": Calibration(steps=4, per_band=False), "evidence": "window"}
    one, other = judge(**settings), judge(**settings)
    generator = torch.Generator().manual_seed(0)
    batches = [(1 + torch.rand(20, generator=generator)).tolist() for _ in range(12)]
    captions = [[f"{n % (7 + call)}" for n in range(20)] for call in range(12)]
    for magnitudes, texts in zip(batches[:6], captions[:6], strict=True):
        one(*batch(magnitudes), texts)
    other.load_state_dict(one.state_dict())
    after = [[f(*batch(m), c).tolist() for m, c in zip(batches[6:], captions[6:], strict=True)] for f in (one, other)]
    assert after[0] == after[1] and one.report() == other.report()
    assert any(0 in weights for weights in after[0])


def test_bad_usage_is_refused_by_name():
    with pytest.raises(UserError, match="FlowMatchEulerDiscreteScheduler has no noise schedule of betas"):
        MemorizationFilter(FlowMatchEulerDiscreteScheduler(), lambda x, t: x)
    with pytest.raises(UsageError, match="filter.k must be 1 or more"):
        judge(policy="one_in_k", k=0)
    with pytest.raises(ValueError, match="3 samples and 2 captions"):
        judge(threshold=1.0)(*batch([1.0] * 3), ["a", "b"])


def _process(rank: int, world: int, place: str, magnitudes: list[list[float]], captions: list[list[str]]) -> None:
    """A process of a run: its part of each batch, the last of which is smaller."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{place}/meet", rank=rank, world_size=world)
    memorization = judge(calibrate=Calibration(steps=4, quantile=0.8, per_band=False), policy="one_in_k", k=2)
    weights = []
    for numbers, texts in zip(magnitudes, captions, strict=True):
        half = (len(numbers) + world - 1) // world
        part = slice(rank * half, (rank + 1) * half)
        weights.append(memorization(*batch(numbers[part]), texts[part]).tolist())
    torch.save((weights, memorization.report()), f"{place}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_several_processes_decide_as_one(tmp_path):
    generator = torch.Generator().manual_seed(0)
    sizes = [40] * 8 + [13]
    magnitudes = [(1 + torch.rand(size, generator=generator)).tolist() for size in sizes]
    captions = [[f"{n * n % 31}" for n in range(size)] for size in sizes]
    torch.multiprocessing.spawn(_process, (2, str(tmp_path), magnitudes, captions), nprocs=2)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    alone = judge(calibrate=Calibration(steps=4, quantile=0.8, per_band=False), policy="one_in_k", k=2)
    whole = [alone(*batch(m), c).tolist() for m, c in zip(magnitudes, captions, strict=True)]
    assert [a + b for a, b in zip(parts[0][0], parts[1][0], strict=True)] == whole
    assert parts[0][1] == parts[1][1] == alone.report()
    assert any(0 in weights for weights in whole)


def test_the_script_of_the_page_trains_and_its_filter_judges_each_visit(model, shards, tmp_path, monkeypatch):
    """A plain script of diffusers, as the page has it, run as its reader would."""
    (tmp_path / "model").symlink_to(model)
    (tmp_path / "kept").mkdir()
    samples = [one for path in sorted(Path(shards).glob("*.tar")) for one in read_samples(str(path))]
    with open(tmp_path / "kept" / "metadata.jsonl", "w", encoding="utf-8") as table:
        for number, sample in enumerate(samples):
            (tmp_path / "kept" / f"{number}.webp").write_bytes(sample.image)
            table.write(json.dumps({"file_name": f"{number}.webp", "text": sample.caption}) + "\n")
    monkeypatch.chdir(tmp_path)
    assert run_page("trainers.md") == 1
    script = Path("plain_training.py").read_text(encoding="utf-8")
    assert len(re.findall(r"^.*\b(?:memorization|empty|empty_ids|MemorizationFilter)\b", script, re.MULTILINE)) <= 10
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "plain_training.py"], capture_output=True, text=True, env=env, timeout=240)
    assert done.returncode == 0, done.stderr
    report = ast.literal_eval(done.stdout)
    assert (report["seen"], report["judged"]) == (2 * len(samples), 2 * len(samples))
