"""What makes a network quicker leaves what it computes, and what is saved of it, as they were."""

from __future__ import annotations

import pytest
import torch

from tests.train.finetune.runs import log_lines, settings
from train.denoising.opening.config import LoRAConfig
from train.denoising.opening.loading import load_pipeline
from train.finetune.config import FinetuneConfig
from train.finetune.loop import run_finetune
from train.finetune.model.speed import of_any_size, set_products, wants_channels_last


def graphs(model: str, mark) -> int:
    """How many graphs a compiled UNet takes for five sizes of images, of which no two agree in both sides."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    unet, counter = load_pipeline(model).unet, CompileCounter()
    unet.compile(backend=counter)
    with torch.no_grad():
        for size in ((16, 16), (8, 24), (24, 8), (8, 16), (16, 8)):
            prompt = torch.zeros(2, 16, unet.config.cross_attention_dim)
            unet(mark(torch.zeros(2, 4, *size)), torch.tensor([1, 9]), prompt)
    torch._dynamo.reset()
    return counter.frame_count


def test_a_compiled_network_is_compiled_once_for_all_buckets(model):
    assert graphs(model, of_any_size) == 1
    assert graphs(model, lambda x: x) > 1


@pytest.mark.parametrize("lora", [LoRAConfig(), LoRAConfig(rank=4)])
def test_weights_with_channels_last_train_alike_and_are_saved_as_ever(model, shards, tmp_path, lora):
    for last in (False, True):
        config = settings(
            model, shards, tmp_path / str(last), steps=2, channels_last=last, ema_decay=0.5, checkpoint_every=1,
            lora=lora,
        )  # fmt: skip
        run_finetune(config)
    one, other = (load_pipeline(str(tmp_path / name / "model")).unet.state_dict() for name in ("False", "True"))
    for name, weight in one.items():
        torch.testing.assert_close(other[name], weight, atol=2e-3, rtol=0)  # AdamW magnifies what is rounded otherwise
        assert other[name].is_contiguous()
    lines = [log_lines(tmp_path / name) for name in ("False", "True")]
    assert [line["loss"] for line in lines[0]] == pytest.approx([line["loss"] for line in lines[1]], rel=1e-3)


def test_channels_come_last_by_themselves_where_tensor_cores_take_them_so():
    half, full = (FinetuneConfig("", "", [], mixed_precision=name) for name in ("bf16", "no"))
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    assert [wants_channels_last(*one) for one in ((half, gpu), (full, gpu), (half, cpu))] == [True, False, False]


def test_tf32_is_set_as_asked(model):
    for wanted in (False, True):
        set_products(wanted)
        assert torch.backends.cuda.matmul.allow_tf32 is wanted
        assert torch.backends.cudnn.allow_tf32 is wanted
