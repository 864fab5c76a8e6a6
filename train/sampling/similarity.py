"""What AMG measures: how near a predicted image is to its nearest training image.

Chen, Liu, Xu, "Towards Memorization-Free Diffusion Models" (CVPR 2024), section 4.1 measures it on two levels: of
objects, by the cosine of a copy-detection embedding (:class:`ObjectLevel`), and of pixels, by the normalised L2
distance (:class:`PixelIndex`), which suits small images in pixel space.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from afresh.errors import UsageError, UserError
from curate.index.training_index import refuse_other
from curate.reading.captions import normalise_caption
from train.memorization.config import MEMORIZED

if TYPE_CHECKING:
    from curate.embed.protocol import Embedder
    from curate.index.training_index import TrainingIndex


class Nearest(NamedTuple):
    """The nearest training images of ``n`` images, nearest first."""

    sigma: Tensor
    """``[n, k]`` float32: similarity, on the scale of the schedule ``λ_t``."""
    raw: Tensor
    """``[n, k]``: what was measured (see :attr:`Similarity.raw_name`)."""
    rows: Tensor
    """``[n, k]`` int64: which ones."""


class Similarity(Protocol):
    """How AMG measures."""

    raw_name: str
    """The trace's name for the measure: cosine or distance."""
    memorized: float
    """The similarity above which the literature counts an image as a copy."""

    @property
    def captions(self) -> Sequence[str | None]:
        """Of each training image."""
        ...

    @property
    def counts(self) -> Any:
        """``[m]``: how often each caption occurs in the training set."""
        ...

    def nearest(self, pixels: Tensor, k: int) -> Nearest:
        """Of images ``[n, 3, H, W]`` in [0, 1]."""
        ...

    def against(self, pixels: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``σ [n]``, differentiable, to the training images ``rows [n]``, or to the nearest; and which these are."""
        ...


class ObjectLevel:
    """Calibrated cosine of an embedding: ``σ = E(x̂_0)·E(n_0)``.

    Args:
        index: the training set, as curation left it.
        embedder: the image embedder that the index was built with.

    Raises:
        UserError: the index is empty or was built with another embedder.
        UsageError: the embedder cannot be differentiated.
    """

    raw_name, memorized = "cosine", MEMORIZED

    def __init__(self, index: TrainingIndex, embedder: Embedder) -> None:
        refuse_other(index, embedder)
        check_not_empty(index)
        if not hasattr(embedder, "features"):
            raise UsageError(
                f"the embedder {embedder.name!r} has no features(), by which guidance follows an image: see "
                "curate.embed.protocol.Embedder"
            )
        self.index, self.embedder = index, embedder
        self.captions, self.counts = index.captions, index.counts

    def nearest(self, pixels: Tensor, k: int) -> Nearest:
        """See :class:`Similarity`."""
        cosine, rows = self._search(self.embedder.features(pixels), k)
        return Nearest(self.index.calibrate(cosine), cosine, rows)

    def against(self, pixels: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See :class:`Similarity`."""
        features = self.embedder.features(pixels)
        if rows is None:
            rows = self._search(features, 1)[1][:, 0]
        target = torch.as_tensor(self.index.vectors(rows.cpu().numpy())).to(features)
        return self.index.calibrate((features * target).sum(1)), rows

    def _search(self, features: Tensor, k: int) -> tuple[Tensor, Tensor]:
        self.index.hold(features.device)
        similarity, rows = self.index.search(features.detach(), min(k, len(self.captions)))
        cosine = torch.as_tensor(similarity, dtype=torch.float32, device=features.device)
        return cosine, torch.as_tensor(rows, device=features.device)


View = tuple["TrainingIndex", "Embedder"]
"""An index of a training set's images, and the embedder that it was built with."""


class Views:
    """The highest of several similarities: an image is as near as the view that finds it nearest.

    Args:
        views: by name, each on the scale of the schedule. Rows are those of the first, then those of the second, ….
    """

    SOFT = 0.05
    """How far below the highest a similarity has e times less weight in the gradient."""

    def __init__(self, views: Mapping[str, Similarity]) -> None:
        self.views = dict(views)
        first = next(iter(self.views.values()))
        self.raw_name, self.memorized = first.raw_name, first.memorized
        self.captions: Sequence[str | None] = [c for view in self.views.values() for c in view.captions]
        self.counts = np.concatenate([np.asarray(view.counts) for view in self.views.values()])
        sizes = [len(view.captions) for view in self.views.values()]
        self._starts = [sum(sizes[:i]) for i in range(len(sizes))]

    def of(self, rows: Tensor) -> tuple[list[str], Tensor]:
        """The view that each row is of, by name, and its number there."""
        names, starts = list(self.views), torch.tensor(self._starts, device=rows.device)
        view = torch.bucketize(rows.contiguous(), starts[1:], right=True)
        return [names[i] for i in view.tolist()], rows - starts[view]

    def nearest(self, pixels: Tensor, k: int) -> Nearest:
        """See :class:`Similarity`; a training image that several views find near stands once for each."""
        found = [view.nearest(pixels, k) for view in self.views.values()]
        rows = torch.cat([near.rows + start for near, start in zip(found, self._starts, strict=True)], 1)
        sigma, order = torch.cat([near.sigma for near in found], 1).sort(dim=1, descending=True, stable=True)
        order, k = order[:, :k], min(k, order.shape[1])
        return Nearest(sigma[:, :k], torch.cat([near.raw for near in found], 1).gather(1, order), rows.gather(1, order))

    def against(self, pixels: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See :class:`Similarity`: the highest, with the gradient of all that are about as high, by their weight."""
        each = []
        near = torch.zeros(len(pixels), dtype=torch.int64, device=pixels.device)
        best = torch.full((len(pixels),), -torch.inf, device=pixels.device)
        for view, start in zip(self.views.values(), self._starts, strict=True):
            sigma, found = view.against(pixels)
            near = torch.where(sigma.detach() > best, found + start, near)
            best = torch.maximum(best, sigma.detach())
            each.append(sigma)
        sigma = torch.stack(each)
        weighed = (sigma * (sigma.detach() / self.SOFT).softmax(0)).sum(0)
        return best + weighed - weighed.detach(), near


def object_level(index: TrainingIndex, embedder: Embedder, views: Sequence[View] = ()) -> Similarity:
    """How AMG measures with an index, or with it and its views.

    Raises:
        UserError, UsageError: see :class:`ObjectLevel`.
    """
    own = ObjectLevel(index, embedder)
    if not views:
        return own
    return Views({embedder.name: own, **{other.name: ObjectLevel(view, other) for view, other in views}})


class PixelIndex:
    """Training images in memory, compared by their pixels: minus the normalised L2 distance,

        σ = − ℓ2(x̂_0, n_0) / (α · mean of ℓ2(x̂_0, z) over the k nearest z).

    An image counts as memorized where ``−σ < 1.4``. The paper's ``α = 0.5`` puts CIFAR's other images near 2. In a
    narrow set, images that are no copies lie nearer than that to training images: see :meth:`calibrated`.

    Args:
        images: ``[m, 3, H, W]`` float in [0, 1], each image once: copies among the ``k`` nearest would normalise the
            distance to the image by itself, and a memorized image would look like any other.
        captions: of each, or the names of their classes.
        k: nearest images that normalise.
        alpha: ``α``.

    Raises:
        UserError: there are fewer than two images.
    """

    raw_name, memorized = "distance", -1.4

    def __init__(
        self, images: Tensor, captions: Sequence[str | None] | None = None, k: int = 50, alpha: float = 0.5
    ) -> None:
        if len(images) < 2:
            raise UserError(f"an index of pixels needs two images or more, not {len(images)}")
        self.shape, self.k, self.alpha = tuple(images.shape[1:]), min(k, len(images)), alpha
        self.images = images.float().flatten(1)
        self.captions = [None] * len(images) if captions is None else list(captions)
        times = Counter(normalise_caption(caption or "") for caption in self.captions)
        self.counts = np.array([times[normalise_caption(caption or "")] for caption in self.captions])

    def nearest(self, pixels: Tensor, k: int) -> Nearest:
        """See :class:`Similarity`."""
        near, rows = self._distances(pixels).topk(min(max(k, self.k), len(self.images)), largest=False)
        sigma = -near / (self.alpha * near[:, : self.k].mean(1, keepdim=True))
        k = min(k, len(self.images))
        return Nearest(sigma[:, :k], near[:, :k], rows[:, :k])

    def against(self, pixels: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See :class:`Similarity`. The gradient runs through the distance and through what normalises it."""
        near, found = self._distances(pixels).topk(self.k, largest=False)
        if rows is None:
            rows, distance = found[:, 0], near[:, 0]
        else:
            distance = torch.linalg.vector_norm(pixels.flatten(1) - self.images[rows], dim=1)
        return -distance / (self.alpha * near.mean(1)), rows

    def calibrated(self, others: Tensor, share: float = 0.01) -> PixelIndex:
        """The same index with the ``α`` at which ``share`` of other images lie within 1.4 of a training image.

        Args:
            others: ``[n, 3, H, W]`` in [0, 1], known to be no copies of training images.
            share: of them.
        """
        ratios = torch.cat([-self.nearest(some, 1).sigma[:, 0] * self.alpha for some in others.split(64)])
        alpha = max(float(ratios.quantile(share)) / -self.memorized, 1e-6)
        return PixelIndex(self.images.unflatten(1, self.shape), self.captions, self.k, alpha)

    def _distances(self, pixels: Tensor) -> Tensor:
        if tuple(pixels.shape[1:]) != self.shape:
            raise ValueError(f"the index holds images of {self.shape}, not {tuple(pixels.shape[1:])}")
        self.images = self.images.to(pixels.device)
        return torch.cdist(pixels.flatten(1).float(), self.images, compute_mode="donot_use_mm_for_euclid_dist")


def check_not_empty(index: TrainingIndex, where: str = "") -> None:
    """Refuse an index without rows, before anything is drawn.

    Args:
        index: it.
        where: its path, for the message.

    Raises:
        UserError: it has none.
    """
    if len(index.captions) == 0:
        raise UserError(f"{where or 'the training-set index'} is empty: there is nothing to compare images with")

