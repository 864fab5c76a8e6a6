"""What decisions leave: for each row whether it is kept, and if not, why and for whom, as numbers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

EXACT_IMAGE = "exact_image"  # the stand-in has the same pixels
NEAR_PAIR = "near_pair"  # image near, caption near
NEAR_IMAGE = "near_image"  # image near, caption another one (pooled, if there is one)
CAPTION_QUOTA = "caption_quota"  # another image, the same caption, and enough samples have it
NEAR_CAPTION = "near_caption"  # another image, a near caption, and enough samples have one like it
OTHER_SET = "other_set"  # the image, or a near one, stands in a set that was to be kept apart
EXCLUDED = "excluded"  # named in a list of samples to leave out
OWN_RULE = "own_rule"  # by a rule of the user's own, though neither image nor caption is near
OF_ITS_IMAGE = (EXACT_IMAGE, NEAR_PAIR, NEAR_IMAGE)  # the stand-in shows the same image, or a near one
REASONS = (EXACT_IMAGE, NEAR_PAIR, NEAR_IMAGE, CAPTION_QUOTA, NEAR_CAPTION, OTHER_SET, EXCLUDED, OWN_RULE)
CODE = {reason: number for number, reason in enumerate(REASONS, 1)}  # in a byte; 0 is kept


@dataclass(frozen=True)
class Settled:
    """What was decided about n rows.

    Attributes:
        reason: uint8 ``[n]``, 0 for a kept row, else the ``CODE`` of why it is dropped.
        kept_by: int32 or int64 ``[n]``, the kept row that stands for a dropped one; -1 where none does.
        image_similarity: float32 ``[n]``, with that row, 1 for equal pixels; NaN where it is not known.
        caption_similarity: float32 ``[n]``, likewise of the captions.
        group: int32 or int64 ``[n]``, the first row, as they are judged, that shows the same image.
    """

    reason: NDArray[np.uint8]
    kept_by: NDArray[np.integer]
    image_similarity: NDArray[np.float32]
    caption_similarity: NDArray[np.float32]
    group: NDArray[np.integer]

    @classmethod
    def kept(cls, n: int) -> Settled:
        """Every row is kept, as an image of its own."""
        number = np.int32 if n < 1 << 31 else np.int64
        images, captions = (np.full(n, np.nan, np.float32) for _ in range(2))
        return cls(np.zeros(n, np.uint8), np.full(n, -1, number), images, captions, np.arange(n, dtype=number))

    def put(self, rows: NDArray[np.int64], part: Settled) -> None:
        """Take over what was decided about some rows, whose numbers in ``part`` are their places in ``rows``."""
        self.reason[rows] = part.reason
        self.kept_by[rows] = np.where(part.kept_by < 0, -1, rows[part.kept_by])
        self.image_similarity[rows], self.caption_similarity[rows] = part.image_similarity, part.caption_similarity
        self.group[rows] = rows[part.group]
