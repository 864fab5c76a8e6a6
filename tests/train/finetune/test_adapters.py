"""Adapters: trained beside frozen weights, saved so that diffusers takes them, resumed bit for bit."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from afresh.errors import UsageError, UserError
from tests.train.finetune.runs import launch, log_lines, same, wait_for_step
from tests.train.finetune.runs import settings as run_settings
from train.denoising.families.stable_diffusion import encode_captions
from train.denoising.opening.adapters import WEIGHTS, add_lora, fuse_lora, save_lora
from train.denoising.opening.config import LoRAConfig
from train.denoising.opening.loading import load_pipeline
from train.finetune.config import FilterConfig, FinetuneConfig, ValidationConfig
from train.finetune.loop import run_finetune
from train.finetune.model.trained import load_model
from train.finetune.state.checkpoint import load_latest

CPU = torch.device("cpu")


def settings(model: str, shards: str, out: Path, **changes) -> FinetuneConfig:
    lora = {"learning_rate": 1e-2, "lora": LoRAConfig(rank=4, alpha=8)}
    return run_settings(model, shards, out, **lora | changes)


@torch.no_grad()
def predict(pipe) -> torch.Tensor:
    """What the UNet makes of fixed noise under two captions."""
    x_t = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    return pipe.unet.eval()(x_t, torch.tensor([20, 800]), encode_captions(pipe, ["red apple", "face"])).sample


def weights(pipe) -> dict[str, torch.Tensor]:
    parts = (pipe.unet, pipe.text_encoder, pipe.vae)
    return {f"{i}.{name}": value for i, part in enumerate(parts) for name, value in part.state_dict().items()}


def randomise(pipe) -> None:
    generator = torch.Generator().manual_seed(2)
    for part in (pipe.unet, pipe.text_encoder):
        for parameter in part.parameters():
            if parameter.requires_grad:
                parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)


# ------------------------------------------------------------------------------------------------ adapters


@pytest.mark.parametrize("text_encoder", [False, True])
def test_saved_adapters_give_the_trained_output_in_a_fresh_pipeline_by_diffusers_and_fused(
    model, tmp_path, text_encoder
):
    from diffusers import StableDiffusionPipeline

    pipe, base = load_pipeline(model), load_pipeline(model)
    add_lora(pipe, LoRAConfig(rank=4, alpha=8), text_encoder=text_encoder)
    randomise(pipe)
    expected = predict(pipe)
    save_lora(pipe, tmp_path / "lora")
    fresh = StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    fresh.load_lora_weights(str(tmp_path / "lora"), weight_name=WEIGHTS)
    torch.testing.assert_close(predict(fresh), expected, atol=1e-5, rtol=0)
    fused = load_pipeline(model, lora=str(tmp_path / "lora"))
    torch.testing.assert_close(predict(fused), expected, atol=1e-5, rtol=0)
    others = load_pipeline(model, lora=str(tmp_path / "lora" / "kohya.safetensors"))
    torch.testing.assert_close(predict(others), expected, atol=1e-5, rtol=0)
    assert weights(fused).keys() == weights(base).keys()
    assert (predict(base) - expected).abs().max() > 1e-2


def test_adapters_with_sizes_of_their_own_give_the_trained_output_by_diffusers_and_fused(model, tmp_path):
    from diffusers import StableDiffusionPipeline

    pipe, base = load_pipeline(model), load_pipeline(model)
    add_lora(pipe, LoRAConfig(rank=4, alpha=8, dora=True))
    torch.testing.assert_close(predict(pipe), predict(base), atol=1e-5, rtol=0)  # nothing, untrained
    randomise(pipe)
    expected = predict(pipe)
    save_lora(pipe, tmp_path / "lora")
    assert any("magnitude" in name for name in load_file(tmp_path / "lora" / WEIGHTS))
    assert not (tmp_path / "lora" / "kohya.safetensors").exists()
    fresh = StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    fresh.load_lora_weights(str(tmp_path / "lora"), weight_name=WEIGHTS)
    torch.testing.assert_close(predict(fresh), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(predict(load_pipeline(model, lora=str(tmp_path / "lora"))), expected, atol=1e-4, rtol=0)
    assert (predict(base) - expected).abs().max() > 1e-2


def test_adapters_that_diffusers_would_not_load_whole_are_refused(model, shards, tmp_path):
    config = settings(model, shards, tmp_path, lora=LoRAConfig(rank=4, dora=True), train_text_encoder=True)
    with pytest.raises(UsageError, match="lora.dora.*train_text_encoder"):
        run_finetune(config)


def test_untrained_adapters_change_nothing_and_are_the_same_for_a_seed(model):
    pipes = [load_pipeline(model) for _ in range(3)]
    before = predict(pipes[0])
    for pipe, seed in zip(pipes, (0, 0, 1), strict=True):
        add_lora(pipe, LoRAConfig(rank=4), seed=seed)
    assert torch.equal(predict(pipes[0]), before)
    assert same(weights(pipes[0]), weights(pipes[1]))
    assert not same(weights(pipes[0]), weights(pipes[2]))


def test_adapters_stay_in_float32_over_a_base_in_half_precision(model):
    pipe = load_pipeline(model)
    add_lora(pipe, LoRAConfig(rank=4), base=torch.bfloat16)
    kinds = {(p.requires_grad, p.dtype) for part in (pipe.unet, pipe.text_encoder) for p in part.parameters()}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}


def test_the_file_says_its_scale_and_no_path(model, tmp_path):
    from safetensors import safe_open

    pipe = load_pipeline(model)
    add_lora(pipe, LoRAConfig(rank=4, alpha=8))
    save_lora(pipe, tmp_path / "lora")
    with safe_open(tmp_path / "lora" / WEIGHTS, framework="pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    assert (metadata["unet.r"], metadata["unet.lora_alpha"]) == (4, 4)  # the scale of 2 is in the weights
    assert model not in json.dumps(metadata)


def test_a_target_that_names_no_layer_is_refused(model):
    with pytest.raises(UsageError, match="no layer of the UNet is called to_z"):
        add_lora(load_pipeline(model), LoRAConfig(rank=4, targets=["to_q", "to_z"]))


def test_adapters_that_do_not_fit_or_are_not_there_are_named(model, tmp_path):
    with pytest.raises(UserError, match="found 0"):
        fuse_lora(load_pipeline(model), tmp_path)
    with pytest.raises(UserError, match="no such LoRA file"):
        fuse_lora(load_pipeline(model), tmp_path / "none.safetensors")
    (tmp_path / "lora.bin").write_bytes(b"\x80\x04cos\nsystem\n")
    with pytest.raises(UserError, match="safetensors only"):
        fuse_lora(load_pipeline(model), tmp_path / "lora.bin")
    save_file({"unet.nothing": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="other.safetensors: cannot load the LoRA into this model"):
        fuse_lora(load_pipeline(model), tmp_path / "other.safetensors")
    pipe = load_pipeline(model)
    add_lora(pipe, LoRAConfig(rank=4))
    save_lora(pipe, tmp_path / "lora")
    state = {k: v[..., :1].contiguous() for k, v in load_file(tmp_path / "lora" / WEIGHTS).items()}
    save_file(state, tmp_path / "narrow.safetensors")
    with pytest.raises(UserError, match="narrow.safetensors: cannot load the LoRA into this model"):
        fuse_lora(load_pipeline(model), tmp_path / "narrow.safetensors")


# ------------------------------------------------------------------------------------------------- the run


def test_a_run_leaves_adapters_a_fused_pipeline_and_their_cards_and_the_base_as_it_was(model, shards, tmp_path):
    from diffusers import DiffusionPipeline

    before = {path: path.read_bytes() for path in Path(model).rglob("*.safetensors")}
    summary = run_finetune(settings(model, shards, tmp_path / "run", filter=FilterConfig("every_step", threshold=1e9)))
    assert summary["judged"] > 0
    assert {path: path.read_bytes() for path in before} == before
    fused = DiffusionPipeline.from_pretrained(tmp_path / "run" / "model")
    with_adapters = DiffusionPipeline.from_pretrained(model)
    with_adapters.load_lora_weights(str(tmp_path / "run" / "lora"), weight_name=WEIGHTS)
    torch.testing.assert_close(predict(fused), predict(with_adapters), atol=1e-5, rtol=0)
    assert (predict(fused) - predict(load_pipeline(model))).abs().max() > 1e-3
    assert "rank 4, alpha 8" in (tmp_path / "run" / "model" / "README.md").read_text()
    assert "load_lora_weights" in (tmp_path / "run" / "lora" / "README.md").read_text()


def test_only_adapters_are_trained_of_the_text_encoder_too_when_asked(model, shards, tmp_path):
    for train_text_encoder, parts in ((False, {"unet"}), (True, {"unet", "text_encoder"})):
        trained = load_model(settings(model, shards, tmp_path, train_text_encoder=train_text_encoder), CPU)
        names = set(trained.state_dict())
        assert all("lora_" in name for name in names)
        assert {name.split(".")[0] for name in names} == parts
        assert len(trained.trained) == len(names)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_bf16_base_trains_like_a_float32_one(model, shards, tmp_path, checkpointing):
    losses = []
    for precision in ("no", "bf16"):
        config = settings(
            model, shards, tmp_path / precision, mixed_precision=precision, gradient_checkpointing=checkpointing,
            train_text_encoder=True,
        )  # fmt: skip
        run_finetune(config)
        lines = log_lines(tmp_path / precision)
        losses.append([line["loss"] for line in lines])
        assert all(line["grad_norm"] > 0 for line in lines)
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)
    saved = load_file(tmp_path / "bf16" / "lora" / WEIGHTS)
    assert {value.dtype for value in saved.values()} == {torch.float32}
    assert all(value.abs().sum() > 0 for value in saved.values())


@pytest.mark.timeout(300)
def test_a_killed_run_with_dropout_goes_on_bit_for_bit_from_a_checkpoint_of_adapters_alone(model, shards, tmp_path):
    lora = LoRAConfig(rank=4, alpha=8, dropout=0.3)
    changes = {"steps": 30, "batch_size": 1, "ema_decay": 0.9, "checkpoint_every": 4, "lora": lora}
    run_finetune(settings(model, shards, tmp_path / "whole", **changes))
    config = settings(model, shards, tmp_path / "cut", **changes)
    process = launch(config)
    wait_for_step(tmp_path / "cut", 5, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "cut" / "summary.json").exists()
    _, state = load_latest(tmp_path / "cut" / "checkpoints")
    adapters = sum(p.numel() for p in load_model(config, CPU).trained)
    assert sum(v.numel() for v in state["model"].values()) == adapters
    assert sum(v.numel() for v in state["average"]["values"]) == adapters
    run_finetune(config)
    one, other = (load_file(tmp_path / name / "lora" / WEIGHTS) for name in ("whole", "cut"))
    assert same(one, other)


def test_validation_images_are_drawn_and_a_changed_schedule_is_saved_over_a_base_in_half_precision(
    model, shards, tmp_path
):
    config = settings(
        model, shards, tmp_path / "run", mixed_precision="bf16", ema_decay=0.9, zero_terminal_snr=True,
        prediction_type="v_prediction", validation=ValidationConfig(every=2, prompts=["red apple"], steps=2),
    )  # fmt: skip
    run_finetune(config)
    assert len(list((tmp_path / "run" / "validation").rglob("*.png"))) == 2
    scheduler = load_pipeline(str(tmp_path / "run" / "model")).scheduler.config
    assert scheduler.prediction_type == "v_prediction" and scheduler.rescale_betas_zero_snr


# ---------------------------------------------------------------------------------------- drawing with them


def test_sample_and_detect_take_adapters_from_a_folder(model, shards, tmp_path):
    import numpy as np
    from PIL import Image

    from train.memorization.config import DetectConfig
    from train.memorization.detection.job import run_detect
    from train.sampling.config import SampleConfig
    from train.sampling.job.job import run_sample

    run_finetune(settings(model, shards, tmp_path / "run", steps=2))
    (tmp_path / "prompts.txt").write_text("red apple\n")
    options = {"prompts": str(tmp_path / "prompts.txt"), "seeds": 1, "steps": 2}
    lora = str(tmp_path / "run" / "lora")
    drawn = {}
    for name, source in {
        "base": {"model": model},
        "adapters": {"model": model, "lora": lora},
        "fused": {"model": str(tmp_path / "run" / "model")},
    }.items():
        run_sample(SampleConfig(out=str(tmp_path / name), **source, **options))
        (file,) = (tmp_path / name).glob("0*.png")
        drawn[name] = np.asarray(Image.open(file)).astype(int)
    assert np.abs(drawn["adapters"] - drawn["fused"]).max() <= 1
    assert np.abs(drawn["adapters"] - drawn["base"]).max() > 1
    with pytest.raises(UserError, match="other settings"):
        run_sample(SampleConfig(model=model, out=str(tmp_path / "adapters"), **options))
    magnitudes = []
    for name, adapters in (("without", None), ("with", lora)):
        run_detect(DetectConfig(model=model, out=str(tmp_path / f"{name}.parquet"), lora=adapters, **options))
        magnitudes.append(pq.read_table(tmp_path / f"{name}.parquet")["magnitude"][0].as_py())
    assert magnitudes[0] != pytest.approx(magnitudes[1], rel=1e-3)


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"lora": LoRAConfig(rank=-1)}, "lora.rank"),
        ({"lora": LoRAConfig(rank=4, dropout=1.0)}, "lora.dropout"),
        ({"lora": LoRAConfig(rank=4, targets=[])}, "lora.targets"),
        ({"lora": LoRAConfig(rank=4, dropout=0.1), "filter": FilterConfig("every_step")}, "measure the dropout"),
    ],
)
def test_settings_out_of_range_are_named(model, shards, tmp_path, changes, word):
    with pytest.raises(UsageError, match=word):
        run_finetune(settings(model, shards, tmp_path / "run", **changes))
