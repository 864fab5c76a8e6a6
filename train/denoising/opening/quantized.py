"""Frozen weights of a network in 8 or 4 bits, beside which adapters are trained (QLoRA, Dettmers et al., NeurIPS 2023).

Only what is trained sees the quantised weights: the adapters are added to the base in full precision when it is saved.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any, Literal

from afresh.errors import UsageError

if TYPE_CHECKING:
    import torch

Kind = Literal["none", "int8", "nf4"]
PACKAGES = {"int8": "torchao", "nf4": "bitsandbytes"}


def check_quantize(kind: Kind) -> None:
    """Raise :class:`UsageError` where the package of a kind is not installed."""
    package = PACKAGES.get(kind)
    if package and importlib.util.find_spec(package) is None:
        raise UsageError(f"lora.quantize {kind} needs {package}: pip install 'afresh[quantized]', or set it to none")


def quantize(network: Any, kind: Kind, dtype: torch.dtype) -> None:
    """Quantise the weights of a network's linear layers, in place; those of convolutions stay as they are.

    Args:
        network: frozen, without adapters.
        kind: int8 is one scale for each row of a weight (torchao); nf4 takes 4 bits a weight, with a scale for each 64
            (bitsandbytes), and happens when the network goes to its device.
        dtype: in which products are computed.
    """
    if kind == "int8":
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantize_(network, Int8WeightOnlyConfig())
    elif kind == "nf4":
        import bitsandbytes
        import torch

        for module in list(network.modules()):
            for name, layer in module.named_children():
                if type(layer) is torch.nn.Linear:
                    with torch.device("meta"):
                        small = bitsandbytes.nn.Linear4bit(
                            layer.in_features,
                            layer.out_features,
                            layer.bias is not None,
                            compute_dtype=dtype,
                            quant_type="nf4",
                        )
                    small.weight = bitsandbytes.nn.Params4bit(
                        layer.weight.data, requires_grad=False, quant_type="nf4", module=small
                    )
                    small.bias = layer.bias
                    setattr(module, name, small.requires_grad_(False))
        network.is_loaded_in_4bit = True  # what peft looks at
