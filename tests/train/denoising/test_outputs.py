"""What other trainers leave in their output folders is opened as it lies there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from afresh.errors import UserError
from train.denoising.opening.files import adapter_options, check_model
from train.denoising.opening.loading import load_pipeline
from train.denoising.opening.outputs import ADAPTERS, model_file, trained_file
from train.sample_model.small import tiny_pipeline


def lay_out(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    return folder


@pytest.mark.parametrize(
    ("names", "result"),
    [
        (["dog-000001.safetensors", "dog-000002.safetensors", "dog.safetensors", "sample/a.png"], "dog.safetensors"),
        (["dog-step00000500.safetensors", "dog-step00001000.safetensors"], "dog-step00001000.safetensors"),
        (["dog_000000250.safetensors", "dog_000000500.safetensors", "optimizer.pt"], "dog_000000500.safetensors"),
        (["dog_v2.safetensors", "dog_v2_000000250.safetensors"], "dog_v2.safetensors"),
        ([ADAPTERS, f"checkpoint-500/{ADAPTERS}"], ADAPTERS),
        ([f"checkpoint-{step}/{ADAPTERS}" for step in (500, 1000, 50)], f"checkpoint-1000/{ADAPTERS}"),
        (["cat.safetensors", "dog.safetensors"], None),
        (["dog.ckpt"], None),
    ],
)
def test_the_result_of_a_run_is_told_from_what_was_saved_on_the_way(names, result, tmp_path):
    found = trained_file(lay_out(tmp_path, *names))
    assert found == (tmp_path / result if result else None)


def test_a_pipeline_folder_is_itself_whatever_lies_in_it(tmp_path):
    lay_out(tmp_path, "model_index.json", "dog.safetensors")
    assert model_file(str(tmp_path)) == str(tmp_path)
    assert model_file("owner/name") == "owner/name"


def test_adapters_in_kohyas_form_are_those_of_the_end_of_the_run(tmp_path):
    pytest.importorskip("peft")
    base = tiny_pipeline()
    base.save_pretrained(tmp_path / "base")
    layer, weight = next(
        (name, module.weight) for name, module in base.unet.named_modules() if name.endswith("attn2.to_q")
    )
    generator = torch.Generator().manual_seed(0)
    down = torch.randn(2, weight.shape[1], generator=generator)
    up = torch.randn(weight.shape[0], 2, generator=generator)
    key = f"lora_unet_{layer.replace('.', '_')}"

    def save(name: str, factor: float) -> None:
        parts = {"lora_down.weight": down, "lora_up.weight": factor * up, "alpha": torch.tensor(1.0)}
        save_file({f"{key}.{part}": value.contiguous() for part, value in parts.items()}, tmp_path / "out" / name)

    (tmp_path / "out").mkdir()
    save("dog-000001.safetensors", 5.0)
    save("dog.safetensors", 1.0)
    fused = load_pipeline(str(tmp_path / "base"), lora=str(tmp_path / "out"))
    torch.testing.assert_close(fused.unet.get_submodule(layer).weight, weight + 0.5 * up @ down)  # alpha / rank
    with pytest.raises(UserError, match="dog.safetensors: adapters and no model: give it as --lora"):
        check_model(str(tmp_path / "out"))


def test_a_folder_of_which_nobody_can_tell_is_asked_for_the_file(tmp_path):
    lay_out(tmp_path, "cat.safetensors", "dog.safetensors")
    with pytest.raises(UserError, match="name the file"):
        adapter_options(tmp_path)
    with pytest.raises(UserError, match="name the file"):
        check_model(str(tmp_path))
