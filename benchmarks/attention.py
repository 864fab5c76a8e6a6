"""A training step of the sample model's UNet under two forms of attention, in turn, in one process.

    python -m benchmarks.attention

Prints images per second of each and their ratio, in float32 and under bf16 autocast. Why ``attention: auto`` takes the
plain matrix form where a small model trains in bf16 on a CPU, and the fused kernel elsewhere.
"""

from __future__ import annotations

import statistics
import time

import torch

from train.denoising.opening.attention import set_attention
from train.denoising.opening.loading import load_pipeline, sample_model_dir

BATCH, ROUNDS = 32, 7


def main() -> None:
    unet = load_pipeline(str(sample_model_dir())).unet.train()
    x, t = torch.randn(BATCH, 4, 16, 16), torch.randint(0, 1000, (BATCH,))
    embeddings = torch.randn(BATCH, 32, unet.config.cross_attention_dim)
    for precision in ("float32", "bf16 autocast"):
        seconds: dict[str, list[float]] = {"math": [], "sdpa": []}
        for round_ in range(ROUNDS + 1):
            for attention in seconds:
                set_attention(unet, attention)
                start = time.perf_counter()
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision != "float32"):
                    loss = unet(x, t, embeddings).sample.float().square().mean()
                loss.backward()
                unet.zero_grad()
                if round_:  # the first round warms up
                    seconds[attention].append(time.perf_counter() - start)
        ratios = [sdpa / plain for sdpa, plain in zip(seconds["sdpa"], seconds["math"], strict=True)]
        speeds = ", ".join(f"{name} {BATCH / statistics.median(taken):.0f} images/s" for name, taken in seconds.items())
        print(
            f"{precision}: {speeds}; sdpa / math: {statistics.median(ratios):.2f} ({min(ratios):.2f} to "
            f"{max(ratios):.2f}), batch {BATCH}, {torch.get_num_threads()} threads, torch {torch.__version__}"
        )


if __name__ == "__main__":
    main()
