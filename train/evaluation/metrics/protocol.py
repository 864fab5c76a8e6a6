"""What a metric is: columns of the table, and a number for each of the images drawn in one setting.

    class Brightness:
        name, about = "brightness", "mean of the pixels"
        columns = (Column("brightness", "brightness", "Mean of all pixels, of 255."),)

        def __init__(self, reference):
            pass

        @staticmethod
        def lacking(protocol):
            return ""

        def measure(self, drawn):
            return {"brightness": mean([np.asarray(image).mean() for image in drawn.images])}

A metric of one's own is named in a protocol's ``metrics`` as ``my_metrics:Brightness``, or by an entry point of the
group ``afresh.metrics``. Nothing that guides or filters a model may follow what judges it here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from train.evaluation.config import Protocol as Compared
from train.evaluation.judging.drawn import Drawn
from train.evaluation.judging.intervals import Values

if TYPE_CHECKING:
    from PIL.Image import Image

    from curate.embed.protocol import Embedder
    from curate.index.training_index import TrainingIndex


@dataclass(frozen=True)
class Column:
    """One column of the table."""

    key: str
    title: str
    explanation: str
    form: str = "number"
    """``share`` (with a bar), ``number``, ``rank`` or ``seconds``."""
    better: int = 0
    """-1 where lower is better, 1 where higher is, 0 where neither."""


@dataclass(frozen=True)
class Reference:
    """What images are compared with."""

    training: Sequence[Image] = ()
    """The images that the models were trained on, each once; without shards of them, the originals of all prompts."""
    held_out: Sequence[Image] = ()
    """Images that no model was trained on and that are no copies of training images."""
    captions: Sequence[str] = ()
    """Candidates among which an image has to find its own caption."""
    originals: Mapping[str, Sequence[Image]] = field(default_factory=dict)
    """Real images of a caption."""
    index: TrainingIndex | None = None
    """The training set as curation left it; calibrates its embedder onto SSCD's scale."""
    embedder: Embedder | None = None
    """The one that the index was built with."""
    weights: Mapping[str, str] = field(default_factory=dict)
    """Files and folders by the name of the metric that they are of."""


class Metric(Protocol):
    """One or several columns. Made of a :class:`Reference`, once, and asked about each setting."""

    name: str
    about: str
    """What judges, and what it was trained on; for the report's settings."""
    columns: Sequence[Column]
    """All that :meth:`measure` may give; what is not at hand is left out of its answer."""

    @staticmethod
    def lacking(protocol: Compared) -> str:
        """What the metric needs and a protocol does not give, in a few words; empty where nothing is missing."""

    def measure(self, drawn: Drawn) -> Mapping[str, Values]:
        """A number for each column, of all images of a setting (at least one); keys that are no columns are kept image
        by image only.
        """
