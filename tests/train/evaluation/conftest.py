"""A small training set, what it is compared with, and two models: one that copies it, one that draws other images."""

from __future__ import annotations

import numpy as np
import pytest

from curate.embed.edits import EDITS
from curate.embed.registry import load_embedder
from curate.index.training_index import TrainingIndex
from curate.reading.images import decode_image
from curate.sample_set import load_part
from train.evaluation.judging.drawn import Drawn
from train.evaluation.metrics.detector import Detector
from train.evaluation.metrics.dual_encoder import DualEncoderJudge
from train.evaluation.metrics.imagenet import ImageNetJudge
from train.evaluation.metrics.measuring import evaluate_images
from train.evaluation.metrics.pixels import Pixels
from train.evaluation.metrics.protocol import Reference


@pytest.fixture(scope="session")
def held_out():
    return load_part("held_out")


@pytest.fixture(scope="session")
def training():
    return load_part("finetune")[:250]


@pytest.fixture(scope="session")
def embedder():
    return load_embedder("layout")


@pytest.fixture(scope="session")
def index(training, embedder) -> TrainingIndex:
    n = len(training)
    return TrainingIndex.build(
        embeddings=embedder.embed([decode_image(sample.image) for sample in training]),
        captions=[sample.caption for sample in training],
        shards=[sample.shard for sample in training],
        keys=[sample.key for sample in training],
        kept=np.ones(n, bool),
        group=np.arange(n),
        embedder_name=embedder.name,
    )


@pytest.fixture(scope="session")
def reference(training, held_out, index, embedder) -> Reference:
    return Reference(
        training=[decode_image(sample.image) for sample in training],
        held_out=[decode_image(sample.image) for sample in held_out],
        captions=[sample.caption for sample in training + held_out],
        originals={sample.caption: [decode_image(sample.image)] for sample in training + held_out},
        index=index,
        embedder=embedder,
    )


@pytest.fixture(scope="session")
def metrics(reference) -> list:
    return [kind(reference) for kind in (Detector, DualEncoderJudge, ImageNetJudge, Pixels)]


@pytest.fixture(scope="session")
def results(training, held_out, metrics):
    """A model that copies its training images, re-encoded, and one that draws other images."""
    chosen, rng = training[:48:2], np.random.default_rng(0)
    captions = [sample.caption for sample in chosen for _ in range(2)]
    copies = [EDITS["jpeg"](decode_image(sample.image), rng) for sample in chosen for _ in range(2)]
    unseen = held_out[: len(captions)]
    others = [decode_image(sample.image) for sample in unseen]
    drawn = [
        Drawn("raw", "none", "repeated", copies, captions, 0.5),
        Drawn("curated", "none", "repeated", others, captions, 0.5),
        Drawn("raw", "none", "held_out", others, [sample.caption for sample in unseen], 0.5),
    ]
    return drawn, evaluate_images(drawn, metrics)
