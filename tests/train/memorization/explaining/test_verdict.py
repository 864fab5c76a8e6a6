"""Whether a prompt is memorized stands beside its explanation, and what is proposed are words."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from afresh.files import write_json
from train.memorization.config import ExplainConfig
from train.memorization.explaining.changes import other_words
from train.memorization.explaining.explanation import Explanation
from train.memorization.explaining.job import judged, run_explain
from train.memorization.explaining.page import render
from train.memorization.thresholds import FILE, Thresholds


def explanation(first: list[float]) -> Explanation:
    """Of magnitudes at the first step, by seed; the second step's are higher than any threshold."""
    magnitudes = np.array([[m, 100.0] for m in first], np.float32)
    none = np.zeros((len(first), 2, 0), np.float32)
    return Explanation("flag", (), none, magnitudes, np.arange(len(first)), np.array([951, 901]))


def at_951(limit: float, form: str, **found: object) -> Thresholds:
    return Thresholds(form, (None,) * 9 + (limit,), **found)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("thresholds", "form", "memorized", "limit"),
    [
        (at_951(3.0, "l2"), "l2", True, 3.0),  # 2 and 4 are 3 on average
        (at_951(3.5, "l2"), "l2", False, 3.5),
        (at_951(0.75, "rms"), "l2", True, 3.0),  # of 16 numbers
        (at_951(12.0, "l2"), "rms", True, 3.0),
        (at_951(3.0, "l2", against="blurry"), "l2", None, None),
        (at_951(3.0, "l2", elements=64), "l2", None, None),
        (Thresholds("l2", (1.0,) + (None,) * 9), "l2", None, None),
        (None, "l2", None, None),
    ],
)
def test_the_first_steps_magnitude_is_compared_with_the_models_threshold(thresholds, form, memorized, limit):
    found = judged(explanation([2.0, 4.0]), thresholds, form, elements=16, timesteps=1000)
    assert found["memorized"] is memorized and found["first_magnitude"] == 3.0
    assert found["first_threshold"] == (None if limit is None else pytest.approx(limit))


def test_the_page_and_the_terminal_say_it(tiny_pipe, tmp_path):
    tiny_pipe.save_pretrained(tmp_path / "model")
    config = ExplainConfig(str(tmp_path / "model"), "red apple", steps=1, seeds=1, words=0, device="cpu")
    shown = {}
    for name, limit in (("unknown", None), ("memorized", 1e-6), ("not memorized", 1e6)):
        if limit is not None:
            write_json(Path(config.model) / FILE, {"form": "l2", "by_band": [limit] * 10})
        summary = run_explain(config)
        shown[name] = (summary.view(), render(summary))
    assert all("not known" in text and "--calibrate" in text for text in shown["unknown"])
    assert "; memorized (" in shown["memorized"][0] and "Memorized (" in shown["memorized"][1]
    assert "; not memorized (" in shown["not memorized"][0] and "1e+06" in shown["not memorized"][0]


def test_proposals_are_words_and_not_the_prompts_own():
    words = other_words("An Apple by the river")
    assert "apple" not in words and "river" not in words and {"bridge", "lemon", "piano"} <= set(words)
    assert len(words) == len(set(words)) > 100
    assert not {"twards", "ound"} & set(words) and all(word.isalpha() and len(word) > 2 for word in words)
