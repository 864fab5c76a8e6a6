"""What is trained: a model's parts, which of their weights change, and how the result is saved."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from afresh.files import full_disk_named
from train.denoising.conditioning import Conditioning
from train.denoising.families.registry import denoiser_of
from train.denoising.network import network_of
from train.denoising.opening.adapters import add_lora, parts_of, save_lora, text_encoders
from train.denoising.opening.loading import check_trainable, load_pipeline
from train.finetune.config import FinetuneConfig

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline


HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}


class Model:
    """A pipeline while it is trained.

    Attributes:
        pipe: the pipeline that the parts belong to.
        denoiser: network and text encoders as one module; the optimizer and the data-parallel wrapper go around it.
        size: side of the training images in pixels.
        device: that it trains on.
    """

    def __init__(
        self,
        pipe: StableDiffusionPipeline,
        denoiser: Any,
        device: torch.device,
        fused: Callable[[str], StableDiffusionPipeline] | None = None,
    ) -> None:
        self.pipe, self.denoiser = pipe, denoiser
        self._fused = fused
        self._trained_names = {name for name, p in denoiser.named_parameters() if p.requires_grad}
        self.size = denoiser.side
        self.device = device
        self._empty: Conditioning | None = None

    @property
    def trained(self) -> list[torch.nn.Parameter]:
        """The parameters that change, always in the same order."""
        return [p for p in self.denoiser.parameters() if p.requires_grad]

    @torch.no_grad()
    def predict_unconditional(self, x_t: Tensor, t: Tensor, frames: Tensor | None = None) -> Tensor:
        """The model's output under the empty caption: like ``x_t``, float32; of images with these ``frames [n, 6]``.

        Outside the data-parallel wrapper and without gradients: processes need not agree on whether they call it.
        """
        if self._empty is None:  # encoded once, unless the text encoder changes
            tokens = self.denoiser.tokens([""]).to(self.device)
            encoders = self.denoiser.encoders.values()
            trained = any(p.requires_grad for encoder in encoders for p in encoder.parameters())
            self._empty = tokens if trained else self.denoiser.encoded(tokens)
        empty = self._empty if frames is None else self.denoiser.framed(self._empty, frames)
        return self.denoiser(x_t, t, empty).float()

    def state_dict(self) -> dict[str, Tensor]:
        """The weights that change, by name."""
        return {k: v for k, v in self.denoiser.state_dict().items() if k in self._trained_names}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over what :meth:`state_dict` gave."""
        self.denoiser.load_state_dict(state, strict=False)

    def save(self, folder: Path) -> None:
        """Write the pipeline aside and rename it, so that a model folder is never half a model.

        Adapters go to the folder ``lora`` beside it first; the pipeline is the base as it was, in full precision, with
        them added. The denoiser cannot be used any more after that.

        Raises:
            UserError: the disk is full.
        """
        with full_disk_named(folder):
            self._save(folder)

    def _save(self, folder: Path) -> None:
        pipe = self.pipe
        self.denoiser.eval()
        for name in parts_of(pipe):
            setattr(pipe, name, getattr(self.denoiser, name))
        if self._fused is not None:
            adapters = folder.with_name("lora")
            save_lora(pipe, adapters)
            self.denoiser.to("meta")  # lets go of the memory that the base needs now
            pipe = self._fused(str(adapters))
            pipe.scheduler = self.pipe.scheduler  # which training may have changed
        aside = folder.with_name(folder.name + ".partial")
        shutil.rmtree(aside, ignore_errors=True)
        pipe.save_pretrained(aside)
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)


def load_model(config: FinetuneConfig, device: torch.device) -> Model:
    """Load the pipeline, set free the weights that are to be trained, and freeze the others.

    The VAE goes to the device; the denoiser goes there with ``accelerator.prepare``.

    Raises:
        UserError: the model cannot be read, is of another kind, or predicts something else than ε or v.
    """
    load: Any = functools.partial(
        load_pipeline,
        config.model,
        attention=config.attention,
        revision=config.revision,
        variant=config.variant,
        model_config=config.model_config,
    )
    pipe = load()
    check_trainable(pipe, config.model)
    pipe.vae.to(device).requires_grad_(False)
    if config.lora.rank:
        # What is frozen needs no more than the precision that it is computed in.
        base = HALF.get(config.mixed_precision, torch.float32)
        add_lora(pipe, config.lora, text_encoder=config.train_text_encoder, base=base, seed=config.seed)
    else:
        network_of(pipe).requires_grad_(True)
        for encoder in text_encoders(pipe).values():
            encoder.requires_grad_(config.train_text_encoder)
    if config.gradient_checkpointing:
        network_of(pipe).enable_gradient_checkpointing()
    denoiser: Any = denoiser_of(pipe)
    denoiser.leave_unused_alone()
    fused = (lambda adapters: load(lora=adapters)) if config.lora.rank else None
    return Model(pipe, denoiser.train(), device, fused)

