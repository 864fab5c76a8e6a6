"""Processes that a user starts by torchrun without launch.sh are those of one run, on a CPU too."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.train.finetune.runs import REPOSITORY

PROGRAM = """
import os, sys
from pathlib import Path
from afresh.errors import UserError
from train.finetune.config import FinetuneConfig
from train.finetune.preparation import make_accelerator
try:
    accelerator = make_accelerator(FinetuneConfig(model="", out="", shards=[]))
    said = f"{accelerator.process_index} of {accelerator.num_processes}"
except UserError as error:
    said = str(error)
Path(sys.argv[1], os.environ.get("RANK", "0")).write_text(said)
"""


@pytest.mark.parametrize("processes", [1, 2])
def test_torchrun_by_hand_on_a_cpu_starts_one_run(processes, tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "said").mkdir()
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": ""}
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *start, str(tmp_path / "program.py"), str(tmp_path / "said")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    said = {path.name: path.read_text() for path in Path(tmp_path / "said").iterdir()}
    assert said == {str(rank): f"{rank} of {processes}" for rank in range(processes)}
