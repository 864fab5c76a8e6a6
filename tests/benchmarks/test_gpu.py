"""The measurements of a GPU, run on a tiny model: each run is made and stands on the page; no page is made up."""

from __future__ import annotations

import json

import pytest
import torch

from afresh.errors import UsageError
from benchmarks import gpu

FEW = ["--steps=2", "--warm=1", "--batch=2", "--draw-steps=2", "--workers=0", "--tiny"]


def test_every_run_of_the_pattern_is_measured_and_stands_on_the_page(tmp_path, capsys):
    page = tmp_path / "page.md"
    names = [gpu.SCRIPT, "full", "full, filter by default", "full, images from shards", "LoRA"]
    gpu.main([*FEW, f"--out={page}", f"--only={'|'.join(names)}"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [row["run"] for row in rows] == names
    for row in rows:
        assert row["samples/s"] == pytest.approx(2 * row["steps/s"]) and row["steps/s"] > 0
        assert row["run"] == gpu.SCRIPT or 0 <= row["waits for data"] < 1
        assert (row["memory, GB"] is None) != torch.cuda.is_available()
    text = page.read_text()
    shown = rows[0]["steps/s"] / rows[1]["steps/s"]
    assert f"{shown:.3f} of {gpu.SCRIPT}" in text
    assert all(f"| {name} |" in text for name in [*names, "none", "amg, nothing near", "amg, acting"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("arguments", [[], ["--tiny"], ["--out=page.md"]])
def test_without_a_gpu_its_page_is_not_written(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="no GPU"):
        gpu.main(arguments)
    assert not list(tmp_path.iterdir())
