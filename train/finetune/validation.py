"""Images of fixed prompts at intervals, drawn by the guided sampler from the weights that a run would save.

Each image has a generator of its own and the global ones are put back, so a run with validation ends with the weights
of one without.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, PngImagePlugin

from afresh.files import write_atomic
from train.denoising.families.registry import denoiser_of
from train.finetune.config import ValidationConfig

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

    from train.sampling.guidance import Guidance


TOGETHER = 4  # images drawn in one batch: bounds memory, and changes no image


class Validation:
    """Draws a run's validation images.

    Args:
        config: prompts and guidance.
        device: where it draws.
        autocast: the run's precision, as a context.

    Raises:
        UserError: the index is missing, or does not fit.
    """

    def __init__(
        self, config: ValidationConfig, device: torch.device, autocast: Callable[[], AbstractContextManager]
    ) -> None:
        self.config, self.autocast = config, autocast
        self.guidance: list[Guidance] = []
        if config.guidance != "none":
            from curate.stages.views import views_of
            from train.sampling.pipelines.session import open_index
            from train.sampling.terms.amg import AMG

            index, embedder = open_index(config.index)
            views = views_of(config.index, index) if config.guidance == "amg" else []
            for one in (embedder, *(other for _, other in views)):
                if hasattr(one, "to"):
                    one.to(device)
            preset = "views" if config.guidance == "amg" else "strong"
            self.guidance = [AMG(index, embedder, preset, views=views)]

    def draw(self, folder: Path, source: StableDiffusionPipeline) -> list[Image.Image]:
        """Draw every prompt once, into ``folder/00000.png`` and on; the files carry prompt and seed as PNG text.

        Args:
            folder: of the images.
            source: the pipeline whose parts are used as they are, in their training modes afterwards again.
        """
        from train.sampling.pipelines.registry import guided

        config = self.config
        # A scheduler of its own: drawing sets its timesteps.
        scheduler = type(source.scheduler).from_config(source.scheduler.config)
        pipe: Any = guided(source, scheduler=scheduler)
        pipe.set_progress_bar_config(disable=True)
        modules = [part for part in source.components.values() if isinstance(part, torch.nn.Module) and part.training]
        for module in modules:
            module.eval()
        side = denoiser_of(source).side
        images: list[Image.Image] = []
        try:
            with torch.random.fork_rng(), self.autocast():
                for start in range(0, len(config.prompts), TOGETHER):
                    prompts = config.prompts[start : start + TOGETHER]
                    negative = [config.negative_prompt] * len(prompts) if config.negative_prompt else None
                    images += pipe(
                        prompts,
                        num_inference_steps=config.steps,
                        **pipe.asked(config.scale, negative),
                        width=config.width or side,
                        height=config.height or side,
                        generator=[torch.Generator("cpu").manual_seed(config.seed) for _ in prompts],
                        guidance=self.guidance,
                    ).images
        finally:
            for module in modules:
                module.train()
        for number, (prompt, image) in enumerate(zip(config.prompts, images, strict=True)):
            info = PngImagePlugin.PngInfo()
            info.add_itxt("prompt", prompt)
            info.add_itxt("settings", json.dumps({"seed": config.seed, "guidance": config.guidance}))
            with write_atomic(folder / f"{number:05d}.png") as temporary:
                image.save(temporary, format="PNG", pnginfo=info)
        return images


def send_images(trackers: list[Any], images: list[Image.Image], step: int) -> None:
    """Show images to the trackers that take some."""
    for tracker in trackers:
        if tracker.name == "tensorboard":
            pixels = np.stack([np.asarray(image) for image in images])
            tracker.log_images({"validation": pixels}, step=step, dataformats="NHWC")
        elif hasattr(tracker, "log_images"):
            tracker.log_images({"validation": images}, step=step)

