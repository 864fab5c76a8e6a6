"""Optimizers by name, and learning rates by step."""

from __future__ import annotations

import math

import pytest
import torch

from afresh.errors import UsageError
from tests.train.finetune.runs import log_lines, same, settings, stop_after, weights
from train.finetune.config import FinetuneConfig
from train.finetune.loop import run_finetune
from train.finetune.state.optimizer import OPTIMIZERS, find_optimizer, learning_rate, make_optimizer


def config(**changes) -> FinetuneConfig:
    return FinetuneConfig(model="", out="", shards=[], **changes)


def made(**changes) -> torch.optim.Optimizer:
    return make_optimizer([torch.nn.Parameter(torch.ones(2))], config(**changes), fused=False)


# --------------------------------------------------------------------------------------------- learning rates


@pytest.mark.parametrize(
    ("schedule", "more", "halfway", "end"),
    [
        ("constant", {}, 1.0, 1.0),
        ("linear", {}, 0.5, 0.0),
        ("polynomial", {"lr_power": 2.0}, 0.25, 0.0),
        ("cosine", {}, 0.5, 0.0),
        ("cosine_restarts", {"lr_cycles": 2}, 1.0, 0.0),
        ("cosine_restarts", {"lr_cycles": 1}, 0.5, 0.0),
    ],
)
def test_learning_rate_warms_up_and_ends_as_its_schedule_says(schedule, more, halfway, end):
    settings = config(steps=110, warmup_steps=10, learning_rate=2.0, lr_schedule=schedule, **more)
    assert learning_rate(0, settings) == pytest.approx(0.2)
    assert learning_rate(9, settings) == learning_rate(10, settings) == pytest.approx(2.0)
    assert learning_rate(60, settings) == pytest.approx(2 * halfway)
    assert learning_rate(110, settings) == pytest.approx(2 * end)


def test_restarts_begin_each_cycle_at_the_peak():
    settings = config(steps=90, learning_rate=1.0, lr_schedule="cosine_restarts", lr_cycles=3)
    assert [learning_rate(step, settings) for step in (0, 30, 60)] == pytest.approx([1, 1, 1])
    assert learning_rate(15, settings) == pytest.approx(0.5)
    assert learning_rate(29, settings) == pytest.approx((1 + math.cos(math.pi * 29 / 30)) / 2)


# ------------------------------------------------------------------------------------------------- optimizers


def test_adamw_gets_the_settings_and_further_arguments_win():
    optimizer = made(learning_rate=0.1, adam_beta2=0.95, weight_decay=0.2)
    assert type(optimizer) is torch.optim.AdamW
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.1, (0.9, 0.95), 0.2)
    group = made(optimizer_args={"betas": [0.5, 0.6], "amsgrad": True}).param_groups[0]
    assert (group["betas"], group["amsgrad"]) == ((0.5, 0.6), True)


class Lion(torch.optim.SGD):
    """An optimizer with betas that are not Adam's."""

    def __init__(self, params, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0):
        super().__init__(params, lr=lr, weight_decay=weight_decay)
        self.betas = betas


def test_each_optimizer_has_its_own_betas_unless_one_is_set(monkeypatch):
    monkeypatch.setitem(OPTIMIZERS, "lion", f"{__name__}.Lion")
    assert made(optimizer="lion").betas == (0.9, 0.99)
    assert made(optimizer="lion", adam_beta2=0.95).betas == (0.9, 0.95)
    assert made(optimizer="lion", adam_beta2=0.95, optimizer_args={"betas": [0.8, 0.9]}).betas == (0.8, 0.9)
    assert made().param_groups[0]["betas"] == (0.9, 0.999)


class Adan(torch.optim.SGD):
    """An optimizer with three betas."""

    def __init__(self, params, lr=1e-3, betas=(0.98, 0.92, 0.99), weight_decay=0.02):
        super().__init__(params, lr=lr, weight_decay=weight_decay)
        self.betas = betas


class Wrapped(torch.optim.AdamW):
    """An optimizer that hands its arguments on."""

    def __init__(self, params, **options):
        super().__init__(params, **options)


def test_what_is_not_set_is_the_optimizers_own_by_its_signature(monkeypatch):
    monkeypatch.setitem(OPTIMIZERS, "lion", f"{__name__}.Lion")
    monkeypatch.setitem(OPTIMIZERS, "adan", f"{__name__}.Adan")
    monkeypatch.setitem(OPTIMIZERS, "wrapped", f"{__name__}.Wrapped")
    assert made(optimizer="lion").param_groups[0]["weight_decay"] == 0
    assert made().param_groups[0]["weight_decay"] == 0.01
    assert made(optimizer="lion", weight_decay=0.1).param_groups[0]["weight_decay"] == 0.1
    assert made(optimizer="adan", adam_beta2=0.5).betas == (0.98, 0.5, 0.99)
    group = made(optimizer="wrapped", learning_rate=0.5, weight_decay=0.1, adam_beta2=0.5).param_groups[0]
    assert (group["lr"], group["weight_decay"], group["betas"]) == (0.5, 0.1, (0.9, 0.5))
    with pytest.raises(UsageError, match="adam_beta2: torch.optim.SGD takes no betas"):
        made(optimizer="torch.optim.SGD", adam_beta2=0.9)


def test_a_learning_rate_among_the_further_arguments_wins_at_every_step(model, shards, tmp_path):
    settings_ = config(learning_rate=1.0, optimizer_args={"lr": 0.5}, steps=10, warmup_steps=2, lr_schedule="linear")
    assert [learning_rate(step, settings_) for step in (0, 2, 6)] == pytest.approx([0.25, 0.5, 0.25])
    run_finetune(settings(model, shards, tmp_path / "named", steps=2, learning_rate=1e-3))
    run_finetune(
        settings(model, shards, tmp_path / "given", steps=2, learning_rate=1e30, optimizer_args={"lr": 1e-3})
    )
    assert same(weights(tmp_path / "named"), weights(tmp_path / "given"))


def test_any_torch_optimizer_is_taken_by_its_dotted_name_with_the_settings_that_it_has():
    optimizer = made(optimizer="torch.optim.SGD", learning_rate=0.1, optimizer_args={"momentum": 0.5})
    assert type(optimizer) is torch.optim.SGD
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]) == (0.1, 0.5)
    assert type(made(optimizer="adafactor")) is torch.optim.Adafactor  # has no betas


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("adamw8bit", "bitsandbytes cannot be imported.*pip install bitsandbytes"),
        ("prodigy", "prodigyopt cannot be imported.*pip install prodigyopt"),
        ("no_such_package.Sgd", "no_such_package cannot be imported"),
        ("torch.optim.Adagrat", "is no torch optimizer"),
        ("torch.nn.Linear", "is no torch optimizer"),
        ("adam", "choose one of adamw, adafactor"),
    ],
)
def test_an_optimizer_that_cannot_be_had_is_named_with_what_to_do(monkeypatch, name, message):
    for package in ("bitsandbytes", "prodigyopt"):  # as on a machine without them
        monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(UsageError, match=message):
        find_optimizer(name)


def test_an_argument_that_the_optimizer_does_not_take_is_named():
    with pytest.raises(UsageError, match="optimizer adamw.*momentum"):
        made(optimizer_args={"momentum": 0.5})


def test_a_run_with_another_optimizer_goes_on_bit_for_bit(model, shards, tmp_path, monkeypatch):
    changes = {"optimizer": "torch.optim.NAdam", "lr_schedule": "cosine_restarts", "lr_cycles": 2}
    run_finetune(settings(model, shards, tmp_path / "whole", **changes))
    stop_after(monkeypatch, 1)
    assert run_finetune(settings(model, shards, tmp_path / "cut", **changes))["stopped"]
    run_finetune(settings(model, shards, tmp_path / "cut", **changes))
    assert log_lines(tmp_path / "cut") == log_lines(tmp_path / "whole")
    assert same(weights(tmp_path / "cut"), weights(tmp_path / "whole"))
