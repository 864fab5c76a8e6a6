"""The fine-tuning loop on real shards and a tiny random model: one process and two, settings, bad input."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from afresh.errors import UsageError, UserError
from curate.reading.writing import write_shard
from curate.sample_set import load_part
from tests.train.finetune.runs import launch, log_lines, same, settings, weights
from train.denoising.opening.loading import load_pipeline
from train.denoising.schedules import NoiseSchedule
from train.finetune.config import FilterConfig, FinetuneConfig, RandomWords, ValidationConfig
from train.finetune.data.order import SampleOrder
from train.finetune.data.scan import ShardSet
from train.finetune.loop import run_finetune
from train.finetune.preparation import resolve_precision


@pytest.mark.parametrize("amx, precision", [(True, "bf16"), (False, "no")])
def test_auto_precision_is_bf16_only_where_it_is_fast(monkeypatch, amx, precision):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": amx}, raising=False)
    assert resolve_precision("auto") == precision
    assert resolve_precision("fp16") == "fp16"


def test_training_changes_the_unet_alone_and_leaves_a_pipeline_that_diffusers_loads(model, shards, tmp_path):
    from diffusers import StableDiffusionPipeline

    summary = run_finetune(settings(model, shards, tmp_path / "run", cache_latents=True))
    assert summary["samples_seen"] == 16 and summary["dropped"] == 0
    before = load_pipeline(model)
    after = StableDiffusionPipeline.from_pretrained(summary["model"], safety_checker=None)
    assert not same(before.unet.state_dict(), after.unet.state_dict())
    assert same(before.text_encoder.state_dict(), after.text_encoder.state_dict())
    assert [line["step"] for line in log_lines(tmp_path / "run")] == [1, 2, 3, 4]
    assert run_finetune(settings(model, shards, tmp_path / "run", cache_latents=True)) == summary


def test_accumulated_batches_give_the_gradient_of_the_whole_batch(model, shards, tmp_path):
    run_finetune(settings(model, shards, tmp_path / "whole", steps=1, batch_size=8))
    run_finetune(settings(model, shards, tmp_path / "parts", steps=1, batch_size=4, gradient_accumulation=2))
    (whole,), (parts_,) = log_lines(tmp_path / "whole"), log_lines(tmp_path / "parts")
    assert parts_["loss"] == pytest.approx(whole["loss"], rel=1e-4)
    assert parts_["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-3)


def test_a_folder_begun_with_other_settings_is_refused_by_name(model, shards, tmp_path):
    run_finetune(settings(model, shards, tmp_path / "run", steps=1))
    with pytest.raises(UsageError, match="learning_rate"):
        run_finetune(settings(model, shards, tmp_path / "run", steps=1, learning_rate=2e-3))


def test_a_model_with_a_part_missing_is_named(model, shards, tmp_path):
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    shutil.rmtree(broken / "vae")
    with pytest.raises(UserError, match="lacks vae"):
        run_finetune(settings(str(broken), shards, tmp_path / "run"))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"steps": 0}, "steps"),
        ({"caption_dropout": 1.0}, "caption_dropout"),
        ({"random_words": RandomWords(number=-1)}, "random_words"),
        ({"random_words": RandomWords(number=4), "cache_text": True}, "cache_text"),
        ({"learning_rate": -1.0}, "learning_"),
        ({"max_bad_steps": 0}, "max_bad_steps"),
        ({"noise_offset": -0.1}, "noise_offset"),
        ({"optimizer": "adamm"}, "optimizer 'adamm'"),
        ({"trackers": ["tensorbored"]}, "trackers"),
        ({"validation": ValidationConfig(every=3)}, "validation.prompts"),
        ({"zero_terminal_snr": True}, "zero_terminal_snr"),
    ],
)
def test_settings_out_of_range_are_named(model, shards, tmp_path, change, word):
    with pytest.raises(UsageError, match=word):
        run_finetune(settings(model, shards, tmp_path / "run", **change))


# ------------------------------------------------------------------------------------------- bad numbers, options


def spoil(monkeypatch: pytest.MonkeyPatch, calls: set[int], sample: int) -> None:
    """Make the loss of one sample NaN at some forward passes, counted from 0."""
    from train.finetune import loop

    errors, count = loop.sample_errors, iter(range(1000))

    def spoiled(output, target, *how):
        losses = errors(output, target)
        if next(count) in calls:
            losses = losses * torch.where(torch.arange(len(losses)) == sample, float("nan"), 1.0)
        return losses

    monkeypatch.setattr(loop, "sample_errors", spoiled)


def test_a_step_whose_loss_is_not_finite_names_its_sample_and_changes_nothing(model, shards, tmp_path, monkeypatch):
    from train.finetune.state.average import Average

    moved, update = [], Average.update
    monkeypatch.setattr(Average, "update", lambda self, updates: (moved.append(updates), update(self, updates)))
    spoil(monkeypatch, {2}, sample=1)
    summary = run_finetune(settings(model, shards, tmp_path / "run", ema_decay=0.9))
    lines = log_lines(tmp_path / "run")
    config = settings(model, shards, tmp_path / "run")
    (named,) = lines[2]["not_finite"]
    assert named == "/".join(sample_at(config, 2 * 4 + 1))
    assert [line["skipped_steps"] for line in lines] == [0, 0, 1, 1]
    assert ["not_finite" in line for line in lines] == [False, False, True, False]
    assert summary["skipped_steps"] == 1 and summary["steps"] == 4
    assert moved == [1, 2, 3]  # neither the average nor its count of updates moves on the skipped step


def sample_at(config: FinetuneConfig, position: int) -> tuple[str, str]:
    found = ShardSet(Path(config.out) / "samples.arrow")
    row, _ = SampleOrder(found.counts, config.shuffle_shards, config.seed).at(position)
    return found.identity(row)


def test_bad_steps_in_a_row_stop_the_run_and_single_ones_do_not(model, shards, tmp_path, monkeypatch):
    spoil(monkeypatch, {0, 2, 4, 5}, sample=0)
    with pytest.raises(UserError, match="not finite at 2 steps in a row, last at step 6 with .*/.*learning_rate"):
        run_finetune(settings(model, shards, tmp_path / "run", steps=10, max_bad_steps=2))
    assert len(log_lines(tmp_path / "run")) == 5


def test_a_diverged_run_stops_by_itself(model, shards, tmp_path):
    with pytest.raises(UserError, match="not finite at 2 steps in a row"):
        run_finetune(settings(model, shards, tmp_path / "run", steps=20, learning_rate=1e30, max_bad_steps=2))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_processes_whose_loss_is_not_finite_stop_together_and_name_the_samples_of_both(model, shards, tmp_path):
    config = settings(
        model, shards, tmp_path / "run", steps=20, batch_size=1, learning_rate=1e30, max_bad_steps=2
    )  # fmt: skip
    process = launch(config, processes=2)
    assert process.wait(timeout=120) == 1
    assert "not finite at 2 steps in a row" in process.communicate()[1]
    named = [line["not_finite"] for line in log_lines(tmp_path / "run") if "not_finite" in line]
    assert named and all(len(names) == 2 for names in named)


def test_a_gradient_that_is_not_finite_is_a_bad_step_too(model, shards, tmp_path, monkeypatch):
    spoil_gradients(monkeypatch, {1})
    summary = run_finetune(settings(model, shards, tmp_path / "run", max_grad_norm=0.0))
    lines = log_lines(tmp_path / "run")
    assert summary["skipped_steps"] == 1 and len(lines[1]["not_finite"]) == 4
    assert all(weight.isfinite().all() for weight in weights(tmp_path / "run").values())


def test_a_sample_of_weight_zero_whose_latents_are_not_finite_spoils_nothing(model, tmp_path, monkeypatch):
    from train.finetune import loop

    shards = tmp_path / "shards"
    members = [(sample.key, dict(sample.members)) for sample in load_part("finetune")[:4]]
    notes = [json.dumps({"weight": float(number != 2)}).encode() for number in range(4)]
    shards.mkdir()
    weighed = [(key, own | {"json": note}) for (key, own), note in zip(members, notes, strict=True)]
    write_shard(str(shards / "0.tar"), weighed)
    sample, nan = loop.sample_posterior, float("nan")

    def spoiled(moments, posterior, factor):  # as a VAE's in half precision
        x_0 = sample(moments, posterior, factor)
        rows.append(len(x_0))
        return torch.where(weight_zero[:, None, None, None], nan, x_0)

    rows: list[int] = []
    changes = {"steps": 1, "weight_field": "weight", "caption_dropout": 0.0}
    config = settings(model, str(shards), tmp_path / "run", **changes)
    run_finetune(dataclasses.replace(config, out=str(tmp_path / "plain")))
    found = ShardSet(tmp_path / "plain" / "samples.arrow")
    order = SampleOrder(found.counts, config.shuffle_shards, config.seed)
    weight_zero = torch.tensor([order.at(position)[0] == 2 for position in range(4)])
    monkeypatch.setattr(loop, "sample_posterior", spoiled)
    assert run_finetune(config)["skipped_steps"] == 0 and rows == [4] and weight_zero.sum() == 1
    assert same(weights(tmp_path / "run"), weights(tmp_path / "plain"))


def with_loss_scaling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scale the loss on the CPU as fp16 has it on a GPU: an overflow skips the step and halves the scale."""
    from train.finetune import loop

    plain = loop.make_accelerator

    def scaled(config):
        accelerator = plain(config)
        accelerator.scaler = torch.amp.GradScaler("cpu")
        return accelerator

    monkeypatch.setattr(loop, "make_accelerator", scaled)


def spoil_gradients(monkeypatch: pytest.MonkeyPatch, calls: set[int]) -> None:
    """An infinite slope at some forward passes, counted from 0, where the loss is finite."""
    from train.finetune import loop

    weigh, count = loop.weighted_loss, iter(range(1000))

    def steep(losses, weights, nominal):
        loss = weigh(losses, weights, nominal)
        return loss + (loss - loss.detach()).abs().sqrt() if next(count) in calls else loss

    monkeypatch.setattr(loop, "weighted_loss", steep)


def test_gradients_that_overflow_at_every_step_of_fp16_stop_the_run(model, shards, tmp_path, monkeypatch):
    with_loss_scaling(monkeypatch)
    spoil_gradients(monkeypatch, set(range(100)))
    with pytest.raises(UserError, match="gradient was not finite at 3 steps in a row, last at step 3"):
        run_finetune(settings(model, shards, tmp_path / "run", steps=12, max_bad_steps=3))
    assert not (tmp_path / "run" / "model").exists()


def test_single_overflows_of_fp16_lower_the_scale_and_the_run_goes_on(model, shards, tmp_path, monkeypatch, capsys):
    with_loss_scaling(monkeypatch)
    spoil_gradients(monkeypatch, {0, 1, 3, 4})
    summary = run_finetune(settings(model, shards, tmp_path / "run", steps=6, max_bad_steps=3))
    assert summary["skipped_steps"] == 4
    assert "not finite" not in capsys.readouterr().err


def test_a_run_that_changed_nothing_says_so(model, shards, tmp_path, monkeypatch, capsys):
    with_loss_scaling(monkeypatch)
    spoil_gradients(monkeypatch, {0, 1})
    run_finetune(settings(model, shards, tmp_path / "run", steps=2))
    assert "none of the 2 steps changed the weights" in capsys.readouterr().err


def test_half_precision_that_the_machine_has_not_is_named(model, shards, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="mixed_precision fp16"):
        run_finetune(settings(model, shards, tmp_path / "run", mixed_precision="fp16"))


@pytest.mark.slow
def test_a_compiled_unet_trains_alike_and_is_saved_under_its_own_names(model, shards, tmp_path, monkeypatch):
    # Traced and differentiated ahead of time as always; generating C++ for it would take minutes.
    whole = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: whole(self, backend="aot_eager"))
    changes = {"steps": 2, "filter": FilterConfig("every_step", threshold=1e9)}
    run_finetune(settings(model, shards, tmp_path / "plain", **changes))
    run_finetune(settings(model, shards, tmp_path / "compiled", compile=True, checkpoint_every=1, **changes))
    plain, compiled = weights(tmp_path / "plain"), weights(tmp_path / "compiled")
    assert plain.keys() == compiled.keys()
    for a, b in zip(log_lines(tmp_path / "plain"), log_lines(tmp_path / "compiled"), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-3)


def test_deterministic_algorithms_are_used_where_asked_for_alone(model, shards, tmp_path, monkeypatch):
    seen, noised = [], NoiseSchedule.noised

    def watched(self, *arguments):
        seen.append(torch.are_deterministic_algorithms_enabled())
        return noised(self, *arguments)

    monkeypatch.setattr(NoiseSchedule, "noised", watched)
    run_finetune(settings(model, shards, tmp_path / "strict", steps=1, deterministic=True))
    run_finetune(settings(model, shards, tmp_path / "plain", steps=1))
    assert seen == [True, False]
    assert same(weights(tmp_path / "strict"), weights(tmp_path / "plain"))
