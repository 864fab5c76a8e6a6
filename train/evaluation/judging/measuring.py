"""What was drawn in each setting, measured by both judges, one table row a setting.

    judge = Judge(DualEncoder.load(), training_images, held_out_images, captions)
    results = evaluate_images([Drawn("raw", "none", "repeated", images, captions)], judge, index, embedder)
    rows = [result.row for result in results]

``memorized_share`` is the verdict of the embedder that guidance itself may follow; ``copied_share`` that of a
network that nothing optimises, its threshold set on images known not to be copies; ``pixel_copied_share``
that of plain pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from afresh.errors import UserError
from train.evaluation.judging.drawn import Drawn, Measured
from train.evaluation.judging.judge import Judge
from train.evaluation.judging.metrics import (
    memorized_share,
    similarity_among_seeds,
)
from train.memorization.config import MEMORIZED

if TYPE_CHECKING:

    from curate.embed.protocol import Embedder
    from curate.index.training_index import TrainingIndex


def evaluate_images(drawn: Sequence[Drawn], judge: Judge, index: TrainingIndex, embedder: Embedder) -> list[Measured]:
    """Measure every setting; all arguments are in memory, nothing is written.

    Args:
        drawn: what was drawn, one table row each.
        judge: the independent judge.
        index: the training set as curation left it; calibrates the embedder onto SSCD's scale.
        embedder: the one that the index was built with.

    Returns:
        One :class:`Measured` a setting, whose ``row`` holds ``model, guidance, prompts, images,
        memorized_share`` (own embedder), ``copied_share`` (independent judge), ``pixel_copied_share``,
        ``similarity`` (mean, own embedder, SSCD's scale), ``similarity_among_seeds`` (the same scale),
        ``alignment`` (mean cosine in the dual encoder's joint space), ``retrieval_rank`` (median),
        ``quality`` (Fréchet distance to the held-out images on the dual encoder's image features; lower is
        better) and ``seconds_per_image``.

    Raises:
        UserError: a setting holds no image.
    """
    results = []
    for one in drawn:
        if not len(one.images) or len(one.images) != len(one.captions):
            raise UserError(
                f"{one.model}, guidance {one.guidance}, {one.prompts}: {len(one.images)} images for "
                f"{len(one.captions)} captions; nothing to evaluate"
            )
        embeddings = embedder.embed(list(one.images))
        cosine, _ = index.search(embeddings, 1)
        similarity = np.asarray(index.calibrate(cosine[:, 0]), np.float32)
        among = similarity_among_seeds(embeddings, one.captions)
        judged, values = judge.measure(one)
        row = {
            "model": one.model,
            "guidance": one.guidance,
            "prompts": one.prompts,
            "images": len(one.images),
            "memorized_share": memorized_share(similarity, MEMORIZED),
            "copied_share": judged["copied_share"],
            "pixel_copied_share": judged["pixel_copied_share"],
            "similarity": float(similarity.mean()),
            "similarity_among_seeds": float(index.calibrate(np.array([among], np.float32))[0]),
            "alignment": judged["alignment"],
            "retrieval_rank": judged["retrieval_rank"],
            "quality": judged["quality"],
            "seconds_per_image": one.seconds_per_image,
        }
        results.append(Measured(row, similarity, values["judged"], values["copied"], values["pixel"]))
    return results

