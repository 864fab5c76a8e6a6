"""How a UNet computes attention."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from afresh.errors import UserError

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel


Attention = Literal["auto", "math", "sdpa", "xformers"]


def set_attention(unet: UNet2DConditionModel, attention: Attention = "auto", *, mixed_precision: str = "no") -> None:
    """Choose how the UNet computes attention.

    ``auto`` is ``sdpa`` but for small models that train in bf16 on a CPU: there the plain matrix form is faster, as
    torch's fused kernel is slow in its backward pass on short sequences (``python -m benchmarks.attention``).

    Args:
        unet: on its device.
        attention: ``math`` is the plain matrix form.
        mixed_precision: no, fp16 or bf16: in which it is going to compute, whatever its weights are.

    Raises:
        UserError: xformers was asked for and is not installed.
    """
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

    if not hasattr(unet, "down_blocks"):  # a transformer comes with fused attention, of a kind of its own
        if attention not in ("auto", "sdpa"):
            raise UserError(f"attention {attention}: {type(unet).__name__} has its own: take auto or sdpa")
        return
    if attention == "auto":
        side = unet.config.sample_size if isinstance(unet.config.sample_size, int) else 64
        small = unet.device.type == "cpu" and side <= 16
        attention = "math" if small and mixed_precision == "bf16" else "sdpa"
    if attention == "xformers":
        try:
            unet.enable_xformers_memory_efficient_attention()
        except (ImportError, ModuleNotFoundError, ValueError) as error:
            raise UserError(f"attention xformers: {error}; pip install 'afresh[xformers]'") from error
    else:
        unet.set_attn_processor(AttnProcessor() if attention == "math" else AttnProcessor2_0())

