"""A step of ``train finetune`` beside one of diffusers' script of the same family, in turn, in one process.

    python -m benchmarks.training_step_families                     all four families
    python -m benchmarks.training_step_families --only flux --rounds 16

=================  ==============================================  ============
family             diffusers' script (0.40.0.dev0, at 58eb52c)     trained
=================  ==============================================  ============
``xl``             ``text_to_image/train_text_to_image_sdxl.py``   the UNet
``sd3``            ``dreambooth/train_dreambooth_lora_sd3.py``     LoRA
``flux``           ``dreambooth/train_dreambooth_lora_flux.py``    LoRA
``z_image``        ``dreambooth/train_dreambooth_lora_z_image.py`` LoRA
=================  ==============================================  ============

Ours and theirs take turns as in ``benchmarks.training_step``, whose docstring says how that is timed and why the
scripts' calls are made here instead of the scripts. Both sides begin a step with the posterior of the VAE and the
captions' embeddings made once. The scripts for Stable Diffusion 3 and FLUX encode captions of their own in every step,
which is left out here, and decode images that they do not use where latents are cached, which is left out too; so a
ratio below one is not of that kind. Both draw timesteps as the script does by default. LoRA: rank 16 on the attention's
projections. Without the filter, float32, one image size.

The models have the shape of their family with random weights of 20 to 70 million in the network, at 128 pixels, which
are latents of 32 × 32 here.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from afresh.progress import progress
from benchmarks.training_step import BLOCK, SAMPLES, Turns
from curate.reading.images import decode_image, image_array
from curate.reading.samples import Sample
from curate.reading.writing import write_shard
from curate.sample_set import load_part
from tests.train.families import WIDTH, tiny_flux, tiny_sd3, tiny_xl, tiny_z_image
from train.denoising.opening.attention import set_attention
from train.denoising.opening.config import LoRAConfig
from train.denoising.opening.loading import load_pipeline
from train.finetune.config import FilterConfig, FinetuneConfig, Flow
from train.finetune.loop import train
from train.finetune.preparation import make_accelerator

PIXELS, RANK = 128, 16
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


# -------------------------------------------------------------------------------------------------------- models


def larger_xl() -> Any:
    """Stable Diffusion XL's shape: no attention at the first resolution, more transformer blocks at the last."""
    from diffusers import UNet2DConditionModel

    pipe = tiny_xl()
    pipe.unet = UNet2DConditionModel(
        sample_size=PIXELS // 4,
        block_out_channels=(96, 192, 288),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=[1, 2, 4],
        attention_head_dim=[3, 6, 9],
        cross_attention_dim=2 * WIDTH,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=6 * 32 + WIDTH,
    )
    return pipe


def larger_sd3() -> Any:
    """Stable Diffusion 3's shape: joint blocks."""
    from diffusers import SD3Transformer2DModel

    pipe = tiny_sd3()
    config = {**pipe.transformer.config, "sample_size": PIXELS // 4, "num_layers": 10, "num_attention_heads": 6}
    pipe.transformer = SD3Transformer2DModel.from_config(
        {**config, "attention_head_dim": 64, "caption_projection_dim": 384}
    )
    return pipe


def larger_flux() -> Any:
    """FLUX.1 dev's shape: joint blocks, and twice as many of one stream."""
    from diffusers import FluxTransformer2DModel

    pipe = tiny_flux(side=PIXELS // 4)
    config = {**pipe.transformer.config, "num_layers": 4, "num_single_layers": 8, "num_attention_heads": 6}
    pipe.transformer = FluxTransformer2DModel.from_config(
        {**config, "attention_head_dim": 64, "axes_dims_rope": (16, 24, 24)}
    )
    return pipe


def larger_z_image() -> Any:
    """Z-Image's shape: one stream."""
    from diffusers import ZImageTransformer2DModel

    pipe = tiny_z_image()
    config = {**pipe.transformer.config, "dim": 384, "n_layers": 10, "n_heads": 6, "n_kv_heads": 6}
    pipe.transformer = ZImageTransformer2DModel.from_config(
        {**config, "axes_dims": [16, 24, 24], "axes_lens": [640, 32, 32]}
    )
    return pipe


# ---------------------------------------------------------------------------------------------------- their side


class Cached(torch.utils.data.Dataset):
    """Posteriors and embeddings of samples, made once.

    Args:
        pipe: whose VAE and text encoders are used.
        samples: captioned images.
    """

    def __init__(self, pipe: Any, samples: list[Sample]) -> None:
        self.items: list[dict[str, Any]] = []
        with torch.no_grad():
            for sample in samples:
                pixels = torch.from_numpy(image_array(decode_image(sample.image), PIXELS)) * 2 - 1
                posterior = pipe.vae.encode(pixels[None]).latent_dist.parameters[0]
                self.items.append({"posterior": posterior, **self.encoded(pipe, sample.caption or "")})

    @staticmethod
    def encoded(pipe: Any, caption: str) -> dict[str, Any]:
        """What the family's network is given of a caption."""
        kind = type(pipe).__name__
        if kind == "StableDiffusionXLPipeline":
            embeds, _, pooled, _ = pipe.encode_prompt(caption, do_classifier_free_guidance=False)
        elif kind == "StableDiffusion3Pipeline":
            embeds, _, pooled, _ = pipe.encode_prompt(caption, caption, caption, do_classifier_free_guidance=False)
        elif kind == "FluxPipeline":
            embeds, pooled, _ = pipe.encode_prompt(caption, caption)
        else:
            return {"embeds": pipe.encode_prompt(caption, do_classifier_free_guidance=False)[0][0]}
        return {"embeds": embeds[0], "pooled": pooled[0]}

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return self.items[row]

    @staticmethod
    def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch; embeddings stay a list where they differ in length."""
        batch = {name: [item[name] for item in items] for name in items[0]}
        same = {name: torch.stack(of) for name, of in batch.items() if len({len(one) for one in of}) == 1}
        return batch | same


Loss = Callable[[Any, Any, dict[str, Any]], Tensor]
"""Of the network, the pipeline and a batch."""


def latents_of(pipe: Any, batch: dict[str, Any]) -> Tensor:
    """Drawn from the posteriors, shifted and scaled."""
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    drawn = DiagonalGaussianDistribution(batch["posterior"]).sample()
    return (drawn - (pipe.vae.config.shift_factor or 0.0)) * pipe.vae.config.scaling_factor


def xl_loss(unet: Any, pipe: Any, batch: dict[str, Any]) -> Tensor:
    """The lines of the script for Stable Diffusion XL."""
    model_input = latents_of(pipe, batch)
    noise = torch.randn_like(model_input)
    n, schedule = len(model_input), pipe.noise_scheduler
    timesteps = torch.randint(0, schedule.config.num_train_timesteps, (n,))
    noisy_model_input = schedule.add_noise(model_input, noise, timesteps)
    sizes = [(64, 64, 0, 0, PIXELS, PIXELS)] * n
    add_time_ids = torch.cat([torch.tensor([size], dtype=torch.float32) for size in sizes])
    added = {"time_ids": add_time_ids, "text_embeds": batch["pooled"]}
    model_pred = unet(noisy_model_input, timesteps, batch["embeds"], added_cond_kwargs=added, return_dict=False)[0]
    return F.mse_loss(model_pred.float(), noise.float(), reduction="mean")


def noised(pipe: Any, model_input: Tensor, scheme: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Noise, timesteps, noised latents and weights, as all scripts for flow matching make them."""
    from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3

    schedule = pipe.noise_scheduler
    noise = torch.randn_like(model_input)
    u = compute_density_for_timestep_sampling(
        weighting_scheme=scheme, batch_size=len(noise), logit_mean=0.0, logit_std=1.0, mode_scale=1.29
    )
    indices = (u * schedule.config.num_train_timesteps).long()
    timesteps = schedule.timesteps[indices]
    step_indices = [(schedule.timesteps == t).nonzero().item() for t in timesteps]
    sigmas = schedule.sigmas[step_indices].flatten().view(-1, 1, 1, 1)
    weights = compute_loss_weighting_for_sd3(weighting_scheme=scheme, sigmas=sigmas)
    return noise, timesteps, (1.0 - sigmas) * model_input + sigmas * noise, weights


def flow_loss(model_pred: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """The last lines of those scripts."""
    squares = weights.float() * (model_pred.float() - target.float()) ** 2
    return torch.mean(squares.reshape(len(target), -1), 1).mean()


def sd3_loss(transformer: Any, pipe: Any, batch: dict[str, Any]) -> Tensor:
    """The lines of the script for Stable Diffusion 3."""
    model_input = latents_of(pipe, batch)
    noise, timesteps, noisy, weights = noised(pipe, model_input, "logit_normal")
    model_pred = transformer(
        hidden_states=noisy,
        timestep=timesteps,
        encoder_hidden_states=batch["embeds"],
        pooled_projections=batch["pooled"],
        return_dict=False,
    )[0]
    return flow_loss(model_pred, noise - model_input, weights)


def flux_loss(transformer: Any, pipe: Any, batch: dict[str, Any]) -> Tensor:
    """The lines of the script for FLUX."""
    model_input = latents_of(pipe, batch)
    n, channels, height, width = model_input.shape
    image_ids = pipe._prepare_latent_image_ids(n, height // 2, width // 2, "cpu", torch.float32)
    noise, timesteps, noisy, weights = noised(pipe, model_input, "none")
    model_pred = transformer(
        hidden_states=pipe._pack_latents(noisy, n, channels, height, width),
        timestep=timesteps / 1000,
        guidance=torch.tensor([3.5]).expand(n),
        pooled_projections=batch["pooled"],
        encoder_hidden_states=batch["embeds"],
        txt_ids=torch.zeros(batch["embeds"].shape[1], 3),
        img_ids=image_ids,
        return_dict=False,
    )[0]
    model_pred = pipe._unpack_latents(model_pred, height * 4, width * 4, 4)
    return flow_loss(model_pred, noise - model_input, weights)


def z_image_loss(transformer: Any, pipe: Any, batch: dict[str, Any]) -> Tensor:
    """The lines of the script for Z-Image."""
    model_input = latents_of(pipe, batch)
    noise, timesteps, noisy, weights = noised(pipe, model_input, "none")
    inputs = list(noisy.unsqueeze(2).unbind(dim=0))
    found = transformer(inputs, (1000 - timesteps) / 1000, list(batch["embeds"]), return_dict=False)[0]
    return flow_loss(-torch.stack(found, dim=0).squeeze(2), noise - model_input, weights)


FAMILIES: dict[str, tuple[Callable[[], Any], Loss, dict[str, Any]]] = {
    "xl": (larger_xl, xl_loss, {}),
    "sd3": (larger_sd3, sd3_loss, {"lora": LoRAConfig(rank=RANK, targets=TARGETS)}),
    "flux": (
        larger_flux,
        flux_loss,
        {"lora": LoRAConfig(rank=RANK, targets=TARGETS), "flow": Flow(density="uniform")},
    ),
    "z_image": (
        larger_z_image,
        z_image_loss,
        {"lora": LoRAConfig(rank=RANK, targets=TARGETS), "flow": Flow(density="uniform")},
    ),
}
"""Of each: its model, the script's loss, and what sets ours to the script's defaults."""


def script_steps(model: str, samples: list[Sample], config: FinetuneConfig, loss_of: Loss) -> Iterator[None]:
    """The scripts' loop without end; one optimizer step for each ``next``."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from diffusers import DDPMScheduler
    from diffusers.optimization import get_scheduler
    from peft import LoraConfig
    from tqdm import tqdm

    AcceleratorState._reset_state()
    accelerator = Accelerator(gradient_accumulation_steps=1, mixed_precision="no")
    pipe = load_pipeline(model)
    network = pipe.transformer if hasattr(pipe, "transformer") else pipe.unet
    flow = "Flow" in type(pipe.scheduler).__name__
    pipe.noise_scheduler = pipe.scheduler if flow else DDPMScheduler.from_config(pipe.scheduler.config)
    data = Cached(pipe, samples)
    if config.lora.rank:
        network.requires_grad_(False)
        network.add_adapter(
            LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=config.lora.targets)
        )
    else:
        set_attention(network, config.attention)  # adapters keep what the network was loaded with: the fused kernel
    network.train()
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=config.learning_rate, betas=(0.9, 0.999), weight_decay=config.weight_decay, eps=1e-8
    )
    loader = torch.utils.data.DataLoader(data, shuffle=True, batch_size=config.batch_size, collate_fn=data.collate)
    schedule = get_scheduler("constant", optimizer=optimizer)
    network, optimizer, loader, schedule = accelerator.prepare(network, optimizer, loader, schedule)
    with open(os.devnull, "w") as nowhere:
        bar, step = tqdm(range(config.steps), desc="Steps", file=nowhere), 0
        while True:
            for batch in loader:
                with accelerator.accumulate(network):
                    loss = loss_of(network, pipe, batch)
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(trained, config.max_grad_norm)
                    optimizer.step()
                    schedule.step()
                    optimizer.zero_grad()
                bar.update(1)
                step += 1
                logs = {"loss": loss.detach().item(), "lr": schedule.get_last_lr()[0]}
                bar.set_postfix(**logs)
                accelerator.log(logs, step=step)
                yield


# ----------------------------------------------------------------------------------------------------- in turn


def compare(family: str, folder: Path, shards: Path, samples: list[Sample], batch: int, rounds: int) -> None:
    """Print both sides' step time of one family, and the ratio."""
    build, loss_of, options = FAMILIES[family]
    torch.manual_seed(0)
    pipe = build()
    network = pipe.transformer if hasattr(pipe, "transformer") else pipe.unet
    for parameter in network.parameters():  # some begin at zero
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    size = sum(p.numel() for p in network.parameters()) / 1e6
    model = str(folder / family)
    pipe.save_pretrained(model)
    del pipe, network
    with tempfile.TemporaryDirectory() as out:
        config = FinetuneConfig(
            model, out, [str(shards)], steps=BLOCK * (rounds + 1), batch_size=batch, caption_dropout=0.0, workers=0,
            log_every=BLOCK, checkpoint_every=0, mixed_precision="no", weight_decay=1e-2, resolution=PIXELS,
            cache_latents=True, cache_text="memory", attention="sdpa", filter=FilterConfig("off"), **options,
        )  # fmt: skip
        with progress(total=rounds + 1, desc=family, unit="blocks") as bar:
            turns = Turns(script_steps(model, samples, config, loss_of), bar)
            train(config, batch, make_accelerator(config), turns)  # type: ignore[arg-type]
    seconds = np.array(turns.seconds[1:])  # the first blocks hold what comes before the first step
    ours, theirs = np.median(seconds[:, 0], axis=0) * 1000
    low, ratio, high = np.quantile(seconds[..., 0] / seconds[..., 1], [0.25, 0.5, 0.75], axis=0)
    print(
        f"| {family} | {size:.0f} M | {'LoRA' if config.lora.rank else 'all'} | {batch} | {ours:.0f} ms | "
        f"{theirs:.0f} ms | {ratio[0]:.3f} ({low[0]:.3f} to {high[0]:.3f}) | "
        f"{ratio[1]:.3f} ({low[1]:.3f} to {high[1]:.3f}) |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help=f"some of the families, by commas: {','.join(FAMILIES)}")
    parser.add_argument("--batch", type=int, default=4, help="images in a step")
    parser.add_argument("--rounds", type=int, default=8, help="pairs of blocks that count")
    args = parser.parse_args()
    samples = load_part("finetune")[:SAMPLES]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards = folder / "000000.tar"
        write_shard(str(shards), [(sample.key, dict(sample.members)) for sample in samples])
        print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, float32")
        print("| family | weights | trained | batch | ours | diffusers | ours / diffusers (quartiles) | of CPU time |")
        print("|---|---|---|---|---|---|---|---|")
        for family in args.only.split(",") if args.only else FAMILIES:
            compare(family, folder, shards, samples, args.batch, args.rounds)


if __name__ == "__main__":
    main()
