"""Do the neurons behind a memorized prompt become few and clean as the UNet becomes wider?

    python -m benchmarks.neuron_width --run runs/quickstart --out runs/neuron_width         widths 1 to 3: 90 minutes
    python -m benchmarks.neuron_width --run runs/quickstart --out runs/neuron_width --widths 2

Each width is the carried sample model with every channel of its UNet ``width`` times, fine-tuned on the quickstart's
raw set, where 24 images are repeated 40 times. Widening keeps the function: a channel's copies compute the same at
first, but what reads them divides its weight among them at random, so that each copy gets a gradient of its own and
they part in training (after Chen, Goodfellow, Shlens, "Net2Net", ICLR 2016, who divide evenly and add noise). All
widths have the same data, order, noise and steps; the learning rate is divided by the width.

Then the repeated captions are drawn with the first n neurons of each prompt blocked, by several orders, and held-out
captions that draw no copy with the neurons of a repeated one: which share is still memorized, and what alignment that
costs others, and how like their images stay to what they were. Neurons are clean where a tenth of the copies is left,
nine tenths with as many at random, and others keep their alignment. A finished width is neither trained nor measured
again; the table and the figure (``width.png``) are of all that are there.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from afresh.files import write_json
from afresh.progress import get_logger
from benchmarks.localize import Measure, draw, slopes
from benchmarks.quickstart_set import read_settings
from train.denoising.opening.loading import load_pipeline, sample_model_dir
from train.evaluation.judging.metrics import memorized_share
from train.finetune.config import FilterConfig, FinetuneConfig
from train.finetune.loop import run_finetune
from train.memorization.config import MEMORIZED
from train.memorization.neurons.localization import Localizer
from train.memorization.neurons.selectivity import per_cost
from train.memorization.neurons.value_neurons import Mask, activations, value_layers
from train.prompts import read_prompts
from train.sampling.pipelines.session import open_index

log = get_logger(__name__)
SHARES = (0.1, 0.15, 0.2, 0.3, 0.5)
"""Of the neurons, blocked; of those in the down and mid blocks all of them too."""
STEPS, SCALE, SEEDS = 10, 5.0, (100, 101)
"""Of the images; of others the first seed alone."""
OTHERS = 64
"""Held-out captions that are drawn, at most."""
SPREAD = 0.5
"""Standard deviation of a copy's share of an outgoing weight, in standard deviations of the layer's weights."""


# ------------------------------------------------------------------------------------------------------ widening


def widened(unet: nn.Module, width: int) -> nn.Module:
    """A ``UNet2DConditionModel`` with ``width`` times the channels of each layer and the same output.

    Copies of a channel lie side by side, so groups of normalisation and heads of attention hold the copies of what they
    held. Heads become wider, not more.

    Args:
        unet: the narrow one, with convolutions in its transformers or without; it is not changed.
        width: 1 or more.
    """
    from diffusers import UNet2DConditionModel

    config = dict(unet.config)
    config["block_out_channels"] = [width * channels for channels in config["block_out_channels"]]
    wide = UNet2DConditionModel.from_config(config)
    generator = torch.Generator().manual_seed(0)
    state, weights = unet.state_dict(), {}
    for name, target in wide.state_dict().items():
        weight = state[name]
        if name == "time_embedding.linear_1.weight":
            # Its input is no channel but the timestep's sines and cosines: every width-th frequency is an old one.
            spread = weight.new_zeros(target.shape[0] // width, target.shape[1])
            spread[:, ::width] = weight
            weight = spread
        elif weight.dim() > 1 and target.shape[1] != weight.shape[1]:
            weight = divided(weight, width, generator)
        if target.shape[0] != weight.shape[0]:
            weight = weight.repeat_interleave(width, dim=0)
        if name.endswith("to_q.weight"):
            weight = weight / width**0.5  # a product of width times the terms, divided by the root of their number
        weights[name] = weight
    wide.load_state_dict(weights)
    return wide


def divided(weight: Tensor, width: int, generator: torch.Generator) -> Tensor:
    """``[out, in, …] → [out, width · in, …]``: of each input's copies random parts that add up to its weight."""
    parts = torch.randn(width, *weight.shape, generator=generator).to(weight) * SPREAD * weight.std()
    parts = parts - parts.mean(0) + weight / width
    return parts.movedim(0, 2).flatten(1, 2)


def train(out: Path, run: Path, width: int) -> Path:
    """The fine-tuned pipeline's folder; that of width 1 is the quickstart's own."""
    if width == 1:
        return run / "finetune_raw" / "model"
    folder = out / f"width-{width}"
    if not (folder / "untrained" / "model_index.json").is_file():
        pipe = load_pipeline(str(sample_model_dir()))
        pipe.unet = widened(pipe.unet, width)
        pipe.save_pretrained(folder / "untrained")
    settings = {key: value for key, value in read_settings()["finetune"].items() if key != "filter"}
    settings["filter"] = FilterConfig("off")
    settings["learning_rate"] = float(settings["learning_rate"]) / width
    log.info("width %d", width)
    summary = run_finetune(
        FinetuneConfig(
            model=str(folder / "untrained"), shards=[str(run / "raw")], out=str(folder / "finetune"), **settings
        )
    )
    if summary.get("stopped"):
        raise SystemExit("stopped; the same command goes on from there")
    return folder / "finetune" / "model"


# ----------------------------------------------------------------------------------------------------- measurement


def copies_cosine(unet: nn.Module, width: int) -> float | None:
    """Mean cosine of the weights of two copies of a value neuron: 1 before training, less as they part."""
    if width == 1:
        return None
    cosines = []
    for layer in value_layers(unet, up_blocks=True).values():
        rows = layer.weight.detach().float().unflatten(0, (-1, width))  # type: ignore[operator,union-attr]
        rows = nn.functional.normalize(rows, dim=-1)
        cosines.append((rows @ rows.transpose(1, 2))[:, *np.triu_indices(width, 1)].mean())
    return float(torch.stack(cosines).mean())


class Blocked:
    """A quickstart's raw model with neurons blocked: the copies that are left, and what other captions lose.

    Args:
        pipe: the raw model.
        run: the quickstart's folder.
        captions: repeated captions, at most.
    """

    def __init__(self, pipe: Any, run: Path, captions: int = 1000) -> None:
        prompts = read_prompts(run / "prompts" / "detect.jsonl")
        self.pipe = pipe
        self.repeated = [prompt.caption for prompt in prompts if prompt.label == 1][:captions]
        held_out = [prompt.caption for prompt in prompts if prompt.label == 0]
        self.judge = Measure(*open_index(str(run / "curated")))
        # what selectivity goes by is not measured below
        self.localizer = Localizer(pipe, held_out[1::2], up_blocks=True)
        held_out = held_out[::2]
        similarity = self.judge.similarity(self._images(held_out, None))
        near = zip(held_out, similarity, strict=True)
        self.clean = [caption for caption, similar in near if similar <= MEMORIZED][:OTHERS]
        self.unblocked, self._before = self._of_others(None)

    def memorized(self, masks: Mask | None) -> float:
        """Share of the repeated captions' images that are copies; ``masks [captions, units]`` are blocked."""
        images = draw(self.pipe, self.localizer, self.repeated, masks, STEPS, SCALE, SEEDS)
        return memorized_share(self.judge.similarity(images))

    def point(self, masks: Mask) -> dict[str, Any]:
        """Of the tables: with ``masks [captions, units]`` blocked."""
        alignments, after = self._of_others(masks)
        change, mean = alignments - self.unblocked, self.unblocked.mean()
        return {
            "blocked": int(masks[0].sum()),
            "memorized": self.memorized(masks),
            "alignment_change": float(change.mean() / mean),
            "standard_error": float(change.std() / len(change) ** 0.5 / mean),
            "similarity_to_unblocked": float(self.judge.index.calibrate((after * self._before).sum(1)).mean()),
        }

    def _images(self, captions: Sequence[str], masks: Mask | None) -> Any:
        return draw(self.pipe, self.localizer, captions, masks, STEPS, SCALE, SEEDS[:1])

    def _of_others(self, masks: Mask | None) -> tuple[Any, Any]:
        """Their alignment, and their embeddings."""
        own = None if masks is None else masks[np.arange(len(self.clean)) % len(masks)]
        drawn = self._images(self.clean, own)
        return self.judge.alignments(drawn, self.clean), self.judge.embedder.embed(drawn)


def first(scores: Any, number: float) -> Mask:
    """The first of ``scores [captions, units]``, the highest before the others: ``[captions, units]``."""
    return np.argsort(np.argsort(-scores, axis=1), axis=1) < number


def measure(pipe: Any, run: Path, width: int) -> dict[str, Any]:
    """Copies left of the repeated captions and alignment left of others, by order and number of blocked neurons."""
    model = Blocked(pipe, run)
    localizer = model.localizer
    inner = ~np.concatenate([np.full(size, "up_blocks" in name) for name, size in localizer.sizes.items()])
    z = localizer.statistics.z(activations(pipe, model.repeated, localizer.layers))
    gradient = np.stack([slopes(localizer, caption) for caption in model.repeated])
    every = np.ones_like(inner)
    orders = {
        "z-score of activations": (z, every),
        "gradient of the magnitude": (gradient, every),
        "gradient over cost": (per_cost(gradient, localizer.sensitivity), every),
        "gradient, down and mid": (gradient, inner),
        "random": (np.random.default_rng(0).random(z.shape), every),
    }
    result: dict[str, Any] = {
        "width": width,
        "parameters": sum(parameter.numel() for parameter in pipe.unet.parameters()),
        "neurons": len(inner),
        "neurons_down_mid": int(inner.sum()),
        "copies_cosine": copies_cosine(pipe.unet, width),
        "memorized": model.memorized(None),
        "alignment": float(model.unblocked.mean()),
        "others": len(model.clean),
        "orders": {},
    }
    for name, (scores, which) in orders.items():
        points = result["orders"][name] = []
        for share in (*SHARES, 1.0) if which is inner else SHARES:
            points.append(model.point(first(np.where(which, scores, -np.inf), share * which.sum())))
            log.info("width %d, %s: %s", width, name, points[-1])
    return result


def as_markdown(results: Sequence[dict[str, Any]]) -> str:
    """A row for each width, order and number of blocked neurons."""
    heads = ["width", "parameters", "neurons", "order", "blocked", "memorized", "others: alignment", "like unblocked"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for result in results:
        head = f"| {result['width']} | {result['parameters'] / 1e6:.1f} M | {result['neurons']} |"
        lines.append(f"{head} nothing | 0 | {result['memorized']:.2f} | {result['alignment']:.3f} | 1 |")
        for name, points in result["orders"].items():
            for point in points:
                change = f"{point['alignment_change']:+.0%} ± {point['standard_error']:.0%}"
                left = f"{point['memorized']:.2f} | {change} | {point['similarity_to_unblocked']:.2f}"
                lines.append(f"{head} {name} | {point['blocked']} | {left} |")
    return "\n".join(lines)


def draw_figure(results: Sequence[dict[str, Any]], path: Path) -> None:
    """A column for each width: copies left above, others' alignment below, against the share of blocked neurons."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(results), 4.8), layout="constrained", dpi=130)
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(results), sharex=True, sharey="row", squeeze=False)
    colours = ("#4c78a8", "#d1495b", "#2a9d5c", "#e9a13b", "#999")
    for (above, below), result in zip(axes.T, results, strict=True):
        for (name, points), colour in zip(result["orders"].items(), colours, strict=True):
            x = [0, *(point["blocked"] / result["neurons"] for point in points)]
            style = {"color": colour, "marker": "o", "markersize": 3, "label": name}
            above.plot(x, [result["memorized"], *(point["memorized"] for point in points)], **style)
            below.plot(x, [0, *(point["alignment_change"] for point in points)], **style)
        above.axhline(0.1 * result["memorized"], color="#bbb", linewidth=0.8, linestyle="--")
        below.axhline(-0.02, color="#bbb", linewidth=0.8, linestyle="--")
        above.set_title(f"width {result['width']}: {result['neurons']} neurons", fontsize=10)
        below.set(xlabel="share of neurons blocked, a prompt", xlim=(-0.01, 0.52), ylim=(-0.4, 0.1))
        for axis in (above, below):
            axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set(ylabel="memorized share of images", ylim=(-0.02, 1))
    axes[1, 0].set_ylabel("change of others' alignment")
    axes[1, 0].legend(frameon=False, fontsize=7)
    figure.savefig(path, metadata={"Software": None})


def main() -> None:
    """Read the command line, do what is left to do, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder of train quickstart")
    parser.add_argument("--out", type=Path, required=True, help="folder of the widths' models, figures and measures")
    parser.add_argument("--widths", type=int, nargs="+", default=[1, 2, 3])
    args = parser.parse_args()
    for width in args.widths:
        record = args.out / f"width-{width}.json"
        if not record.is_file():
            pipe = load_pipeline(str(train(args.out, args.run, width)))
            pipe.unet.requires_grad_(False)
            write_json(record, measure(pipe, args.run, width))
    results = [json.loads(path.read_text()) for path in args.out.glob("width-*.json")]
    results.sort(key=lambda result: result["width"])
    draw_figure(results, args.out / "width.png")
    print(as_markdown(results))
    for result in results:
        if result["copies_cosine"] is not None:
            print(f"width {result['width']}: copies of a value neuron have a cosine of {result['copies_cosine']:.3f}")


if __name__ == "__main__":
    main()
