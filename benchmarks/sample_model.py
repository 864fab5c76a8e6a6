"""How well a sample model draws what its captions say, and whether it copies: a point of its learning curve.

    python -m benchmarks.sample_model train/assets/sample_model
    python -m benchmarks.sample_model runs/sample_model/pretrain/model --captions 64

Draws evenly spaced captions of the fine-tuning and of the held-out part, whose carried images the model was not trained
on, an image each, and prints their alignment by the dual encoder as a share of what those images earn, and how many
images correlate with them above 0.9 at 16 × 16 pixels. Two minutes on two cores.
"""

from __future__ import annotations

import argparse

import torch

from curate.reading.images import decode_image, stack_images
from curate.sample_set import load_part
from train.denoising.opening.loading import load_pipeline
from train.evaluation.judging.dual_encoder import DualEncoder
from train.evaluation.judging.metrics import thumbnails

COPY, BATCH = 0.9, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="pipeline folder")
    parser.add_argument("--captions", type=int, default=128, help="of each part")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--scale", type=float, default=4.0, help="guidance scale")
    args = parser.parse_args()
    pipe, judge = load_pipeline(args.model), DualEncoder.load()
    pipe.set_progress_bar_config(disable=True)
    for part in ("finetune", "held_out"):
        samples = load_part(part)
        samples = samples[:: max(1, len(samples) // args.captions)][: args.captions]
        captions, real = [s.caption or "" for s in samples], [decode_image(s.image) for s in samples]
        drawn = []
        for start in range(0, len(captions), BATCH):
            some = captions[start : start + BATCH]
            seeds = [torch.Generator().manual_seed(start + row) for row in range(len(some))]
            drawn += pipe(some, num_inference_steps=args.steps, guidance_scale=args.scale, generator=seeds).images
        texts = judge.embed_texts(captions)
        earned, wanted = ((judge.embed_images(images) * texts).sum(1).mean() for images in (drawn, real))
        alike = (thumbnails(stack_images(drawn, 64)) * thumbnails(stack_images(real, 64))).sum(1)
        print(
            f"{part}: {len(captions)} captions, alignment {earned:.3f}, {earned / wanted:.2f} of real images' "
            f"{wanted:.3f}; {(alike > COPY).sum()} copies by pixels",
            flush=True,
        )


if __name__ == "__main__":
    main()
