"""Recipe: train the sample model's autoencoder (factor 4, four latent channels) on the pretrain part.

    python -m train.sample_model.autoencoder --config configs/sample_model/autoencoder.yaml

Absolute and squared error with a weak KL term: latent diffusion's autoencoder without the adversarial part. At the
end latents are brought to unit variance per channel.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F

from train.finetune.config import Augmentation
from train.finetune.data.augment import augment, draw


@dataclass
class AutoencoderConfig:
    """Settings of the autoencoder's recipe.

    Args:
        out: folder to write (an ``AutoencoderKL`` directory).
        renditions: shards of further drawings (see ``train.sample_model.renditions``), or empty.
        start_from: a folder of an earlier run to go on from; None starts with random weights.
        steps: optimizer steps.
        batch_size: images a step.
        learning_rate: peak of the one-cycle schedule.
        kl_weight: weight of the KL term, per latent element.
        chroma_weight: weight of the squared error of colour (the deviation from grey), which the plain error
            leaves to the last.
        channels: width of each resolution.
        seed: of weights and draws.
        augmentation: random changes of the images.
    """

    out: str = "runs/sample_model/vae"
    renditions: list[str] = field(default_factory=list)
    start_from: str | None = None
    steps: int = 1500
    batch_size: int = 16
    learning_rate: float = 2e-3
    kl_weight: float = 1e-5
    chroma_weight: float = 6.0
    channels: list[int] = field(default_factory=lambda: [16, 32, 64])
    seed: int = 0
    augmentation: Augmentation = field(
        default_factory=lambda: Augmentation(shift=0.12, scale=0.25, flip=0.5, colour=0.3, hue=0.05, rotate=10)
    )


def load_pixels(renditions: list[str]) -> torch.Tensor:
    """The pretrain part and the further drawings as ``[n, 3, 64, 64]`` in [0, 1]."""
    from curate.reading.images import decode_image, stack_images
    from curate.reading.pipeline import ReadShards, Skipped, shard_list
    from curate.sample_set import load_part

    samples = load_part("pretrain")
    if renditions:
        samples += ReadShards(Skipped())(shard_list(renditions))
    return torch.from_numpy(stack_images([decode_image(sample.image) for sample in samples], 64))


def new_autoencoder(channels: list[int]):
    """An ``AutoencoderKL`` of random weights: four latent channels, one halving per further entry of ``channels``."""
    from diffusers import AutoencoderKL

    levels = len(channels)
    vae = AutoencoderKL(
        sample_size=64,
        block_out_channels=tuple(channels),
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=False,
    )
    vae.quant_conv.bias.data[4:] = -5.0  # start with a narrow posterior: less noise to see through at first
    return vae


@torch.no_grad()
def normalise_latents(vae, mean: torch.Tensor, std: torch.Tensor) -> None:
    """Bring every latent channel to mean 0 and standard deviation 1, without changing what is reconstructed.

    The affine map is folded into the two 1 × 1 convolutions about the latents, so that the scaling factor is 1.

    Args:
        vae: an ``AutoencoderKL``, changed in place.
        mean: ``[channels]`` of the posterior's mean over the training images.
        std: ``[channels]``, likewise.
    """
    n = len(std)
    quant, post = vae.quant_conv, vae.post_quant_conv
    quant.weight[:n] /= std.view(-1, 1, 1, 1)
    quant.bias[:n] = (quant.bias[:n] - mean) / std
    quant.bias[n:] -= 2 * std.log()  # the second half is the log-variance
    post.bias += post.weight[:, :, 0, 0] @ mean
    post.weight *= std.view(1, -1, 1, 1)
    vae.register_to_config(scaling_factor=1.0)


def train_autoencoder(config: AutoencoderConfig) -> None:
    """Train, normalise the latents, save in half precision."""
    from diffusers import AutoencoderKL

    torch.manual_seed(config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    pixels = load_pixels(config.renditions)
    if config.start_from is None:
        vae = new_autoencoder(config.channels)
    else:
        vae = AutoencoderKL.from_pretrained(config.start_from, dtype=torch.float32)
    print(f"{len(pixels)} images, {sum(p.numel() for p in vae.parameters()) / 1e6:.2f} M parameters", flush=True)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=config.learning_rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.learning_rate, total_steps=config.steps, pct_start=0.1
    )
    start = time.time()
    for step in range(config.steps):
        rows = torch.randint(len(pixels), (config.batch_size,), generator=generator)
        x = augment(pixels[rows], draw([generator] * config.batch_size), config.augmentation) * 2 - 1
        with torch.autocast("cpu", dtype=torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            y = vae.decode(posterior.sample(generator)).sample
        y = y.float()
        kl = posterior.kl().float().mean() / posterior.mean[0].numel()
        chroma = F.mse_loss(y - y.mean(1, keepdim=True), x - x.mean(1, keepdim=True))
        loss = (y - x).abs().mean() + 2 * F.mse_loss(y, x) + config.chroma_weight * chroma + config.kl_weight * kl
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == config.steps - 1:
            mse = F.mse_loss(y.clamp(-1, 1), x).item() / 4  # on the [0, 1] scale
            print(
                f"step {step} loss {loss.item():.4f} psnr {-10 * torch.log10(torch.tensor(mse)):.1f} dB "
                f"kl {kl.item():.2f} {time.time() - start:.0f} s",
                flush=True,
            )
    with torch.no_grad():
        latents = torch.cat([vae.encode(x * 2 - 1).latent_dist.mean for x in pixels.split(64)])
    print(f"latents before normalisation: channel std {latents.std((0, 2, 3)).tolist()}")
    normalise_latents(vae, latents.mean((0, 2, 3)), latents.std((0, 2, 3)))
    Path(config.out).parent.mkdir(parents=True, exist_ok=True)
    vae.half().save_pretrained(config.out)


if __name__ == "__main__":
    from jsonargparse import auto_cli

    train_autoencoder(auto_cli(AutoencoderConfig, as_positional=False))

