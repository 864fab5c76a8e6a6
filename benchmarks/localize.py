"""NeMo's search for neurons as published beside ours, on the same prompts and to the same criterion.

    python -m benchmarks.localize --run runs/quickstart            both searches on the quickstart's raw model
    python -m benchmarks.localize --run runs/quickstart --curve docs/images/neurons.png
                                                                   copies against the number of blocked neurons

As published (algorithms 1 and 2): candidate sets one after the other, then layer by layer, then neuron by neuron, every
question asked of all memorized seeds. Both searches have the same first step (one pass per seed), threshold, memorized
seeds and code for a pass, with the seeds of one question as one batch; the reference lacks nothing but the shortcuts.
Evaluations are UNet passes of single images, a gradient counted as three; seconds are CPU time on one thread. Each kept
neuron is then tried alone, which is not counted: how many could be spared after all.

The curve draws the repeated captions with the first n neurons blocked, of each prompt's own, in three orders: by
z-score of the activations (the paper's candidates), by the gradient of the magnitude (ours), and at random.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image

from afresh.progress import progress
from curate.embed.protocol import Embedder
from curate.index.training_index import TrainingIndex
from train.denoising.families.stable_diffusion import encode_captions, initial_noise, latent_shape
from train.denoising.opening.loading import load_pipeline
from train.evaluation.judging.dual_encoder import DualEncoder
from train.evaluation.judging.metrics import memorized_share
from train.memorization.neurons.blocking import gates
from train.memorization.neurons.localization import Localizer
from train.memorization.neurons.search import Blocking, candidate_sets, refine, select
from train.memorization.neurons.value_neurons import Mask, activations, to_mask
from train.prompts import read_prompts
from train.sampling.pipelines.session import open_index

SEEDS = (100,)
"""Of the images; the searches did not see it."""


# ------------------------------------------------------------------------------------------- the published search


def passes(judge: Blocking, mask: Mask) -> bool:
    """The criterion as published: every memorized seed is asked."""
    return judge.score(mask) < judge.threshold


def published(judge: Blocking, sets: Sequence[Mask], sizes: Sequence[int]) -> tuple[Mask, Mask] | None:
    """The first set that passes (algorithm 1), and what is left of it when each layer, then each neuron, is unblocked
    where the set passes without (algorithm 2).
    """
    initial = next((mask for mask in sets if passes(judge, mask)), None)
    if initial is None:
        return None
    refined = initial.copy()
    layers = np.split(np.arange(len(refined)), np.cumsum(sizes)[:-1])
    for units in [*layers, *([unit] for unit in range(len(refined)))]:
        if refined[units].any():
            without = refined.copy()
            without[units] = False
            if passes(judge, without):
                refined = without
    return initial, refined


def ours(judge: Blocking, sets: Sequence[Mask], sizes: Sequence[int]) -> tuple[Mask, Mask] | None:
    """The same of the package."""
    initial = select(judge, sets)
    return None if initial is None else (initial, refine(judge, initial))


# ------------------------------------------------------------------------------------------------------- images


@torch.no_grad()
def draw(
    pipe: Any,
    localizer: Localizer,
    captions: Sequence[str],
    masks: Mask | None,
    steps: int,
    scale: float,
    seeds: Sequence[int] = SEEDS,
) -> Any:
    """Images of all captions and seeds in one batch, each caption with neurons of its own blocked."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(steps)
    x = torch.stack([initial_noise(latent_shape(pipe.unet), seed) for seed in seeds] * len(captions))
    cond = encode_captions(pipe, captions).repeat_interleave(len(seeds), 0)
    embeds = torch.cat([encode_captions(pipe, [""]).expand_as(cond), cond])
    with gates(localizer.layers) as gate:
        if masks is not None:
            factors = torch.from_numpy(~masks).float().repeat_interleave(len(seeds), 0).repeat(2, 1)[:, None]
            sizes = list(localizer.sizes.values())
            for name, part in zip(localizer.layers, factors.split(sizes, dim=2), strict=True):
                gate[name] = part
        for t in scheduler.timesteps:
            output = pipe.unet(torch.cat([x, x]), t, encoder_hidden_states=embeds, return_dict=False)[0]
            uncond, output = output.chunk(2)
            x = scheduler.step(uncond + scale * (output - uncond), t, x, return_dict=False)[0]
    pixels = pipe.vae.decode(x / pipe.vae.config.scaling_factor, return_dict=False)[0]
    return pipe.image_processor.postprocess(pixels, output_type="pil")


class Measure:
    """Similarity to the nearest training image, on SSCD's scale, and alignment with the caption."""

    def __init__(self, index: TrainingIndex, embedder: Embedder):
        self.index, self.embedder, self.encoder = index, embedder, DualEncoder.load()

    def similarity(self, images: Sequence[Image]) -> Any:
        """``[images]``."""
        return self.index.calibrate(self.index.search(self.embedder.embed(list(images)), 1)[0][:, 0])

    def alignments(self, images: Sequence[Image], captions: Sequence[str]) -> Any:
        """Cosine of each image with its caption: ``[images]``."""
        texts = self.encoder.embed_texts(captions).repeat(len(images) // len(captions), axis=0)
        return np.sum(self.encoder.embed_images(list(images)) * texts, axis=1)


# ----------------------------------------------------------------------------------------------------- the report


SEARCHES = {"published": published, "ours": ours}


def compare(pipe: Any, measure: Measure, captions: Sequence[str], localizer: Localizer, args: Any) -> None:
    """Both searches on every caption, and the images with what each found."""
    seeds, sizes = list(range(args.seeds)), list(localizer.sizes.values())
    with progress(total=len(localizer.clean), desc="calibrating", unit="captions") as bar:
        threshold = localizer.calibrate(seeds, 1.0, bar)
    print(f"threshold {threshold:.3f} on {len(localizer.clean)} clean captions; {sum(sizes)} neurons")
    found: dict[str, list[Mask]] = {name: [] for name in SEARCHES}
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in SEARCHES}
    taken: list[str] = []
    for caption in captions:
        if len(taken) == args.prompts:
            break
        rows: dict[str, Any] = {}
        for name in ("ours", "published"):
            rows[name] = search(name, localizer, caption, seeds, threshold)
            if rows[name] is None:
                break
        if None in rows.values():
            continue
        taken.append(caption)
        for name, (initial, mask, score, sparable, evaluations, seconds) in rows.items():
            found[name].append(mask)
            spent[name].append((evaluations, seconds))
            print(
                f"{name:>9}  {caption[:32]:<32}  {int(initial.sum()):>3} → {int(mask.sum()):>3} neurons, "
                f"{sparable} sparable  score {score:.3f}  {evaluations:>5} evaluations  {seconds:6.1f} CPU s",
                flush=True,
            )
    if not taken:
        return
    means = {name: np.mean(values, axis=0) for name, values in spent.items()}
    for name, (evaluations, seconds) in means.items():
        neurons = np.mean([mask.sum() for mask in found[name]])
        print(f"{name:>9}: {evaluations:.0f} evaluations, {seconds:.1f} CPU s and {neurons:.1f} neurons a prompt")
    ratio = means["published"] / means["ours"]
    print(f"published / ours: {ratio[0]:.1f} × the evaluations, {ratio[1]:.1f} × the CPU time")
    shared = [(a & b).sum() / (a | b).sum() for a, b in zip(found["published"], found["ours"], strict=True)]
    print(f"neurons in common, of all that either found: {np.mean(shared):.2f}")
    rng = np.random.default_rng(0)
    settings: dict[str, Mask | None] = {"nothing": None}
    for name in found:
        settings[name] = np.stack(found[name])
        settings[f"random, as many as {name}"] = np.stack([shuffled(mask, sizes, rng) for mask in found[name]])
    for name, masks in settings.items():
        images = draw(pipe, localizer, taken, masks, args.steps, args.scale)
        similarity = measure.similarity(images)
        print(
            f"blocked: {name:<28} memorized {memorized_share(similarity):.2f}  similarity {similarity.mean():.2f}  "
            f"alignment {measure.alignments(images, taken).mean():.2f}"
        )


def search(name: str, localizer: Localizer, caption: str, seeds: list[int], threshold: float) -> Any:
    """``(initial, refined, score, sparable, evaluations, seconds)``; None where nothing is memorized or the threshold
    is out of reach.
    """
    values = activations(localizer.pipe, [caption], localizer.layers)[0]
    sets = candidate_sets(localizer.statistics.z(values), values, localizer.sizes)
    step = localizer.first_step(caption, seeds)
    began = time.process_time()
    memorized = np.flatnonzero(step.scores("similarity") > threshold).tolist()
    if not memorized:
        print(f"{'':>9}  {caption[:32]:<32}  not memorized by this criterion")
        return None
    judge = Blocking(step, memorized, threshold)
    result = SEARCHES[name](judge, sets, list(localizer.sizes.values()))
    seconds, evaluations = time.process_time() - began, step.evaluations
    if result is None:
        print(f"{name:>9}  {caption[:32]:<32}  every neuron blocked: score {judge.score(sets[-1]):.3f}, not below")
        return None
    return *result, judge.score(result[1]), sparable(judge, result[1]), evaluations, seconds


def sparable(judge: Blocking, mask: Mask) -> int:
    """How many of the set could be unblocked, each alone."""
    left = np.flatnonzero(mask)
    for row in list(judge.rows):
        if len(left):
            left = left[Blocking(judge.step, [row], judge.threshold).singles(mask, left) < judge.threshold]
    return len(left)


def shuffled(mask: Mask, sizes: Sequence[int], rng: np.random.Generator) -> Mask:
    """As many neurons of each layer."""
    return np.concatenate([rng.permutation(part) for part in np.split(mask, np.cumsum(sizes)[:-1])])


def curve(pipe: Any, measure: Measure, captions: Sequence[str], clean: Sequence[str], args: Any) -> None:
    """Memorized share against blocked neurons, without and with the up blocks; printed and drawn."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained", dpi=130)
    FigureCanvasAgg(figure)
    for axis, up_blocks in zip(figure.subplots(1, 2, sharey=True), (False, True), strict=True):
        localizer = Localizer(pipe, clean, up_blocks=up_blocks)
        units = sum(localizer.sizes.values())
        nothing = memorized_share(measure.similarity(draw(pipe, localizer, captions, None, args.steps, args.scale)))
        orders = {
            "z-score of activations": localizer.statistics.z(activations(pipe, captions, localizer.layers)),
            "gradient of the magnitude": np.stack([slopes(localizer, caption) for caption in captions]),
            "random": np.random.default_rng(0).random((len(captions), units)),
        }
        print(f"{'with' if up_blocks else 'without'} up blocks, {units} neurons; nothing blocked: {nothing:.2f}")
        for (name, scores), colour in zip(orders.items(), ("#4c78a8", "#d1495b", "#999"), strict=True):
            rank = np.argsort(np.argsort(-scores, axis=1), axis=1)
            numbers, shares = [0], [nothing]
            for share in (0.05, 0.1, 0.2, 0.4, 1.0):
                images = draw(pipe, localizer, captions, rank < share * units, args.steps, args.scale)
                numbers.append(int(np.ceil(share * units)))
                shares.append(memorized_share(measure.similarity(images)))
            points = "  ".join(f"{n}: {s:.2f}" for n, s in zip(numbers, shares, strict=True))
            print(f"  {name:<26}{points}", flush=True)
            axis.plot(numbers, shares, color=colour, marker="o", markersize=3, label=name)
        axis.axhline(0.1 * nothing, color="#bbb", linewidth=0.8, linestyle="--")
        axis.set(xlabel=f"blocked neurons of {units}, a prompt", ylim=(-0.02, 1))
        axis.set_title(f"down and mid{' and up' if up_blocks else ''} blocks", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("memorized share of images")
    figure.axes[0].legend(frameon=False)
    figure.savefig(args.curve, metadata={"Software": None})


def slopes(localizer: Localizer, caption: str) -> Any:
    """How fast the magnitude grows with each neuron, at two noises."""
    return Blocking(localizer.first_step(caption, [0, 1]), [0, 1], 0.0, "magnitude").slopes(
        to_mask({}, localizer.sizes)
    )


def main() -> None:
    """Read the command line and print the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder of train quickstart")
    parser.add_argument("--prompts", type=int, default=3, help="memorized captions that both searches are run on")
    parser.add_argument("--seeds", type=int, default=10, help="noises that the first step is judged from")
    parser.add_argument("--clean", type=int, default=100, help="clean captions behind statistics and threshold")
    parser.add_argument("--down_mid_only", action="store_true", help="leave the up blocks out, as the paper does")
    parser.add_argument("--steps", type=int, default=25, help="denoising steps of the images")
    parser.add_argument("--scale", type=float, default=5.0, help="guidance scale of the images")
    parser.add_argument("--curve", default="", help="draw the curve into this file instead")
    args = parser.parse_args()

    prompts = read_prompts(args.run / "prompts" / "detect.jsonl")
    repeated = [prompt.caption for prompt in prompts if prompt.label == 1]
    clean = [prompt.caption for prompt in prompts if prompt.label == 0][: args.clean]
    torch.set_num_threads(1)
    pipe = load_pipeline(str(args.run / "finetune_raw" / "model"))
    pipe.unet.requires_grad_(False)
    measure = Measure(*open_index(str(args.run / "curated")))
    if args.curve:
        curve(pipe, measure, repeated, clean, args)
    else:
        compare(pipe, measure, repeated, Localizer(pipe, clean, up_blocks=not args.down_mid_only), args)


if __name__ == "__main__":
    main()
