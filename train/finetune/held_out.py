"""The loss on samples that are not trained on, with the same noise and timesteps at every measurement.

A training loss is of other samples, noises and timesteps at each step, and goes down where a model learns its set by
heart, too; this one can be compared from step to step.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import torch

from afresh.errors import UserError
from afresh.files import full_disk_named, write_atomic
from afresh.progress import get_logger
from train.denoising.latents.scaling import to_network
from train.denoising.schedules import NoiseSchedule
from train.finetune.caches.latents import encode_moments
from train.finetune.config import Augmentation, FinetuneConfig
from train.finetune.data.images import ImageLoader, SampleError
from train.finetune.data.scan import scan
from train.finetune.model.diffusion import draw_randomness, sample_posterior, timesteps_of
from train.finetune.model.loss import sample_errors
from train.finetune.model.trained import Model
from train.finetune.state.log import kept_lines

log = get_logger(__name__)
TOGETHER = 4  # samples in one pass: bounds memory


class HeldOutLoss:
    """Measures the loss on samples of ``validation.shards``, spread evenly over them.

    Args:
        config: of the run.
        model: whose VAE encodes the images, once; they are brought to its square.
        start: step that the run goes on from: measurements of later ones are repeated, and cut off first.
        autocast: the run's precision, as a context.

    Raises:
        UserError: none of the samples can be read.
    """

    def __init__(
        self, config: FinetuneConfig, model: Model, start: int, autocast: Callable[[], AbstractContextManager]
    ) -> None:
        self.config, self.autocast = config, autocast
        self.path = Path(config.out) / "validation" / "loss.jsonl"
        kept = kept_lines(self.path, lambda line: line["step"] <= start)
        with write_atomic(self.path) as temporary:
            temporary.write_text("".join(kept), "utf-8")
        shard_set = scan(
            config.validation.shards,
            Path(config.out) / "held_out.arrow",
            caption_field=config.caption_field,
            missing_caption=config.missing_caption,
            max_pixels=config.max_pixels,
        )
        side = config.resolution or model.size
        loader = ImageLoader(shard_set, [(side, side)], "center", Augmentation(), config.validation.seed)
        rows = np.linspace(0, len(shard_set) - 1, min(config.validation.samples, len(shard_set))).round().astype(int)
        self.captions: list[str] = []
        moments, frames = [], []
        for row in rows.tolist():
            try:
                pixels = torch.from_numpy(loader.load(row, 0))[None]
            except SampleError as error:
                log.warning("%s: %s; not measured on", "/".join(shard_set.identity(row)), error)
                continue
            moments.append(encode_moments(model.pipe.vae, pixels).cpu())
            frames.append(loader.frame(row, 0))
            self.captions.append(shard_set.captions(row)[0])
        if not moments:
            raise UserError("validation.shards: none of their samples can be read")
        self.moments, self.frames = torch.cat(moments), torch.tensor(frames)

    @torch.no_grad()
    def measure(self, model: Model, schedule: NoiseSchedule, step: int) -> float:
        """The mean squared error over all samples, which goes into ``out/validation/loss.jsonl`` too.

        Args:
            model: as it stands, with whole weights.
            schedule: of the run.
            step: optimizer steps made.
        """
        config, device = self.config, model.device
        count, channels = len(self.moments), self.moments.shape[1] // 2
        shape = (channels, *self.moments.shape[2:])
        timestep = timesteps_of(schedule, config)
        draws = draw_randomness(range(count), shape, schedule.timesteps, config.validation.seed, timestep=timestep)
        x_0 = to_network(sample_posterior(self.moments, draws.posterior, 1.0), model.pipe.vae)
        errors = []
        was_training = model.denoiser.training
        model.denoiser.eval()
        for start in range(0, count, TOGETHER):
            some = slice(start, start + TOGETHER)
            x, noise, t = (one[some].to(device) for one in (x_0, draws.noise, draws.t))
            prompt = model.denoiser.framed(model.denoiser.tokens(self.captions[some]).to(device), self.frames[some])
            with self.autocast():
                output = model.denoiser(schedule.noised(x, noise, t), t, prompt).float()
            errors.append(sample_errors(output, schedule.target(x, noise, t)).cpu())
        model.denoiser.train(was_training)
        loss = float(torch.cat(errors).mean())
        with full_disk_named(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "loss": loss, "samples": count}) + "\n")
        log.info("step %d: loss on held-out samples %.4f", step, loss)
        return loss
