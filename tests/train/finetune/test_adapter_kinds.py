"""LoHa, LoKr and quantised bases: trained, saved so that peft and other interfaces take them, and refused where they
cannot be.
"""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from afresh.errors import UsageError
from tests.train.families import tiny_flux
from tests.train.finetune.runs import log_lines, settings
from tests.train.finetune.test_adapters import predict, randomise
from train.denoising.network import network_of
from train.denoising.opening import quantized
from train.denoising.opening.adapters import WEIGHTS, add_lora, save_lora
from train.denoising.opening.config import LoRAConfig
from train.denoising.opening.loading import load_pipeline
from train.finetune.config import FilterConfig
from train.finetune.loop import run_finetune
from train.finetune.model.trained import load_model


def changed(base: torch.Tensor, file: dict[str, torch.Tensor], layer: str) -> torch.Tensor:
    """A weight with what LyCORIS's formulas add to it."""
    part = {name.removeprefix(f"{layer}."): x for name, x in file.items() if name.startswith(f"{layer}.")}
    if "hada_w1_a" in part:
        delta = (part["hada_w1_a"] @ part["hada_w1_b"]) * (part["hada_w2_a"] @ part["hada_w2_b"])
        return base + delta * part["alpha"] / part["hada_w1_b"].shape[0]
    one = part["lokr_w1"] if "lokr_w1" in part else part["lokr_w1_a"] @ part["lokr_w1_b"]
    other = part["lokr_w2"] if "lokr_w2" in part else part["lokr_w2_a"] @ part["lokr_w2_b"]
    factored = [x for name, x in part.items() if name.endswith("_b")]
    scale = part["alpha"] / factored[0].shape[0] if factored else 1.0  # whole matrices have no rank, and no scale
    return base + torch.kron(one, other) * scale


@pytest.mark.parametrize("kind", ["loha", "lokr"])
@pytest.mark.parametrize("factor", [-1, 2])
def test_adapters_of_other_kinds_give_the_trained_output_by_peft_by_their_formulas_and_fused(
    model, tmp_path, kind, factor
):
    from peft import PeftModel

    if kind == "loha" and factor > 0:
        pytest.skip("a factor is LoKr's")
    pipe, base = load_pipeline(model), load_pipeline(model)
    add_lora(pipe, LoRAConfig(rank=2, alpha=3, kind=kind, factor=factor))
    torch.testing.assert_close(predict(pipe), predict(base), atol=1e-6, rtol=0)  # nothing, untrained
    randomise(pipe)
    for parameter in pipe.unet.parameters():
        parameter.data *= 3 if parameter.requires_grad else 1
    expected = predict(pipe)
    assert (predict(base) - expected).abs().max() > 1e-2
    save_lora(pipe, tmp_path / "lora")

    fused = load_pipeline(model, lora=str(tmp_path / "lora"))
    torch.testing.assert_close(predict(fused), expected, atol=1e-4, rtol=0)
    assert fused.unet.state_dict().keys() == base.unet.state_dict().keys()
    fresh = load_pipeline(model)
    fresh.unet = PeftModel.from_pretrained(fresh.unet, tmp_path / "lora")
    torch.testing.assert_close(predict(fresh), expected, atol=1e-4, rtol=0)

    file = load_file(tmp_path / "lora" / "lycoris.safetensors")
    layers = {name.partition(".")[0] for name in file}
    for name, weight in base.unet.state_dict().items():
        layer = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
        wanted = fused.unet.state_dict()[name]
        if layer in layers and name.endswith(".weight"):
            layers.remove(layer)
            weight = changed(weight, file, layer)
        torch.testing.assert_close(wanted, weight, atol=1e-5, rtol=1e-4)
    assert not layers


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_a_run_with_adapters_of_other_kinds_is_saved_and_resumed(model, shards, tmp_path, kind):
    changes = {"learning_rate": 1e-2, "lora": LoRAConfig(rank=2, kind=kind), "filter": FilterConfig("every_step", 1e9)}
    run_finetune(settings(model, shards, tmp_path / "whole", steps=3, **changes))
    run_finetune(settings(model, shards, tmp_path / "parts", steps=2, **changes))
    run_finetune(settings(model, shards, tmp_path / "parts", steps=3, **changes))
    names = ("adapter_model.safetensors", "lycoris.safetensors")
    for name in names:
        one, other = (load_file(tmp_path / run / "lora" / name) for run in ("whole", "parts"))
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    fused, base = load_pipeline(str(tmp_path / "whole" / "model")), load_pipeline(model)
    assert (predict(fused) - predict(base)).abs().max() > 1e-3
    with_adapters = load_pipeline(model, lora=str(tmp_path / "whole" / "lora"))
    torch.testing.assert_close(predict(fused), predict(with_adapters), atol=1e-5, rtol=0)
    assert "PeftModel.from_pretrained" in (tmp_path / "whole" / "lora" / "README.md").read_text()
    assert f"{kind}, rank 2" in (tmp_path / "whole" / "model" / "README.md").read_text()


@pytest.mark.parametrize(
    ("lora", "changes", "word"),
    [
        ({"kind": "loha", "dora": True}, {}, "lora.dora.*lora.kind loha"),
        ({"kind": "lokr"}, {"train_text_encoder": True}, "lora.kind.*train_text_encoder"),
        ({"kind": "loha", "dropout": 0.1}, {}, "lora.dropout"),
        ({"quantize": "int8", "dora": True}, {}, "lora.quantize"),
        ({"quantize": "int8", "rank": 0}, {}, "lora.quantize needs lora.rank"),
    ],
)
def test_kinds_that_do_not_go_together_are_named(model, shards, tmp_path, monkeypatch, lora, changes, word):
    monkeypatch.setattr(quantized.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(UsageError, match=word):
        run_finetune(settings(model, shards, tmp_path / "run", lora=LoRAConfig(**{"rank": 2} | lora), **changes))


@pytest.mark.parametrize(("kind", "package"), [("int8", "torchao"), ("nf4", "bitsandbytes")])
def test_a_quantised_base_without_its_package_is_refused(model, shards, tmp_path, monkeypatch, kind, package):
    find = quantized.importlib.util.find_spec
    monkeypatch.setattr(quantized.importlib.util, "find_spec", lambda name: None if name == package else find(name))
    with pytest.raises(UsageError, match=rf"lora.quantize {kind} needs {package}: pip install 'afresh\[quantized\]'"):
        run_finetune(settings(model, shards, tmp_path / "run", lora=LoRAConfig(rank=2, quantize=kind)))


@pytest.mark.parametrize("family", ["stable-diffusion", "flux"])
@pytest.mark.parametrize(("kind", "package", "within"), [("int8", "torchao", 0.02), ("nf4", "bitsandbytes", 0.2)])
def test_adapters_beside_a_quantised_base_train_like_those_beside_the_whole_one(
    model, shards, tmp_path, family, kind, package, within
):
    pytest.importorskip(package)
    if family == "flux":
        model = str(tmp_path / "flux")
        tiny_flux().save_pretrained(model)
    losses = {}
    for quantize in ("none", kind):
        config = settings(
            model, shards, tmp_path / quantize, learning_rate=1e-2, lora=LoRAConfig(rank=4, quantize=quantize),
            checkpoint_every=2, resolution=64,
        )  # fmt: skip
        run_finetune(config)
        losses[quantize] = [line["loss"] for line in log_lines(tmp_path / quantize)]
    assert losses[kind] == pytest.approx(losses["none"], rel=within) and losses[kind] != losses["none"]
    trained = load_model(config, torch.device("cpu"))
    assert all("lora_" in name for name in trained.state_dict())
    trained.denoiser.network.to("cpu")  # nf4 is made on the way to the device
    bases = [p for n, p in trained.denoiser.network.named_parameters() if "to_q.base_layer.weight" in n]
    whole = [p for n, p in network_of(load_pipeline(model)).named_parameters() if n.endswith("to_q.weight")]
    assert len(bases) == len(whole)
    if kind == "nf4":
        assert sum(p.nbytes for p in bases) * 8 == sum(p.nbytes for p in whole)  # two weights a byte, of float32
    else:
        assert all(p.data.qdata.dtype == torch.int8 for p in bases)
    saved = network_of(load_pipeline(str(tmp_path / kind / "model"))).state_dict()
    added = network_of(load_pipeline(model, lora=str(tmp_path / kind / "lora" / WEIGHTS))).state_dict()
    for name, weight in added.items():  # the base is the whole one
        torch.testing.assert_close(saved[name], weight, atol=1e-5, rtol=0)
