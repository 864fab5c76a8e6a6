"""Optimizers by name and learning rates by step."""

from __future__ import annotations

import pytest

from train.finetune.config import FinetuneConfig
from train.finetune.optimizer import learning_rate


def test_learning_rate_warms_up_and_ends_as_its_schedule_says():
    config = FinetuneConfig(
        model="", out="", shards=[], steps=110, warmup_steps=10, learning_rate=1.0, lr_schedule="cosine"
    )
    assert learning_rate(0, config) == pytest.approx(0.1)
    assert learning_rate(10, config) == pytest.approx(1.0)
    assert learning_rate(60, config) == pytest.approx(0.5)
    assert learning_rate(110, config) == pytest.approx(0.0)
