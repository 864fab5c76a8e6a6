"""The moving average of the weights."""

from __future__ import annotations

import pytest
import torch

from tests.train.finetune.runs import same, settings, weights
from train.finetune.loop import run_finetune
from train.finetune.state.average import Average


def parameters() -> list[torch.nn.Parameter]:
    g = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=g)) for shape in ((3, 4), (5,))]


@pytest.mark.parametrize("device", [None, "cpu"])
def test_the_average_follows_closely_at_first_and_by_its_decay_later(device):
    mine = parameters()
    average = Average(mine, 0.5, device)
    expected = [p.detach().clone() for p in mine]
    for updates in range(1, 12):
        for p in mine:
            p.data += 1
        average.update(updates)
        decay = min(0.5, (1 + updates) / (10 + updates))  # 2/11, 3/12, … and 0.5 from the eighth update on
        expected = [decay * e + (1 - decay) * p.detach() for e, p in zip(expected, mine, strict=True)]
    torch.testing.assert_close(average.values, expected)


def test_parameters_hold_the_average_within_the_block_and_themselves_after_it():
    mine = parameters()
    average = Average(mine, 0.9)
    for p in mine:
        p.data.mul_(1.7)
    own, mean = [p.detach().clone() for p in mine], [v.clone() for v in average.values]
    with average.in_place():
        assert all(torch.equal(p, v) for p, v in zip(mine, mean, strict=True))
    assert all(torch.equal(p, v) for p, v in zip(mine, own, strict=True))
    assert all(torch.equal(p, v) for p, v in zip(average.values, mean, strict=True))


def test_without_a_decay_nothing_is_kept_and_nothing_changes():
    mine = parameters()
    average = Average(mine, 0.0)
    before = [p.detach().clone() for p in mine]
    average.update(1)
    average.copy_to_parameters()
    with average.in_place():
        assert all(torch.equal(p, v) for p, v in zip(mine, before, strict=True))
    assert average.state_dict() == {"values": []}


def test_an_average_kept_on_the_cpu_is_the_one_kept_beside_the_weights(model, shards, tmp_path):
    for device in ("auto", "cpu"):
        run_finetune(settings(model, shards, tmp_path / device, ema_decay=0.9, ema_device=device))
    run_finetune(settings(model, shards, tmp_path / "last"))
    assert same(weights(tmp_path / "auto"), weights(tmp_path / "cpu"))
    assert not same(weights(tmp_path / "auto"), weights(tmp_path / "last"))
