"""What the tab Prompt says, without a model and without Gradio."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from afresh.errors import UsageError
from curate.index.training_index import TrainingIndex
from train.app.config import AppConfig
from train.app.fragments import Curve, chart, fragment
from train.app.prompts import (
    LONGEST,
    Scale,
    asked,
    checked,
    choices,
    clean_and_examples,
    limits,
    reading,
    settings,
    words_of,
)
from train.app.strength import LEAST, MOST, STRENGTHS, with_strength
from train.memorization.explaining.explanation import Explanation, Token
from train.prompts import Prompt, write_prompts
from train.sampling.config import SampleConfig
from train.sampling.terms import registry

NOTHING = {"memorized": None, "first_magnitude": 1.0, "first_threshold": None}
PROMPT = "a cat, a hat"


def explained(prompt: str, values: list[float]) -> Explanation:
    """As ``explain`` would give it, each word one token of a significance."""
    tokens = [Token(word.text, "word", word.start, word.end) for word in words_of(prompt)]
    significance = np.array(values, np.float32)[None, None]
    none = np.zeros(1, np.int64)
    return Explanation(prompt, tuple(tokens), significance, np.full((1, 1), 2.0, np.float32), none, none)


def test_words_are_struck_with_the_separators_that_they_leave_alone():
    numbers = {word.text: number for number, word in enumerate(words_of(PROMPT))}
    assert asked(PROMPT, [numbers["cat"]]) == "a, a hat"
    assert asked(PROMPT, [0, 1]) == "a hat"
    assert asked(PROMPT, [numbers["hat"], 3]) == "a cat"
    assert asked(PROMPT, []) == PROMPT
    assert asked(PROMPT, [99, -1]) == PROMPT  # what is no word of it strikes nothing


def test_a_reading_finds_each_words_significance_where_others_were_struck():
    rest = asked(PROMPT, [0, 1])  # the comma goes along
    found = reading(PROMPT, [0, 1], explained(rest, [0.5, 2.0]), NOTHING, Scale([], ""))
    assert [(word["text"], word["struck"], word["significance"]) for word in found["words"]] == [
        ("a", True, None), ("cat", True, None), (",", False, None), ("a", False, 0.5), ("hat", False, 2.0)
    ]  # fmt: skip
    assert [word["weight"] for word in found["words"]] == [0, 0, 0, 0.25, 1]
    assert found["share"] is None and found["asked"] == "a hat"


def test_the_share_is_of_the_clean_prompts_that_are_below():
    scale = Scale(["a", "b", "c", "d"], "clean prompts")
    assert scale.share_below(1.0) is None
    scale.add([3.0, 1.0])
    scale.add([2.0, 4.0])
    assert [scale.share_below(m) for m in (0.5, 2.0, 2.5, 9.0)] == [0, 0.25, 0.5, 1]
    found = reading(PROMPT, [], explained(PROMPT, [1, 1, 1, 1, 1]), NOTHING, scale)
    assert found["share"] == 0.25 and found["magnitudes"] == [1, 2, 3, 4]


def test_words_that_the_model_does_not_see_are_told():
    whole = explained(PROMPT, [1.0, 2.0, 0.5, 1.0, 1.0])
    cut = replace(whole, tokens=whole.tokens[:2], significance=whole.significance[..., :2])
    found = reading(PROMPT, [], cut, NOTHING, Scale([], ""))
    assert [word["seen"] for word in found["words"]] == [True, True, True, False, False]


def test_prompts_are_neither_empty_nor_endless():
    assert checked("a" * LONGEST)
    for wrong in ("", "  \n", "a" * (LONGEST + 1)):
        with pytest.raises(UsageError):
            checked(wrong)


def test_clean_prompts_and_examples_come_from_a_labelled_file(tmp_path):
    write_prompts(tmp_path / "some.jsonl", [Prompt("a", 1), Prompt("b", 0), Prompt("c", 0), Prompt("a", 1)])
    scale, examples = clean_and_examples(AppConfig("m", prompts=str(tmp_path / "some.jsonl")), None)
    assert (scale.captions, examples) == (["b", "c"], ["a"])
    few, _ = clean_and_examples(AppConfig("m", prompts=str(tmp_path / "some.jsonl"), clean=1), None)
    assert len(few.captions) == 1


def test_or_from_the_set_by_how_often_an_image_occurs():
    eye, captions = np.eye(6, 8, dtype=np.float32), ["thrice", "thrice", "other words", "once", None, "alone"]
    group = np.array([0, 0, 0, 1, 2, 3])
    kept = np.array([True, False, False, True, True, True])
    index = TrainingIndex.build(eye, captions, ["s"] * 6, list("abcdef"), kept, group, "layout")
    scale, examples = clean_and_examples(AppConfig("m", curated="c"), index)
    assert scale.captions == ["once", "alone"] and examples == ["thrice"]
    assert clean_and_examples(AppConfig("m"), None) == (Scale([], ""), [])


def sampling(**changes) -> SampleConfig:
    return SampleConfig("m", "", "", **changes)


def test_both_images_are_watched_by_an_amg_that_does_nothing():
    plain, guided = settings(sampling(index="c"), ["prompt"], 1.0, 20, 5.0)
    assert (plain.guidance, guided.guidance) == ("amg", "prompt+amg")
    for one in (plain.amg, guided.amg):
        assert not (one.despecification or one.deduplication or one.dissimilarity)
    plain, guided = settings(sampling(index="c"), ["amg-early"], 1.0, 20, 5.0)
    assert guided.guidance == "amg-early" and guided.amg.dissimilarity
    assert settings(sampling(), ["prompt"], 1.0, 20, 5.0)[1].guidance == "prompt"
    assert settings(sampling(), [], 1.0, 20, 5.0)[1].guidance == "none"


@pytest.mark.parametrize("wrong", [["os:system"], ["amg"], ["nonsense"], ["prompt+amg"]])
def test_a_guidance_that_is_not_offered_is_refused_and_never_imported(wrong):
    with pytest.raises(UsageError, match="not offered"):
        settings(sampling(), wrong, 1.0, 20, 5.0)


def test_numbers_out_of_range_and_two_presets_are_refused():
    for steps, scale in ((0, 5.0), (201, 5.0), (20, -1.0), (20, math.nan)):
        with pytest.raises(UsageError):
            settings(sampling(), [], 1.0, steps, scale)
    with pytest.raises(UsageError, match="presets of one guidance"):
        settings(sampling(index="c"), ["amg", "amg-early"], 1.0, 20, 5.0)


def test_what_has_a_strength_is_offered_and_changes_by_it_and_stays_at_one():
    config = sampling(index="c")
    assert set(STRENGTHS) <= set(choices(True)) == set(registry.SETTINGS)
    for name in STRENGTHS:
        assert with_strength(config, [name], 1.0) is config
        assert registry.SETTINGS[name](with_strength(config, [name], 2.0)) != registry.SETTINGS[name](config), name
        for strength in (LEAST, MOST):
            registry.check(replace(with_strength(config, [name], strength), guidance=name))
    weaker, stronger = (with_strength(config, ["amg-early"], s).amg for s in (0.5, 2.0))
    assert weaker.lambda_a > 0.3 > stronger.lambda_a and weaker.c_3 < stronger.c_3
    assert with_strength(config, ["prompt"], 1e9) == with_strength(config, ["prompt"], MOST)


def test_the_limit_is_that_of_the_guidance_and_not_what_hysteresis_leaves_of_it():
    config = replace(sampling(index="c"), guidance="prompt+amg-early")
    curve = limits(config, [{"t": 0.0, "threshold": 0.1}, {"t": 1000.0, "threshold": 0.2}])
    assert [round(value, 2) for _, value in curve] == [0.4, 0.3]


def test_a_chart_leaves_out_what_is_no_number():
    points = [(1000.0, 0.1), (500.0, None), (1.0, 0.9)]
    text = chart([Curve("plain <b>", points, "plain"), Curve("nothing", [(1.0, None)], "limit")], "t", falling=True)
    assert text.count("<polyline") == 1 and "nothing" not in text
    assert "&lt;b&gt;" in text and "<b>" not in text
    assert chart([], "t") == ""


def test_texts_can_be_neither_markup_nor_a_template_of_the_browsers_side():
    texts = ("<b>", "{{x}}", "${x}", "`", "\x1b\u202e", '"')
    known = {"number": 0, "point": False, "struck": False, "seen": True, "significance": 1.0, "weight": 1.0}
    words = [known | {"text": text} for text in texts]
    text = fragment("words", words=words)
    assert "<b>" not in text and not set("{}$`\x1b\u202e") & set(text)
    assert "&#123;&#123;x&#125;&#125;" in text and "\\x1b" in text
