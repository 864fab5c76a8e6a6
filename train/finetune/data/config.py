"""Settings of a run's data: which samples, at what size, with which changes and captions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ShardGroup:
    """Shards whose samples stand in an epoch several times, or count more or less than others.

    Args:
        path: a path, glob, brace range, folder or fsspec URL.
        repeats: how often each of their samples is seen in an epoch.
        weight: what their losses are multiplied by, beside ``weight_field``.
    """

    path: str
    repeats: int = 1
    weight: float = 1.0


@dataclass(frozen=True)
class Buckets:
    """Images of several shapes, of which a batch holds one: each goes where the aspect ratio is nearest to its own.

    Args:
        step: sides are multiples of it, in pixels. 0 brings every image to one square, as does one that is no smaller
            than the resolution.
        min_side: smallest side; 0 is half the resolution.
        max_side: largest side; 0 is twice the resolution.
        enlarge: bring images that are smaller than their bucket to its size. Else there are smaller buckets for them,
            down to one step a side, and an image goes where it is shrunk least; only what is smaller than a step grows.
    """

    step: int = 64
    min_side: int = 0
    max_side: int = 0
    enlarge: bool = True


@dataclass(frozen=True)
class Augmentation:
    """Ranges of the random changes; zero switches one off.

    Args:
        shift: largest shift, as a share of the image's side.
        scale: largest relative change of size, in both directions.
        flip: probability of a horizontal flip.
        colour: largest change of brightness, contrast and saturation, relative.
        hue: largest rotation of hue, in turns.
        rotate: largest rotation, in degrees.
        variants: how many augmented forms of each image are made in all (their latents can then be cached);
            0 makes a new one at every visit.
    """

    shift: float = 0.0
    scale: float = 0.0
    flip: float = 0.0
    colour: float = 0.0
    hue: float = 0.0
    rotate: float = 0.0
    variants: int = 0

    @property
    def active(self) -> bool:
        """Whether anything is changed at all."""
        return any((self.shift, self.scale, self.flip, self.colour, self.hue, self.rotate))


@dataclass(frozen=True)
class Tags:
    """Captions that are lists of tags, made other ones at every visit.

    Args:
        trigger: words in front of every caption that is not dropped.
        shuffle: bring the tags into another order.
        dropout: probability that a tag is left out, in [0, 1); one stays.
        keep: how many of the first tags are neither moved nor left out.
        separator: between tags.
    """

    trigger: str = ""
    shuffle: bool = False
    dropout: float = 0.0
    keep: int = 0
    separator: str = ","

    @property
    def active(self) -> bool:
        """Whether a caption is changed at all."""
        return bool(self.trigger or self.shuffle or self.dropout)


@dataclass(frozen=True)
class RandomWords:
    """Words that a caption gets at random places, other ones at every visit (Somepalli et al., NeurIPS 2023).

    Args:
        kind: word of the tokenizer's vocabulary, number, or repeat, a word of the caption again.
        number: how many; 0 leaves captions as they are. The paper adds 4.
        share: probability that a visit gets them.
    """

    kind: Literal["word", "number", "repeat"] = "word"
    number: int = 0
    share: float = 1.0
