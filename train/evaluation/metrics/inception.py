"""FID and KID on Inception features, from the TorchScript file that StyleGAN3, EDM and clean-fid take."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from afresh.errors import UserError, reason
from train.evaluation.config import Protocol
from train.evaluation.judging.distances import frechet, kernel_distance
from train.evaluation.judging.drawn import Drawn
from train.evaluation.judging.intervals import Values
from train.evaluation.metrics.protocol import Column, Reference

if TYPE_CHECKING:
    from PIL.Image import Image


BATCH = 32


class Inception:
    """Distances to the held-out images (Heusel et al., 2017; Bińkowski et al., 2018).

    Args:
        reference: ``weights`` names ``inception-2015-12-05.pt``; it resizes images itself, as in the papers.

    Raises:
        UserError: the file is no such program.
    """

    name = "inception"
    columns = (
        Column(
            "fid",
            "FID",
            "Fréchet distance to the held-out images on Inception features (comparable only between rows with equally "
            "many images of the same captions).",
            better=-1,
        ),
        Column("kid", "KID", "Kernel distance to the held-out images on Inception features, unbiased.", better=-1),
    )

    def __init__(self, reference: Reference):
        self.path = reference.weights[self.name]
        self.about = f"Inception: {self.path}"
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            self.network = torch.jit.load(str(Path(self.path).expanduser()), map_location=self.device).eval()
        except Exception as error:
            raise UserError(f"{self.path}: not a TorchScript file ({reason(error)})") from error
        self.held_out = self.features(reference.held_out)

    @staticmethod
    def lacking(protocol: Protocol) -> str:
        if not protocol.weights.get("inception"):
            return "weights: {inception: its TorchScript file}"
        return "" if protocol.held_out else "held_out: shards of real images"

    def measure(self, drawn: Drawn) -> dict[str, Values]:
        """Its columns."""
        features = self.features(drawn.images)
        return {"fid": frechet(features, self.held_out), "kid": kernel_distance(features, self.held_out)}

    @torch.inference_mode()
    def features(self, images: Sequence[Image]) -> NDArray[np.float32]:
        """Pool3 features, float32 ``[n, 2048]``; of images of one size together, at that size."""
        by_size: dict[tuple[int, int], list[int]] = defaultdict(list)
        for row, image in enumerate(images):
            by_size[image.size].append(row)
        found: list[NDArray[np.float32]] = [np.empty(0, np.float32)] * len(images)
        for rows in by_size.values():
            for start in range(0, len(rows), BATCH):
                some = rows[start : start + BATCH]
                pixels = np.stack([np.asarray(images[row].convert("RGB")) for row in some]).transpose(0, 3, 1, 2)
                try:
                    answer = self.network(torch.from_numpy(pixels.copy()).to(self.device), return_features=True)
                except Exception as error:
                    raise UserError(f"{self.path}: gives no features of images ({reason(error)})") from error
                for row, features in zip(some, answer.float().cpu().numpy(), strict=True):
                    found[row] = features
        return np.stack(found)
