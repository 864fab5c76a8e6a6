"""Captions at a visit: random words by position, the set's own text for the filter, the empty caption left alone."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from train.finetune.batches.captions import Captions
from train.finetune.config import RandomWords
from train.sample_model.small import tiny_pipeline

TEXTS = ["red apple, food fruit", "grinning face, face smiling", ""]


class Recorder:
    """A denoiser's tokenizer that keeps what it was asked for."""

    def __init__(self, pipe) -> None:
        self.asked: list[str] = []
        self.pipe = pipe

    def tokens(self, texts: list[str]):
        from train.denoising.conditioning import Conditioning

        self.asked += texts
        ids = self.pipe.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        return Conditioning({"ids": ids})


def chosen(words: RandomWords, positions: list[int], dropout: float = 0.0) -> tuple[list[str], list[str]]:
    """The texts that the filter sees, and those that were tokenized, one row of ``TEXTS`` after the other."""
    pipe = tiny_pipeline()
    denoiser = Recorder(pipe)
    model = SimpleNamespace(device=torch.device("cpu"), denoiser=denoiser, pipe=pipe)
    captions = Captions(model, lambda row: (TEXTS[row],), dropout, words=words, seed=3)
    rows = torch.arange(len(positions)) % len(TEXTS)
    _, texts, _ = captions.choose(rows, torch.full((len(positions), 2), 0.5), positions)
    return texts, denoiser.asked


def test_random_words_are_added_at_every_visit_by_its_position():
    texts, asked = chosen(RandomWords(number=4), [0, 1, 2, 3, 4, 5])
    assert texts == TEXTS * 2
    assert asked[0] != asked[3] and asked[1] != asked[4]  # other words at another visit
    for text, seen in zip(TEXTS[:2], asked[:2], strict=True):
        own = text.split()
        assert len(seen.split()) >= len(own) + 3  # a token may decode to nothing but spaces
        assert [word for word in seen.split() if word in own][: len(own)] == own
    again = chosen(RandomWords(number=4), [0, 1, 2, 3, 4, 5])[1]
    assert again == asked
    moved = chosen(RandomWords(number=4), [3, 4, 5])[1]
    assert moved[:2] == asked[3:5]  # a function of the position and of nothing before it


def test_the_empty_caption_gets_no_words_and_a_share_of_zero_changes_nothing():
    assert "" in chosen(RandomWords(number=4), [0, 1, 2])[1]
    assert chosen(RandomWords(number=4), [0, 1, 2], dropout=0.9)[1] == [""]
    assert chosen(RandomWords(number=4, share=0.0), [0, 1, 2])[1] == chosen(RandomWords(), [0, 1, 2])[1] == TEXTS
