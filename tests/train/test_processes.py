"""A process of several lets go of their group, and ends."""

from __future__ import annotations

import subprocess
import sys

from tests.conftest import ROOT

# One process is a group, too. Without keep_group() one of the first few dozen rounds hangs.
ROUNDS = """
import os, sys, torch
from torch import distributed
from train.processes import keep_group
torch.set_num_threads(1)
for number in range(300):
    distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/{number}", rank=0, world_size=1)
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 4))
    model(torch.randn(2, 4)).sum().backward()
    exchanged = torch.ones(1)
    distributed.all_reduce(exchanged)
    keep_group()
    distributed.destroy_process_group()
    del model, exchanged
print("ended", flush=True)
os._exit(0)
"""


def test_a_group_that_ends_right_after_an_exchange_never_hangs(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", ROUNDS, str(tmp_path)], capture_output=True, text=True, timeout=240, cwd=ROOT
    )
    assert done.stdout == "ended\n", done.stderr
