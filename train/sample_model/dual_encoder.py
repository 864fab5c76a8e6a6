"""Recipe: train the evaluation's image–text dual encoder on the sample set.

    python -m train.sample_model.dual_encoder --config configs/sample_model/dual_encoder.yaml

Two terms over the same batch, two views of every image (one mildly, one strongly edited):

- image–text: symmetric contrastive loss between both views and one of the image's captions (Radford et al.,
  2021);
- copies: NT-Xent between the two views of an image (Chen et al., 2020), in a head of its own. Both views have
  the same flip: this set is full of arrows and hands whose mirror image is another sample.

Half of each batch are hard negatives of the other half: images that look like them without being the same, and
images of captions that share their rarer words, so that telling them apart is practised. At the end the copy head
becomes the whitening of the training images' features (Pizzi et al., 2022, whiten SSCD's in this way), in which
common traits count for less.

Pairs with equal captions, and images that look alike (16 × 16 pixels correlate above 0.95), are left out of
the negatives. A caption is drawn from the sample's text, its name alone, or its keywords and category, with
words dropped at random. It learns from what the sample model was pretrained on and from nothing else: every caption
in other drawings, and the carried drawings of the pretrain part alone. What a model copied from the fine-tuning part
it has therefore never seen, and real images of that part earn what real unseen images earn. Every draw is a function
of (seed, step), so an interrupted run goes on from its checkpoint as if it had not been.
"""

from __future__ import annotations

import json
import math
import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor

from afresh.files import write_json
from train.evaluation.judging.dual_encoder import DualEncoder, DualEncoderConfig, word_parts, words
from train.evaluation.judging.metrics import copy_threshold, pixel_correlation, retrieval_rank
from train.finetune.config import Augmentation
from train.finetune.data.augment import augment
from train.memorization.detection.roc import roc_auc
from train.sample_model.edits import strong_edits

TWINS = 0.95


@dataclass
class RecipeConfig:
    """Settings of the dual encoder's recipe.

    Args:
        out: folder for the weights, their config and ``metrics.json``.
        checkpoint: file to save to and to continue from.
        checkpoint_every: steps between two saves.
        renditions: shards of further drawings (see ``train.sample_model.renditions``), or empty.
        steps: optimizer steps.
        batch_size: captions a step; each comes with two views of its image.
        learning_rate: peak; warm-up over the first 5 %, then a cosine to zero.
        weight_decay: of AdamW, on matrices only.
        copy_weight: weight of the copy term.
        copy_temperature: temperature of the copy term.
        neighbours: nearest other images, by pixel correlation, and nearest other captions, by shared words, that a
            batch's second half is drawn from.
        word_dropout: share of words left out of a training caption.
        autocast: compute in bfloat16 where it is safe (pays on processors with AMX).
        seed: of weights and draws.
        model: sizes of the towers.
        mild: changes of the first view.
        strong: changes of the second view, beside blur, noise, a pasted patch, lost detail and lost colour.
    """

    out: str = "runs/sample_model/dual_encoder"
    checkpoint: str = "runs/sample_model/dual_encoder.pt"
    checkpoint_every: int = 200
    renditions: list[str] = field(default_factory=list)
    steps: int = 1000
    batch_size: int = 128
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    copy_weight: float = 1.0
    copy_temperature: float = 0.07
    neighbours: int = 12
    word_dropout: float = 0.15
    autocast: bool = True
    seed: int = 0
    model: DualEncoderConfig = field(default_factory=DualEncoderConfig)
    mild: Augmentation = field(
        default_factory=lambda: Augmentation(shift=0.08, scale=0.15, flip=0.5, colour=0.2, hue=0.03, rotate=5)
    )
    strong: Augmentation = field(
        default_factory=lambda: Augmentation(shift=0.15, scale=0.35, flip=0.5, colour=0.5, hue=0.08, rotate=12)
    )


def captions_of(sample: Any) -> list[str]:
    """The forms in which a sample's text may be drawn: the caption first."""
    meta = json.loads(sample.members.get("json", b"{}"))
    name, keywords = meta.get("name", ""), " ".join(meta.get("keywords", [])).replace("_", " ")
    kind = meta.get("subcategory", "").replace("-", " ")
    forms = [sample.caption, name, f"{keywords}, {kind}" if keywords else "", f"{name} {keywords}"]
    return list(dict.fromkeys(form for form in forms if form.strip(" ,")))


def draw_caption(forms: list[str], rng: random.Random, word_dropout: float, buckets: int) -> list[list[int]]:
    """One caption as words as table rows; sometimes without a word, sometimes with a word's n-grams only."""
    text = forms[0] if rng.random() < 0.5 else rng.choice(forms)
    found = words(text)
    kept = [word for word in found if rng.random() >= word_dropout] or found[:1]
    return [list(word_parts(w, buckets)[1:] if rng.random() < 0.3 else word_parts(w, buckets)) for w in kept]


def contrast(logits: Tensor, same: Tensor) -> Tensor:
    """Cross-entropy of the diagonal, both ways; pairs in ``same`` off the diagonal are not negatives."""
    logits = logits.masked_fill(same & ~torch.eye(len(logits), dtype=torch.bool), -math.inf)
    target = torch.arange(len(logits))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def copy_contrast(a: Tensor, b: Tensor, same: Tensor, temperature: float) -> Tensor:
    """NT-Xent over the 2n unit rows of two views: each must find its other view among all."""
    n, rows = len(a), torch.cat([a, b])
    partner = torch.arange(2 * n).roll(n)
    off = same.repeat(2, 2)
    off[torch.arange(2 * n), partner] = False
    return F.cross_entropy((rows @ rows.T / temperature).masked_fill(off, -math.inf), partner)


def whitening(features: np.ndarray, ridge: float = 0.01) -> dict[str, Tensor]:
    """Weights of the linear layer that gives features mean zero and (nearly) unit covariance.

    Args:
        features: ``[n, d]``.
        ridge: added to the variances, in units of their mean, so that directions of noise are not blown up.
    """
    variance, axes = np.linalg.eigh(np.cov(features, rowvar=False))
    variance = np.clip(variance, 0, None)
    weight = axes.T / np.sqrt(variance + ridge * variance.mean())[:, None]
    state = {"weight": weight, "bias": -weight @ features.mean(axis=0)}
    return {name: torch.from_numpy(value).float() for name, value in state.items()}


@dataclass
class TrainingSet:
    """The captions, the images that show them, and which of these are hard to tell apart.

    Args:
        forms: of each caption, the texts that it may be drawn as.
        drawings: of each caption, the rows of ``images`` that show it.
        images: the drawings.
        pixels: ``[n_images, 3, 64, 64]`` of them, in [0, 1].
        shows: ``[n_images]`` int64: the caption that each image shows.
        caption: ``[n_captions]`` int: equal where captions are.
        twins: ``[n_images, n_images]`` bool: looks the same.
        near_images: ``[n_images, neighbours]`` int64: the images most like each, of other captions and no twins.
        near_captions: ``[n_captions, neighbours]`` int64: the captions that share most with each.
    """

    forms: list[list[str]]
    drawings: list[list[int]]
    images: list[Image]
    pixels: Tensor
    shows: Tensor
    caption: Tensor
    twins: Tensor
    near_images: Tensor
    near_captions: Tensor


def training_set(config: RecipeConfig) -> TrainingSet:
    """Read the pretrain part, and the renditions of every caption."""
    from curate.reading.images import decode_image, stack_images
    from curate.reading.pipeline import ReadShards, Skipped, shard_list
    from curate.sample_set import PARTS, load_part

    described = {sample.key: captions_of(sample) for part in PARTS for sample in load_part(part)}
    shown = load_part("pretrain")
    shown += ReadShards(Skipped())(shard_list(config.renditions)) if config.renditions else []
    rows: dict[str, list[int]] = {}
    for row, sample in enumerate(shown):
        rows.setdefault(sample.key, []).append(row)
    keys = list(rows)
    forms = [described[key] for key in keys]
    images = [decode_image(sample.image) for sample in shown]
    pixels = torch.from_numpy(stack_images(images, 64))
    index = {key: i for i, key in enumerate(keys)}
    shows = torch.tensor([index[sample.key] for sample in shown])
    caption = torch.from_numpy(np.unique([form[0] for form in forms], return_inverse=True)[1])
    alike = torch.from_numpy(pixel_correlation(pixels, pixels))
    twins = alike > TWINS
    same = caption[shows][:, None] == caption[shows][None, :]
    near_images = alike.masked_fill_(twins | same, -1).topk(min(config.neighbours, len(images)), dim=1).indices
    return TrainingSet(
        forms=forms,
        drawings=[rows[key] for key in keys],
        images=images,
        pixels=pixels,
        shows=shows,
        caption=caption,
        twins=twins,
        near_images=near_images,
        near_captions=shared_words([form[0] for form in forms], caption, config.neighbours),
    )


def shared_words(captions: list[str], caption: Tensor, neighbours: int) -> Tensor:
    """The captions that share most with each: cosine of bags of words, rare words counting more.

    Args:
        captions: texts.
        caption: ``[n]`` int: equal where captions are; those are no neighbours.
        neighbours: how many.

    Returns:
        ``[n, neighbours]`` int64.
    """
    vocabulary = {word: i for i, word in enumerate(sorted({word for text in captions for word in words(text)}))}
    bags = torch.zeros(len(captions), len(vocabulary))
    for row, text in enumerate(captions):
        bags[row, [vocabulary[word] for word in words(text)]] = 1
    bags = F.normalize(bags * (len(captions) / bags.sum(0)).log1p(), dim=1)
    shared = (bags @ bags.T).masked_fill(caption[:, None] == caption[None, :], -1)
    return shared.topk(min(neighbours, len(captions)), dim=1).indices


@dataclass
class Batch:
    """Two views of some images and a caption of each, with the pairs that are no negatives of one another."""

    mild: Tensor
    strong: Tensor
    texts: list[list[list[int]]]
    same_image: Tensor
    same_pair: Tensor


def draw_batch(data: TrainingSet, config: RecipeConfig, step: int) -> Batch:
    """The batch of a step, a function of (seed, step); seeds the dropout too."""
    rng = random.Random(f"{config.seed}/{step}")
    generator = torch.Generator().manual_seed(rng.getrandbits(63))
    torch.manual_seed(rng.getrandbits(63))  # dropout
    anchors = rng.sample(range(len(data.forms)), min(config.batch_size, len(data.forms)) // 2)
    row_of = {i: rng.choice(data.drawings[i]) for i in anchors}
    for anchor in anchors:  # beside each, one that looks like it or one whose caption reads like its own
        if rng.random() < 0.5:
            row = int(data.near_images[row_of[anchor], rng.randrange(data.near_images.shape[1])])
        else:
            other = int(data.near_captions[anchor, rng.randrange(data.near_captions.shape[1])])
            row = rng.choice(data.drawings[other])
        row_of.setdefault(int(data.shows[row]), row)
    chosen = list(row_of)
    rows = torch.tensor([row_of[i] for i in chosen])
    x = data.pixels[rows]
    draws = torch.rand(2, len(chosen), 9, generator=generator)
    draws[1, :, 1] = draws[0, :, 1]  # the number that decides the flip
    mild, strong = augment(x, draws[0], config.mild), augment(x, draws[1], config.strong)
    strong = strong_edits(strong, generator)
    texts = [draw_caption(data.forms[i], rng, config.word_dropout, config.model.buckets) for i in chosen]
    same_image = data.twins[rows][:, rows]
    same_caption = data.caption[chosen][:, None] == data.caption[chosen][None, :]
    return Batch(mild, strong, texts, same_image, same_image | same_caption)


def new_model(config: RecipeConfig) -> tuple[DualEncoder, torch.optim.Optimizer]:
    """The network with its first weights, and its optimizer."""
    torch.manual_seed(config.seed)
    model = DualEncoder(config.model)
    model.stem.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # a fifth faster
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=config.learning_rate,
        betas=(0.9, 0.98),
    )
    return model, optimizer


def losses(model: DualEncoder, batch: Batch, config: RecipeConfig) -> tuple[Tensor, Tensor, Tensor]:
    """The image–text term, the copy term, and the scale of the image–text logits."""
    views = torch.cat([batch.mild, batch.strong]).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16, enabled=config.autocast):
        image, copy, text = model(views, batch.texts)
    scale = model.log_scale.exp().clamp(max=50)
    text_losses = [contrast(scale * view @ text.T, batch.same_pair) for view in image.chunk(2)]
    copy_mild, copy_strong = copy.chunk(2)
    copy_loss = copy_contrast(copy_mild, copy_strong, batch.same_image, config.copy_temperature)
    return torch.stack(text_losses).mean(), copy_loss, scale


def train_dual_encoder(config: RecipeConfig) -> dict[str, Any]:
    """Train, measure, save; returns what ``metrics.json`` holds."""
    data = training_set(config)
    model, optimizer = new_model(config)
    first, checkpoint = 0, Path(config.checkpoint)
    if checkpoint.is_file():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    size = sum(p.numel() for p in model.parameters()) / 1e6
    print(
        f"{len(data.forms)} captions, {len(data.images)} images, {size:.2f} M parameters, from step {first}",
        flush=True,
    )

    start, sums = time.time(), np.zeros(3)
    for step in range(first, config.steps):
        warm = min(1.0, (step + 1) / (0.05 * config.steps))
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * step / config.steps))
        batch = draw_batch(data, config, step)
        model.train()
        text_loss, copy_loss, scale = losses(model, batch, config)
        loss = text_loss + config.copy_weight * copy_loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

        sums += [text_loss.item(), copy_loss.item(), 1]
        done = step + 1
        if done % 50 == 0 or done == config.steps:
            seconds = time.time() - start
            print(
                f"step {done}/{config.steps} image-text {sums[0] / sums[2]:.3f} "
                f"copies {sums[1] / sums[2]:.3f} scale {scale.item():.1f} "
                f"{2 * len(batch.texts) * (done - first) / seconds:.0f} images/s {seconds:.0f} s",
                flush=True,
            )
            sums[:] = 0
        if done % config.checkpoint_every == 0 and done < config.steps:
            checkpoint.parent.mkdir(parents=True, exist_ok=True)
            aside = checkpoint.with_suffix(".partial")
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": done}, aside)
            aside.replace(checkpoint)
    return save_and_measure(model, data, config)


def save_and_measure(model: DualEncoder, data: TrainingSet, config: RecipeConfig) -> dict[str, Any]:
    """Whiten the copy head, write weights and ``metrics.json``, and let go of the checkpoint."""
    features = model.image_features(data.images)
    model.copy_head.load_state_dict(whitening(features))
    model.save(config.out)
    metrics = measure(DualEncoder.load(config.out))
    metrics |= {
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": config.steps,
        "training_captions": len(data.forms),
        "training_images": len(data.images),
    }
    write_json(Path(config.out) / "metrics.json", metrics)
    Path(config.checkpoint).unlink(missing_ok=True)
    print(json.dumps(metrics, indent=1), flush=True)
    return metrics


def measure(model: DualEncoder) -> dict[str, Any]:
    """Retrieval on each part's captions, and how well copies stand apart from near neighbours.

    The images of the fine-tuning and held-out parts are new to the network, their captions are not: ``alignment``
    there is what a real, unseen image of a known caption earns. ``copies`` edits the held-out images and asks whether
    the edited image is nearer to its original than the copy threshold, itself the 99 % quantile of the held-out
    images' similarity to the nearest image of the other parts.
    """
    from curate.embed.edits import EDITS
    from curate.reading.images import decode_image
    from curate.sample_set import PARTS, load_part

    result: dict[str, Any] = {}
    copy_space: dict[str, np.ndarray] = {}
    samples = {name: load_part(name) for name in PARTS}
    images = {name: [decode_image(s.image) for s in part] for name, part in samples.items()}
    for name, part in samples.items():
        features = model.image_features(images[name])
        copy_space[name] = model.copy_from_features(features)
        texts = [s.caption or "" for s in part]
        joint, text = model.joint_from_features(features), model.embed_texts(texts)
        unique, row = np.unique(texts, return_inverse=True)
        candidates = model.embed_texts([str(u) for u in unique])
        rank = retrieval_rank(joint, candidates, row)
        result[f"retrieval_{name}"] = {
            "candidates": len(unique),
            "median_rank": float(np.median(rank)),
            "recall_at_1": float(np.mean(rank <= 1)),
            "recall_at_10": float(np.mean(rank <= 10)),
            "alignment": float(np.mean((joint * text).sum(axis=1))),
        }
    others = np.concatenate([copy_space[name] for name in PARTS if name != "held_out"])
    nearest = (copy_space["held_out"] @ others.T).max(axis=1)
    threshold = copy_threshold(nearest)
    result["nearest_training_similarity_of_held_out"] = {
        f"q{q}": float(np.quantile(nearest, q / 100)) for q in (5, 50, 95, 99)
    }
    result["copy_threshold"] = threshold
    result["copies"] = {}
    for edit, apply in EDITS.items():
        rng = np.random.default_rng(0)
        edited = model.copy_features([apply(image, rng) for image in images["held_out"]])
        similarity = (edited * copy_space["held_out"]).sum(axis=1)
        result["copies"][edit] = {
            "above_threshold": float(np.mean(similarity > threshold)),
            "median_similarity": float(np.median(similarity)),
            "auc_against_nearest": roc_auc(
                np.concatenate([similarity, nearest]), np.repeat([1, 0], [len(similarity), len(nearest)])
            ),
        }
    return result


if __name__ == "__main__":
    from jsonargparse import auto_cli

    train_dual_encoder(auto_cli(RecipeConfig, as_positional=False))

