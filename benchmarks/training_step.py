"""A step of ``train finetune`` beside one of diffusers' ``train_text_to_image.py``, in turn, in one process.

    python -m benchmarks.training_step                  both models, all settings
    python -m benchmarks.training_step --model sample --only latents,ema --rounds 20

Ours is :func:`train.finetune.loop.train` as users run it, without the filter: shards, log and progress, all that lies
between one step and the next. Theirs is ``examples/text_to_image/train_text_to_image.py`` of diffusers (Apache-2.0;
read at commit 58eb52c, 0.40.0.dev0). Neither the wheel nor the source distribution holds that script, and it wants
torchvision and a data set of its own, so :func:`script_steps` makes the same calls in the same order. What differs:
images are decoded and scaled by the project's own reader on both sides; the progress bar writes to nowhere; and but
for ``pixels`` both sides start from the posterior that the VAE gave for an image once, where the script, which keeps
no latents, would encode the image again.

Both sides train the same weights on the same samples, with the same batch size, precision and kernel for attention;
both take AdamW and clip at 1, the script with ``torch.optim.AdamW``'s defaults; both average the weights (``ema``) in
one call for all of them. ``attention`` alone compares defaults: the script's fused kernel with what ours chooses. bf16
runs where the hardware is fast in it, or when it is named.

The models are the one that the project carries (64 pixels, latents of 16 × 16) and one in the shape of Stable Diffusion
1.x with 50 million random weights in its UNet (128 pixels, latents of 32 × 32).

Steps alternate in blocks of five, each with a line of our log in it; the first block of each side warms up. Printed
are the medians over the blocks of a step's time, and the median ratio of neighbouring blocks with its quartiles; then
the same ratio of processor seconds, of all threads, which what else the machine does changes less.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from afresh.progress import progress
from curate.reading.images import decode_image, image_array
from curate.reading.samples import Sample
from curate.reading.writing import write_shard
from curate.sample_set import load_part
from train.denoising.families.stable_diffusion import pixel_size
from train.denoising.opening.attention import set_attention
from train.denoising.opening.loading import load_pipeline, sample_model_dir
from train.finetune.config import FilterConfig, FinetuneConfig
from train.finetune.loop import train
from train.finetune.preparation import make_accelerator, resolve_precision
from train.sample_model.small import SmallModel, build_pipeline

BLOCK = 5
SAMPLES = 64
BATCH = {"sample": 16, "mid": 2}
SETTINGS: dict[str, dict[str, Any]] = {
    "latents": {},
    "batch_of_one": {"batch_size": 1},
    "ema": {"ema_decay": 0.999},
    "checkpointing": {"gradient_checkpointing": True},
    "pixels": {"cache_latents": False},
    "bf16": {"mixed_precision": "bf16"},
    "attention": {"attention": "auto"},
}


def save_mid_size(folder: Path) -> None:
    """A pipeline in the shape of Stable Diffusion 1.x, with a UNet of about 50 million random weights."""
    from diffusers import UNet2DConditionModel

    small = SmallModel(tokens=77, text_width=256, text_layers=4)
    pipe = build_pipeline(small, ["grinning face, face smiling"], vae_dir=str(sample_model_dir() / "vae"))
    pipe.unet = UNet2DConditionModel(
        sample_size=32, block_out_channels=(96, 192, 288, 288), attention_head_dim=8, cross_attention_dim=256
    )
    pipe.save_pretrained(folder)


# ---------------------------------------------------------------------------------------------------- their side


class ScriptData(torch.utils.data.Dataset):
    """What the script's data set gives for a batch: pixels in [−1, 1], or posteriors, and token ids.

    Args:
        samples: captioned images.
        pipe: whose tokenizer and VAE are used.
        encoded: the posteriors ``[2c, h, w]`` of the images, made here, instead of their pixels.
    """

    def __init__(self, samples: list[Sample], pipe: Any, encoded: bool) -> None:
        self.samples, self.tokenizer, self.size = samples, pipe.tokenizer, pixel_size(pipe)
        self.moments = None
        if encoded:
            with torch.no_grad():
                self.moments = [pipe.vae.encode(self.pixels(s)[None]).latent_dist.parameters[0] for s in samples]

    def pixels(self, sample: Sample) -> torch.Tensor:
        """An image ``[3, size, size]`` in [−1, 1]."""
        return torch.from_numpy(image_array(decode_image(sample.image), self.size)) * 2 - 1

    def __len__(self) -> int:
        return len(self.samples)

    def __getitems__(self, rows: list[int]) -> list[dict[str, torch.Tensor]]:
        texts = [self.samples[row].caption or "" for row in rows]
        length = self.tokenizer.model_max_length
        ids = self.tokenizer(texts, max_length=length, padding="max_length", truncation=True, return_tensors="pt")
        if self.moments is None:
            images = [self.pixels(self.samples[row]) for row in rows]
        else:
            images = [self.moments[row] for row in rows]
        return [{"images": image, "input_ids": i} for image, i in zip(images, ids.input_ids, strict=True)]


def script_steps(model: str, samples: list[Sample], config: FinetuneConfig) -> Iterator[None]:
    """The script's loop without end, with our settings brought to its options; one optimizer step for each ``next``."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from diffusers import DDPMScheduler
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel
    from tqdm import tqdm

    AcceleratorState._reset_state()  # an earlier run in this process may have had another precision
    accelerator = Accelerator(gradient_accumulation_steps=1, mixed_precision=config.mixed_precision)
    pipe = load_pipeline(model)
    unet, vae, text_encoder = pipe.unet, pipe.vae, pipe.text_encoder
    set_attention(unet, "sdpa" if config.attention == "auto" else config.attention)
    noise_scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    data = ScriptData(samples, pipe, encoded=config.cache_latents)
    vae.requires_grad_(False)
    text_encoder.requires_grad_(False)
    unet.train()
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    ema = EMAModel(unet.parameters(), decay=config.ema_decay, foreach=True) if config.ema_decay else None
    betas = (0.9, config.adam_beta2 or 0.999)
    optimizer = torch.optim.AdamW(
        unet.parameters(), lr=config.learning_rate, betas=betas, weight_decay=config.weight_decay, eps=1e-8
    )
    loader = torch.utils.data.DataLoader(data, shuffle=True, batch_size=config.batch_size, num_workers=config.workers)
    schedule = get_scheduler("constant", optimizer=optimizer, num_warmup_steps=0, num_training_steps=config.steps)
    unet, optimizer, loader, schedule = accelerator.prepare(unet, optimizer, loader, schedule)
    weight_dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
    text_encoder.to(accelerator.device, dtype=weight_dtype)
    vae.to(accelerator.device, dtype=weight_dtype)

    with open(os.devnull, "w") as nowhere:
        bar = tqdm(range(config.steps), desc="Steps", file=nowhere)
        step = 0
        while True:
            for batch in loader:
                train_loss = 0.0
                with accelerator.accumulate(unet):
                    if config.cache_latents:
                        latents = DiagonalGaussianDistribution(batch["images"]).sample()
                    else:
                        latents = vae.encode(batch["images"].to(weight_dtype)).latent_dist.sample()
                    latents = latents * vae.config.scaling_factor
                    noise = torch.randn_like(latents)
                    n = len(latents)
                    t = torch.randint(0, noise_scheduler.config.num_train_timesteps, (n,), device=latents.device)
                    noisy_latents = noise_scheduler.add_noise(latents, noise, t)
                    embeddings = text_encoder(batch["input_ids"], return_dict=False)[0]
                    output = unet(noisy_latents, t, embeddings, return_dict=False)[0]
                    loss = F.mse_loss(output.float(), noise.float(), reduction="mean")
                    train_loss += accelerator.gather(loss.repeat(config.batch_size)).mean().item()
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(unet.parameters(), config.max_grad_norm)
                    optimizer.step()
                    schedule.step()
                    optimizer.zero_grad()
                if accelerator.sync_gradients:
                    if ema is not None:
                        ema.step(unet.parameters())
                    bar.update(1)
                    step += 1
                    accelerator.log({"train_loss": train_loss}, step=step)
                bar.set_postfix(step_loss=loss.detach().item(), lr=schedule.get_last_lr()[0])
                yield


# ----------------------------------------------------------------------------------------------------- in turn


def clocks() -> np.ndarray:
    """Seconds on the wall, and those that processors have given to this process: ``[2]``."""
    return np.array([time.perf_counter(), time.process_time()])


class Turns:
    """Stands where the loop asks, once in every step, whether it is to stop; there the other side takes its turn.

    Args:
        theirs: takes one of their steps for each ``next``.
        bar: counts the blocks.

    Attributes:
        seconds: of a step, for each pair of blocks: ``((ours, theirs) on the wall, (ours, theirs) of processors)``.
    """

    def __init__(self, theirs: Iterator[None], bar: Any) -> None:
        self.theirs, self.bar = theirs, bar
        self.seconds: list[np.ndarray] = []
        self._steps, self._began = 0, clocks()

    @property
    def asked(self) -> bool:
        """Never asks the loop to stop."""
        self._steps += 1
        if self._steps % BLOCK == 0:
            between = clocks()
            for _ in range(BLOCK):
                next(self.theirs)
            now = clocks()
            self.seconds.append(np.stack([between - self._began, now - between], axis=1) / BLOCK)
            self.bar.update(1)
            self._began = now
        return False

    def check(self) -> None:
        """Never gives up what comes before the first step."""


def compare(name: str, setting: str, model: str, shards: Path, samples: list[Sample], rounds: int) -> None:
    """Print both sides' step time with one setting, and the ratio."""
    with tempfile.TemporaryDirectory() as out:
        values = {"cache_latents": True, "attention": "sdpa", "batch_size": BATCH[name]} | SETTINGS[setting]
        config = FinetuneConfig(
            model, out, [str(shards)], steps=BLOCK * (rounds + 1), caption_dropout=0.0, workers=0, log_every=BLOCK,
            checkpoint_every=0,
            mixed_precision="no", weight_decay=1e-2, filter=FilterConfig("off"), **values,
        )  # fmt: skip
        accelerator = make_accelerator(config)
        with progress(total=rounds + 1, desc=f"{name}: {setting}", unit="blocks") as bar:
            turns = Turns(script_steps(model, samples, config), bar)
            train(config, config.batch_size, accelerator, turns)  # type: ignore[arg-type]
    seconds = np.array(turns.seconds[1:])  # the first blocks hold what comes before the first step
    ours, theirs = np.median(seconds[:, 0], axis=0) * 1000
    low, ratio, high = np.quantile(seconds[..., 0] / seconds[..., 1], [0.25, 0.5, 0.75], axis=0)
    print(
        f"{name:<7} {setting:<14} {config.batch_size:>5} {ours:>9.1f} ms {theirs:>9.1f} ms  "
        f"× {ratio[0]:.3f} ({low[0]:.3f} to {high[0]:.3f})  × {ratio[1]:.3f} ({low[1]:.3f} to {high[1]:.3f})",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["sample", "mid"], help="one of the two")
    parser.add_argument("--only", help=f"some of the settings, by commas: {','.join(SETTINGS)}")
    parser.add_argument("--rounds", type=int, default=8, help="pairs of blocks that count")
    args = parser.parse_args()
    samples = load_part("finetune")[:SAMPLES]
    usual = [setting for setting in SETTINGS if setting != "bf16" or resolve_precision("auto") == "bf16"]
    with tempfile.TemporaryDirectory() as folder:
        shards = Path(folder) / "000000.tar"
        write_shard(str(shards), [(sample.key, dict(sample.members)) for sample in samples])
        print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, float32 unless said otherwise")
        print(
            f"{'model':<7} {'setting':<14} batch {'ours':>12} {'diffusers':>12}  "
            f"{'ours / diffusers (quartiles)':<28} of processor seconds"
        )
        for name in [args.model] if args.model else ["sample", "mid"]:
            model = sample_model_dir()
            if name == "mid":
                model = Path(folder) / "mid"
                save_mid_size(model)
            for setting in args.only.split(",") if args.only else usual:
                compare(name, setting, str(model), shards, samples, args.rounds)


if __name__ == "__main__":
    main()
