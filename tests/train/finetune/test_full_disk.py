"""A full disk stops training with one line that names what could not be written, and costs nothing that was done."""

from __future__ import annotations

import gc
import re

import pytest

from afresh.errors import UserError
from tests.curate.test_full_disk import disk  # noqa: F401  # a fixture
from tests.train.finetune.runs import log_lines, same, settings, weights
from train.finetune.loop import run_finetune

PAGE = 4096
SAYS = re.compile(r"\S+ (the checkpoint could not|cannot) be written: No space left on device; make room, and the same")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_wherever_the_disk_is_full_the_run_says_so_and_goes_on_bit_for_bit(model, shards, tmp_path, disk, schedule):  # noqa: F811
    changes = {"steps": 24, "batch_size": 1, "ema_decay": 0.9, "lr_schedule": schedule}
    changes["checkpoint_every"] = 12 if schedule == "constant" else 0
    run_finetune(settings(model, shards, tmp_path / "whole", **changes))
    said = []
    for pages in (3, 6, 60, 300, 1200, 3000):  # the log, the verdicts, the model or the checkpoints
        config = settings(model, shards, disk(pages * PAGE) / "run", **changes)
        try:
            run_finetune(config)
        except UserError as error:
            said.append(str(error))
        gc.collect()  # files that the failed attempt holds open
    assert len(said) >= 3 and all(SAYS.match(line) for line in said), said
    run_finetune(config)
    assert log_lines(tmp_path / "disk" / "run") == log_lines(tmp_path / "whole")
    assert same(weights(tmp_path / "disk" / "run"), weights(tmp_path / "whole"))
