"""Recipe: train the carried copy detector on what the sample model was pretrained on, and measure it.

    python -m train.sample_model.copy_detector.training --config configs/sample_model/copy_detector.yaml

In the manner of SSCD (Pizzi et al., CVPR 2022, arXiv 2202.10261): two edited views of each image, InfoNCE
between them, and the differential-entropy (KoLeo) term that pushes every image away from its nearest
neighbour. Beyond SSCD:

- negatives and nearest neighbours come from the whole set through a memory of embeddings, renewed every epoch,
  because a sampler asks for the nearest of *all* training images; and each image stands in its batch beside
  one that it is taken for;
- images that look alike by nature (clock faces, one flag under two names) are no negatives of one another;
- some views are attacked before they are learned from: a few ascent steps, on pixels or on a coarse field as
  an image decoder makes them, that lower the similarity of a copy; it must stay close, so that following the
  detector's gradient changes the drawing and not some noise upon it;
- strong changes of colour and grey views, so that the drawing counts and not its colours.

A run is restartable: every random number is a function of (seed, step), and a checkpoint is written every
``checkpoint_every`` steps. The measurements go to ``copy_detector.json`` beside the weights.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from afresh.files import write_atomic, write_json
from afresh.progress import get_logger, progress
from curate.embed.copy_detector import WEIGHTS, CopyDetector
from curate.reading.images import decode_image, stack_images
from curate.reading.pipeline import ReadShards, Skipped, shard_list
from curate.sample_set import load_part
from train.sample_model.copy_detector.edits import attacked, edited
from train.sample_model.copy_detector.measures import embedded, measure, pixels_alike

log = get_logger(__name__)


@dataclass
class CopyDetectorConfig:
    """The recipe's settings; the defaults are those of the carried weights."""

    out: str = str(WEIGHTS)  # fp16 safetensors; the measurements go beside it as .json
    work_dir: str = "runs/copy_detector"  # checkpoint
    renditions: list[str] = field(default_factory=list)  # shards of further drawings, see sample_model.renditions
    steps: int = 1200
    batch_size: int = 64  # images, each in two views
    lr: float = 1e-3  # highest, after warmup; cosine to 0
    warmup_steps: int = 50  # of the learning rate
    ramp: float = 0.6  # share of the steps over which edits grow to full strength; then memory and attacks
    weight_decay: float = 0.05
    temperature: float = 0.05  # of InfoNCE
    entropy_weight: float = 3.0  # of the KoLeo term
    alignment_weight: float = 0.5  # of 1 - cosine of the two views
    attack_share: float = 0.5  # of a batch's images
    attack_steps: int = 2
    attack_pixels: float = 8 / 255  # L-infinity bound on pixels
    attack_field: float = 32 / 255  # L-infinity bound on a 16 x 16 field, enlarged to the image
    alike: float = 0.92  # 16 x 16 pixel correlation above which two images are no negatives of each other
    seed: int = 0
    threads: int = 1
    checkpoint_every: int = 50


def info_nce(z_a: Tensor, z_b: Tensor, memory: Tensor, alike: Tensor, temperature: float) -> Tensor:
    """InfoNCE of each view against the other view of its image; negatives from the batch and from the memory.

    Args:
        z_a, z_b: ``[n, d]`` unit rows, two views of the same images.
        memory: ``[m, d]`` last-seen embeddings of all images; zero rows were not seen yet.
        alike: ``[n, n + m]`` bool: columns (batch, then memory) that are no negatives of the row.
        temperature: divides the cosines.
    """
    positive = (z_a * z_b).sum(1) / temperature
    losses = []
    for one, two in ((z_a, z_b), (z_b, z_a)):
        negatives = torch.cat([one @ two.T, one @ memory.T, one @ one.T], 1) / temperature
        mask = torch.cat([alike, alike[:, : len(one)]], 1)
        negatives = negatives.masked_fill(mask, float("-inf"))
        losses.append(torch.logsumexp(torch.cat([positive[:, None], negatives], 1), 1) - positive)
    return torch.cat(losses).mean()


def entropy(z: Tensor, others: Tensor, alike: Tensor) -> Tensor:
    """Kozachenko–Leonenko term: minus the mean logarithm of the distance to the nearest other image."""
    nearest = (z @ others.T).masked_fill(alike, -1.0).amax(1)
    return -0.5 * torch.log((2 - 2 * nearest).clamp_min(1e-4)).mean()


def part_pictures(*names: str) -> list[Image]:
    """The images of parts of the sample set, in order."""
    return [decode_image(sample.image) for name in names for sample in load_part(name)]


def part_images(*names: str) -> Tensor:
    """``[n, 3, 64, 64]`` float32 in [0, 1]: the same as pixels."""
    return torch.from_numpy(stack_images(part_pictures(*names), 64))


def shard_images(shards: list[str]) -> Tensor:
    """``[n, 3, 64, 64]`` float32 in [0, 1]: the images of shards, as pixels."""
    samples = ReadShards(Skipped())(shard_list(shards))
    return torch.from_numpy(stack_images([decode_image(sample.image) for sample in samples], 64))


def learning_rate(step: int, config: CopyDetectorConfig) -> float:
    """Linear warmup, then a half cosine to 0."""
    warm = min(1.0, (step + 1) / config.warmup_steps)
    return config.lr * warm * 0.5 * (1 + math.cos(math.pi * step / config.steps))


def hard_batches(memory: Tensor, alike: Tensor, batch_size: int, generator: torch.Generator) -> Tensor:
    """``[batches, batch_size]`` rows: each image once, beside another one that lies near it now.

    Args:
        memory: ``[n, d]`` present embeddings of all images.
        alike: ``[n, n]`` bool, images that are not to be told apart.
        batch_size: even.
        generator: of the order, and of which of the four nearest comes along.
    """
    half = batch_size // 2
    order = torch.randperm(len(memory), generator=generator)[: len(memory) // half * half]
    nearest = (memory[order] @ memory.T).masked_fill(alike[order], -2).topk(4, dim=1).indices
    pick = torch.randint(0, 4, (len(order), 1), generator=generator)
    partner = nearest.gather(1, pick).squeeze(1)
    return torch.cat([order.view(-1, half), partner.view(-1, half)], 1)


def two_views(
    model: CopyDetector, batch: Tensor, step: int, config: CopyDetectorConfig, generator: torch.Generator
) -> tuple[Tensor, Tensor, int]:
    """Two edited views of each image, and of how many images, the first ones, the second view is attacked.

    Args:
        model: attacked as it is now; it is left in evaluation mode.
        batch: ``[n, 3, H, W]`` in [0, 1].
        step: edits grow with it, and attacks on pixels and on a coarse field take turns.
        config: the recipe's settings.
        generator: the source of all draws.
    """
    grown = min(1.0, step / (config.ramp * config.steps))
    view_a = edited(batch, 0.3, generator)
    view_b = edited(batch, 0.4 + 0.6 * grown, generator)
    n_attacked = round(config.attack_share * len(batch)) if grown == 1 else 0
    if n_attacked:
        coarse = step % 2 == 0
        # Under attack a view is edited less: the two together must leave a copy that one can see.
        view_b[:n_attacked] = attacked(
            model.eval(),
            edited(batch[:n_attacked], 0.5, generator),
            embedded(model, view_a[:n_attacked]),
            bound=config.attack_field if coarse else config.attack_pixels,
            coarse=coarse,
            steps=config.attack_steps,
            generator=generator,
        )
    return view_a, view_b, n_attacked


def train(config: CopyDetectorConfig, images: Tensor) -> CopyDetector:
    """The trained detector, in evaluation mode; continues from ``work_dir`` if a run was stopped there.

    Args:
        config: the recipe's settings.
        images: ``[n, 3, 64, 64]`` float32 in [0, 1].
    """
    torch.manual_seed(config.seed)
    images = images.contiguous(memory_format=torch.channels_last)
    model = CopyDetector()
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
        ]
    )
    alike = pixels_alike(images, config.alike)
    log.info("%d images, %.1f alike each", len(images), alike.float().sum(1).mean() - 1)

    first, memory, batches = 0, torch.empty(0), torch.empty(0)
    checkpoint = Path(config.work_dir) / "checkpoint.pt"
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, memory, batches = state["step"], state["memory"], state["batches"]
        log.info("continuing at step %d", first)

    per_epoch = len(images) // (config.batch_size // 2)
    seen = {"loss": 0.0, "copies": 0.0, "attacked": 0.0, "nearest": 0.0}
    started = time.monotonic()
    with progress(total=config.steps - first, desc="copy detector", unit="step") as bar:
        for step in range(first, config.steps):
            generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
            if step % per_epoch == 0:
                memory = embedded(model, images)
                batches = hard_batches(memory, alike, config.batch_size, generator)
            rows = batches[step % per_epoch]
            view_a, view_b, n_attacked = two_views(model, images[rows], step, config, generator)
            model.train()
            with torch.autocast("cpu", torch.bfloat16):
                z_a, z_b = model(torch.cat([view_a, view_b])).chunk(2)
            near = torch.cat([alike[rows][:, rows], alike[rows]], 1)
            everything = torch.cat([z_a, memory])
            spread = 0.5 * (entropy(z_a, everything, near) + entropy(z_b, everything, near))
            cosine = (z_a * z_b).sum(1)
            loss = (
                info_nce(z_a, z_b, memory, near, config.temperature)
                + config.entropy_weight * spread
                + config.alignment_weight * (1 - cosine).mean()
            )
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, config)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()

            with torch.no_grad():
                seen["loss"] += loss.item()
                seen["copies"] += cosine[n_attacked:].mean().item()
                seen["attacked"] += cosine[:n_attacked].mean().item() if n_attacked else 0.0
                seen["nearest"] += (z_a @ memory.T).masked_fill(alike[rows], -1).amax(1).mean().item()
            bar.update(1)
            if (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps:
                means = "  ".join(f"{k} {v / config.checkpoint_every:.3f}" for k, v in seen.items())
                log.info("step %d  %s  %.0f s", step + 1, means, time.monotonic() - started)
                seen = dict.fromkeys(seen, 0.0)
                state = {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "step": step + 1,
                    "memory": memory,
                    "batches": batches,
                }
                with write_atomic(checkpoint) as path:
                    torch.save(state, path)
    return model.eval()


def run(config: CopyDetectorConfig) -> dict[str, Any]:
    """Train, write weights and measurements, and return the latter."""
    torch.set_num_threads(config.threads)
    images = part_images("pretrain")
    if config.renditions:
        images = torch.cat([images, shard_images(config.renditions)])
    train(config, images).save(config.out)
    searched, pictures = part_images("pretrain", "finetune"), part_pictures("held_out")
    summary = measure(CopyDetector.load(config.out), searched, pictures, alike=config.alike, seed=config.seed)
    summary["settings"] = {k: v for k, v in asdict(config).items() if k not in ("out", "work_dir", "renditions")}
    summary["training_images"] = len(images)
    write_json(Path(config.out).with_suffix(".json"), summary)
    return summary


def main() -> None:
    """Command line: ``--config FILE`` and ``--key value``."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(description="Train and measure the carried copy detector.")
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(CopyDetectorConfig)
    config = parser.parse_args()
    config.pop("config", None)
    print(json.dumps(run(CopyDetectorConfig(**config.as_dict())), indent=1))


if __name__ == "__main__":
    main()

