"""Weights spread over the processes (PyTorch's FSDP2, by Accelerate's ``fsdp_config``): what is done otherwise then.

Each process holds its part of every trained weight, gradient, optimizer state and average; a layer's weights come
together while it computes. So every process takes part in each forward pass, and in gathering what is written: files
hold whole tensors, as those of an ordinary run do.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from afresh.errors import UsageError
from train.denoising.network import network_of
from train.finetune.config import FinetuneConfig
from train.finetune.model.trained import Model, load_model
from train.finetune.state.checkpoint import Stateful
from train.finetune.state.optimizer import find_optimizer

if TYPE_CHECKING:
    from accelerate import Accelerator


def shard_on_cpu(accelerator: Accelerator) -> None:
    """Let Accelerate spread the weights over CPU processes too, where its settings ask for it.

    It reads ``fsdp_config`` for accelerators alone, and would keep whole copies here without a word.
    """
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    asked = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if asked and accelerator.distributed_type == DistributedType.MULTI_CPU:
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP


def check_parallel(kind: str, fsdp2: bool, config: FinetuneConfig) -> None:
    """See that the loop is right under the way in which the processes share the work.

    Args:
        kind: Accelerate's ``distributed_type``.
        fsdp2: whether it is FSDP in its second version.
        config: of the run.

    Raises:
        UsageError: it is not; names the setting.
    """
    if kind in ("DEEPSPEED", "MEGATRON_LM"):
        raise UsageError(
            f"distributed_type {kind}: its engine changes the weights within the backward pass, before all processes "
            "know whether the filter left anything in and whether the loss is finite; configs/accelerate/zero2.yaml "
            "shares out what ZeRO-2 does, by FSDP"
        )
    if kind != "FSDP":
        return
    foreign = not find_optimizer(config.optimizer).__module__.startswith("torch.optim.")
    refused = (
        (foreign, f"optimizer {config.optimizer}", "take adamw or another of torch.optim, which know spread weights"),
        (not fsdp2, "fsdp_version 1", "set fsdp_version: 2 in Accelerate's file"),
        (config.mixed_precision == "fp16", "mixed_precision fp16", "take bf16 or no"),
        (config.ema_decay > 0 and config.ema_device == "cpu", "ema_device cpu", "take auto: the average is spread too"),
        (config.compile, "compile", "set it to false"),
        (config.lora.rank > 0, "lora.rank", "adapters are small, take configs/accelerate/many_gpus.yaml"),
    )
    for wrong, name, instead in refused:
        if wrong:
            raise UsageError(f"{name} does not go with FSDP here: {instead}")


def prepare(
    accelerator: Accelerator, model: Model, optimizer: torch.optim.Optimizer
) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """The denoiser and the optimizer, ready to train on this process and its device."""
    if accelerator.is_fsdp2:
        from torch.distributed.fsdp import MixedPrecisionPolicy

        plugin = accelerator.state.fsdp_plugin
        frozen = [m for m in model.denoiser.children() if not any(p.requires_grad for p in m.parameters())]
        plugin.ignored_modules = frozen  # whole on each process: they have neither gradient nor optimizer state
        plugin.mixed_precision_policy = None
        if accelerator.mixed_precision == "bf16":
            # Half the traffic; gradients are summed in full. Activations are autocast's, as without FSDP.
            plugin.mixed_precision_policy = MixedPrecisionPolicy(
                param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
            )
        plugin.transformer_cls_names_to_wrap = layers_to_gather(
            network_of(model.pipe), plugin.transformer_cls_names_to_wrap
        )
        for module in frozen:
            module.to(accelerator.device)
    denoiser, optimizer = accelerator.prepare(model.denoiser, optimizer)
    return denoiser, optimizer


def layers_to_gather(network: torch.nn.Module, asked: Sequence[str] | None) -> list[str]:
    """The classes of layers whose weights come together one layer at a time.

    Args:
        network: that is trained.
        asked: names of Accelerate's settings, which are a UNet's in ``configs/accelerate``.

    Returns:
        Those of ``asked`` that the network has; if it has none of them, those that it says itself are not to be split.
    """
    there = {type(module).__name__ for module in network.modules()}
    own: Sequence[str] = getattr(network, "_no_split_modules", None) or ()
    return [name for name in asked or () if name in there] or [name for name in own if name in there]


def gather_whole(state: Any, keep: bool) -> Any:
    """A state with whole tensors on the CPU in the place of spread ones; every process calls this.

    Args:
        state: tensors and numbers, in lists and dictionaries.
        keep: whether this process needs the result; elsewhere the places of spread tensors hold None.
    """
    from torch.distributed.tensor import DTensor

    if isinstance(state, dict):
        return {name: gather_whole(value, keep) for name, value in state.items()}
    if isinstance(state, list):
        return [gather_whole(value, keep) for value in state]
    if isinstance(state, DTensor):
        full = state.full_tensor()
        return full.cpu() if keep else None
    return state


def spread(state: Any, like: Any) -> Any:
    """The inverse of :func:`gather_whole`: each process takes its part of every tensor that is spread in ``like``."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if isinstance(like, dict):
        return {name: spread(value, like.get(name)) for name, value in state.items()}
    if isinstance(like, list):
        return [spread(*pair) for pair in zip(state, like, strict=True)]
    if isinstance(like, DTensor):
        whole: Tensor = state.to(like.device)
        return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)
    return state


class Spread:
    """A part of the run's state whose tensors are spread over the processes, with whole ones in its checkpoints.

    Args:
        part: what owns the state.
        keep: whether this process writes the checkpoint.
    """

    def __init__(self, part: Stateful, keep: bool) -> None:
        self.part, self.keep = part, keep

    def state_dict(self) -> dict[str, Any]:
        """The whole state where it is kept; every process calls this."""
        return gather_whole(self.part.state_dict(), self.keep)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave."""
        self.part.load_state_dict(spread(state, self.part.state_dict()))


class SpreadOptimizer:
    """The same of an optimizer, whose state does not exist before its first step."""

    def __init__(self, denoiser: torch.nn.Module, optimizer: Any) -> None:
        self.denoiser, self.optimizer = denoiser, optimizer.optimizer  # Accelerate's wrapper has no state of its own

    def state_dict(self) -> dict[str, Any]:
        """The whole state on the first process, nothing on the others; every process calls this."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

        whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return get_optimizer_state_dict(self.denoiser, self.optimizer, options=whole)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave; every process calls this, with the whole state."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

        whole = StateDictOptions(full_state_dict=True)
        set_optimizer_state_dict(self.denoiser, self.optimizer, state, options=whole)


def whole_model(config: FinetuneConfig, accelerator: Accelerator, model: Model, device: torch.device) -> Model:
    """The model as it stands, with whole weights, on the first process; every process calls this.

    It is ``model`` itself where nothing is spread, and else one loaded anew, onto ``device``.
    """
    if not accelerator.is_fsdp2:
        return model
    state = gather_whole(model.state_dict(), accelerator.is_main_process)
    if not accelerator.is_main_process:
        return model
    whole = load_model(config, device)
    whole.load_state_dict(state)
    whole.denoiser.to(device)
    whole.pipe.scheduler = model.pipe.scheduler
    return whole

