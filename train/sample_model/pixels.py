"""Recipe: a small pixel-space diffusion model that has memorized the repeated images of its training set.

    python -m train.sample_model.pixels --out runs/pixels/unconditional
    python -m train.sample_model.pixels --out runs/pixels/classes --classes true

The set is every sixth image of the carried emoji's fine-tuning part, at 32 × 32 pixels; ``repeated`` of them, evenly
spaced, stand in it ``copies`` times. The model is a ``UNet2DModel`` (2.7 M parameters) that predicts v, with more
weight on noisy timesteps: in few steps that learns layout and colours, which ε leaves to chance. It is unconditional
or conditioned on the emoji's group of the Unicode charts (and a null class, for classifier-free guidance). ``out`` is a
diffusers pipeline folder (``DDPMPipeline``) with ``training_set.json`` beside it: keys of the images, each once, how
often each stood in the set, its class, and the classes' names.

A stopped run goes on from its checkpoint: every random number is a function of (seed, step).
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from torch import Tensor

from afresh.errors import UserError
from afresh.files import write_atomic, write_json
from afresh.progress import get_logger, progress
from curate.reading.images import decode_image, stack_images
from curate.reading.samples import Sample
from curate.sample_set import load_part

SIDE = 32
TRAINING_SET = "training_set.json"
log = get_logger(__name__)


@dataclass
class PixelsConfig:
    """The recipe's settings."""

    out: str = "runs/pixels/unconditional"
    classes: bool = False  # condition on the emoji's group
    every: int = 6  # of the part, each image of this many
    repeated: int = 4  # images that stand in the set more than once
    copies: int = 40  # how often each of them does
    steps: int = 1600
    batch_size: int = 8
    lr: float = 1e-3  # highest, after warmup; cosine to 0
    warmup_steps: int = 50
    average: float = 0.99  # decay of the moving average of the weights, which is what is kept
    label_dropout: float = 0.15  # share of visits at which the null class is learned
    seed: int = 0
    threads: int = 1
    checkpoint_every: int = 100


@dataclass(frozen=True)
class PixelSet:
    """A training set in memory, each image once."""

    keys: list[str]
    pixels: Tensor
    """``[n, 3, 32, 32]`` float32 in [0, 1]."""
    copies: Tensor
    """``[n]`` int64: how often each image stands in the set."""
    labels: Tensor
    """``[n]`` int64: its class."""
    class_names: list[str]

    @property
    def null_class(self) -> int:
        """The label that stands for no class."""
        return len(self.class_names)


def pixel_set(every: int, repeated: int, copies: int) -> PixelSet:
    """Each ``every``-th image of the fine-tuning part at 32 × 32 pixels, some of them repeated."""
    samples = load_part("finetune")[::every]
    groups = [_group(sample) for sample in samples]
    names = sorted(set(groups))
    counts = torch.ones(len(samples), dtype=torch.int64)
    if repeated:
        counts[torch.arange(repeated) * len(samples) // repeated] = copies
    pixels = torch.from_numpy(stack_images([decode_image(sample.image) for sample in samples], SIDE))
    labels = torch.tensor([names.index(group) for group in groups])
    return PixelSet([sample.key for sample in samples], pixels, counts, labels, names)


def _group(sample: Sample) -> str:
    return json.loads(sample.members["json"])["category"]


def new_model(config: PixelsConfig, data: PixelSet) -> UNet2DModel:
    """Random weights; a function of the seed."""
    torch.manual_seed(config.seed)
    return UNet2DModel(
        sample_size=SIDE,
        block_out_channels=(16, 32, 64, 128),
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=32,
        num_class_embeds=data.null_class + 1 if config.classes else None,
    )


def learning_rate(step: int, config: PixelsConfig) -> float:
    """Linear warmup, then a half cosine to 0."""
    warm = min(1.0, (step + 1) / config.warmup_steps)
    return config.lr * warm * 0.5 * (1 + math.cos(math.pi * step / config.steps))


def train(config: PixelsConfig, data: PixelSet) -> tuple[UNet2DModel, DDPMScheduler]:
    """The averaged model and its noise schedule; continues from ``out/checkpoint.pt`` if a run was stopped there."""
    model, average = new_model(config, data), new_model(config, data).eval().requires_grad_(False)
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", clip_sample=True)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    first, checkpoint = 0, Path(config.out) / "checkpoint.pt"
    settings = {k: v for k, v in asdict(config).items() if k not in ("out", "threads", "checkpoint_every")}
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        if state["settings"] != settings:
            raise UserError(f"{checkpoint} is of other settings: choose another --out, or remove the folder")
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
        log.info("continuing at step %d", first)

    x_0 = data.pixels * 2 - 1
    with progress(total=config.steps - first, desc="pixels", unit="step") as bar:
        for step in range(first, config.steps):
            g = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
            rows = torch.multinomial(data.copies.float(), config.batch_size, replacement=True, generator=g)
            noise = torch.randn(x_0[rows].shape, generator=g)
            # As often as t: noisy timesteps decide layout and colours.
            t = (torch.rand(len(rows), generator=g).sqrt() * scheduler.config.num_train_timesteps).long()
            dropped = torch.rand(len(rows), generator=g) < config.label_dropout
            labels = torch.where(dropped, data.null_class, data.labels[rows]) if config.classes else None
            x_t = scheduler.add_noise(x_0[rows], noise, t)
            v = scheduler.get_velocity(x_0[rows], noise, t)
            loss = F.mse_loss(model(x_t, t, class_labels=labels).sample, v)
            optimizer.param_groups[0]["lr"] = learning_rate(step, config)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            decay = min(config.average, (step + 1) / (step + 10))  # the first weights are soon forgotten
            with torch.no_grad():
                torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
            bar.update()
            if (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps:
                log.info("step %d: loss %.4f", step + 1, loss.item())
                state = {"model": model.state_dict(), "average": average.state_dict(), "step": step + 1}
                with write_atomic(checkpoint) as path:
                    torch.save({**state, "optimizer": optimizer.state_dict(), "settings": settings}, path)
    return average, scheduler


def run(config: PixelsConfig) -> dict[str, Any]:
    """Train, and write the pipeline and what it was trained on."""
    torch.set_num_threads(config.threads)
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    data = pixel_set(config.every, config.repeated, config.copies)
    model, scheduler = train(config, data)
    DDPMPipeline(model, scheduler).save_pretrained(out)
    about = {
        "settings": asdict(config),
        "keys": data.keys,
        "copies": data.copies.tolist(),
        "labels": data.labels.tolist(),
        "class_names": data.class_names,
    }
    write_json(out / TRAINING_SET, about)
    return {"parameters": sum(p.numel() for p in model.parameters()), "images": len(data.keys), "out": str(out)}


def main() -> None:
    """Command line: ``--key value``."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(description="Train a small pixel-space model on a set with repeats.")
    parser.add_class_arguments(PixelsConfig)
    print(json.dumps(run(PixelsConfig(**parser.parse_args().as_dict())), indent=1))


if __name__ == "__main__":
    main()

