"""Which metrics a protocol gets: what is not at hand is named, what is unknown refused, one's own taken."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from afresh.errors import UsageError
from train.evaluation.config import Protocol, Setting
from train.evaluation.metrics.measuring import evaluate_images
from train.evaluation.metrics.protocol import Reference
from train.evaluation.metrics.registry import METRICS, chosen, columns_of, make, named

OWN = """
import numpy as np
from train.evaluation.judging.intervals import mean
from train.evaluation.metrics.protocol import Column


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
"""


def protocol(**keys) -> Protocol:
    values = {"index": "curated", "training": ["a.tar"], "held_out": ["b.tar"], **keys}
    return Protocol({"raw": "m"}, [Setting("raw")], {"repeated": "p.txt"}, **values)


def test_all_that_are_at_hand_measure_and_the_others_say_what_they_lack():
    kinds, lacking = chosen(protocol())
    assert list(kinds) == ["detector", "dual-encoder", "imagenet", "pixels"]
    assert lacking.keys() == METRICS.keys() - kinds.keys()
    assert named(lacking).count("weights:") == 3
    assert "\n" not in named(lacking)
    kinds, lacking = chosen(protocol(weights={"sscd": "f.pt", "clip": "c", "inception": "i.pt"}))
    assert kinds.keys() == METRICS.keys() and not lacking


@pytest.mark.parametrize(
    ("keys", "lost", "what"),
    [
        ({"index": ""}, {"detector"}, "index"),
        ({"held_out": []}, {"dual-encoder", "imagenet"}, "held_out"),
    ],
)
def test_a_metric_lacks_the_images_that_it_compares_with(keys, lost, what):
    _, lacking = chosen(protocol(**keys))
    assert {name for name in lacking if "weights" not in lacking[name]} == lost
    assert all(what in lacking[name] for name in lost)


def test_originals_stand_for_training_images_and_without_either_no_copy_is_looked_for(tmp_path):
    (tmp_path / "bare.txt").write_text("grinning face\n")
    (tmp_path / "named.jsonl").write_text('{"caption": "grinning face", "image": "a.png"}\n')
    bare = replace(protocol(training=[]), prompts={"x": str(tmp_path / "bare.txt")})
    kinds, lacking = chosen(bare)
    assert list(kinds) == ["detector"] and "training" in lacking["pixels"]
    kinds, _ = chosen(replace(bare, prompts={**bare.prompts, "y": str(tmp_path / "named.jsonl")}))
    assert list(kinds) == ["detector", "dual-encoder", "imagenet", "pixels"]


def test_the_imagenet_judge_names_its_extra_where_the_wheels_are_missing(monkeypatch):
    monkeypatch.setattr("train.evaluation.metrics.imagenet.find_spec", lambda name: None)
    kinds, lacking = chosen(protocol())
    assert "imagenet" not in kinds and "afresh[judges]" in lacking["imagenet"]


def test_an_unknown_metric_and_a_part_that_is_none_are_refused_by_name(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="'fidd' is not known; choose of detector, dual-encoder"):
        chosen(protocol(metrics=["pixels", "fidd"]))
    with pytest.raises(UsageError, match="lacks columns, lacking, measure"):
        chosen(protocol(metrics=["collections:OrderedDict"]))
    with pytest.raises(UsageError, match=r"nothing to measure with: sscd \(weights"):
        chosen(protocol(metrics=["sscd"]))


def test_a_metric_of_ones_own_has_its_column_and_its_interval(tmp_path, monkeypatch, results):
    (tmp_path / "my_metrics.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    kinds, _ = chosen(protocol(metrics=["my_metrics:Brightness"]))
    metrics = make(kinds, Reference())
    (one,) = evaluate_images(results[0][:1], metrics)
    expected = np.mean([np.asarray(image).mean() for image in results[0][0].images])
    assert one.row["brightness"] == pytest.approx(expected)
    assert one.row["brightness_low"] < expected < one.row["brightness_high"]
    assert "brightness" in [column.key for column in columns_of(metrics)]
