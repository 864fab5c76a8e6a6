"""Settings of a model's adapters."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class LoRAConfig:
    """Low-rank adapters that are trained in place of the weights.

    Args:
        rank: of each adapter; 0 trains the weights themselves.
        kind: what an adapter is: lora, a product of two thin matrices; loha, the elementwise product of two such
            products; lokr, a Kronecker product. The last two are saved in peft's form and by LyCORIS's names, and not
            of text encoders.
        alpha: the adapters' output is scaled by alpha / rank; 0 takes the rank, so that the scale is 1.
        dropout: probability of dropping an adapter's input, in [0, 1).
        dora: train the size of each weight's columns beside their direction (DoRA, Liu et al., ICML 2024); a step takes
            longer, the text encoder cannot have them, and there is no file by kohya's names.
        factor: of lokr: what one side of a weight is divided by, at most; -1 divides evenly.
        quantize: hold the frozen linear layers in int8 (torchao) or nf4 (bitsandbytes); what is saved has the base in
            full precision. Beside adapters of the kind lora.
        targets: names of the UNet's layers that get one, as they end.
    """

    rank: int = 0
    kind: Literal["lora", "loha", "lokr"] = "lora"
    alpha: int = 0
    dropout: float = 0.0
    dora: bool = False
    factor: int = -1
    quantize: Literal["none", "int8", "nf4"] = "none"
    targets: list[str] = field(default_factory=lambda: ["to_q", "to_k", "to_v", "to_out.0"])
