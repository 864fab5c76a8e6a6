"""A judge of copies: an image is one if it is nearer to a training image than images that are no copies are."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from curate.neighbors.brute_force import nearest
from train.evaluation.config import Protocol
from train.evaluation.judging.metrics import copy_threshold
from train.prompts import read_prompts

Floats = NDArray[np.float32]
QUANTILE = 0.99


class Copies:
    """Nearest training images in one feature space, and the threshold above which an image is a copy.

    Args:
        training: ``[m, d]`` unit rows of the training images.
        held_out: ``[k, d]`` of images known to be no copies.
        quantile: of their nearest-neighbour similarities, above which an image is a copy.
    """

    def __init__(self, training: Floats, held_out: Floats, quantile: float = QUANTILE):
        self.training = training
        self.held_out_nearest, _ = self.nearest(held_out)
        self.threshold = copy_threshold(self.held_out_nearest, quantile)

    def nearest(self, features: Floats) -> tuple[Floats, NDArray[np.int64]]:
        """Similarity to the nearest training image, and which one: ``[n]`` each."""
        similarity, row = nearest(features, [(0, self.training)])
        return similarity[:, 0], row[:, 0]


def lacks_images(protocol: Protocol, *, held_out: bool) -> str:
    """What a judge of copies misses in a protocol whose files are there; originals stand for training images."""
    if not (protocol.training or protocol.originals or _any_original(protocol)):
        return "training: shards, or prompts that name originals"
    return "held_out: shards of images that are no copies" if held_out and not protocol.held_out else ""


def _any_original(protocol: Protocol) -> bool:
    return any(prompt.image is not None for file in protocol.prompts.values() for prompt in read_prompts(file))
