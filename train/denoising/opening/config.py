"""Settings of a model's adapters."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class LoRAConfig:
    """Low-rank adapters that are trained in place of the weights.

    Args:
        rank: of each adapter; 0 trains the weights themselves.
        alpha: the adapters' output is scaled by alpha / rank; 0 takes the rank, so that the scale is 1.
        dropout: probability of dropping an adapter's input, in [0, 1).
        dora: train the size of each weight's columns beside their direction (DoRA, Liu et al., ICML 2024); a step takes
            longer, the text encoder cannot have them, and there is no file by kohya's names.
        targets: names of the UNet's layers that get one, as they end.
    """

    rank: int = 0
    alpha: int = 0
    dropout: float = 0.0
    dora: bool = False
    targets: list[str] = field(default_factory=lambda: ["to_q", "to_k", "to_v", "to_out.0"])
