"""The table's rows: copies told from others by each judge, verbatim from template, alignment beside real images'."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageOps

from afresh.errors import UserError
from curate.reading.images import decode_image
from train.evaluation.judging.drawn import Drawn
from train.evaluation.metrics.measuring import evaluate_images

JUDGES = ("memorized_share", "copied_share", "imagenet_copied_share", "pixel_copied_share")


def test_copies_are_found_by_every_judge_and_others_by_none(results):
    copies, others, _ = (measured.row for measured in results[1])
    for judge in JUDGES:
        assert copies[judge] >= 0.8, judge
        assert others[judge] <= 0.1, judge
    assert copies["similarity"] > 0.8 > others["similarity"]
    assert copies["similarity_among_seeds"] > 0.8 > others["similarity_among_seeds"]


def test_images_of_their_captions_align_with_them_and_others_do_not(results):
    copies, others, own = (measured.row for measured in results[1])
    assert copies["alignment"] > others["alignment"]
    assert copies["retrieval_rank"] < others["retrieval_rank"]
    assert own["alignment"] > others["alignment"]
    assert copies["alignment_of_real"] > others["alignment_of_real"]


def test_alignment_is_given_as_a_share_of_what_the_real_images_of_the_captions_earn(metrics, training, held_out):
    samples = [*training[:6], *held_out[:6]]
    captions = [sample.caption for sample in samples]
    real = Drawn("real", "none", "both", [decode_image(sample.image) for sample in samples], captions)
    unknown = Drawn("a", "none", "other", real.images[:2], ["a caption of no image", "and another"])
    rows = [one.row for one in evaluate_images([real, unknown], metrics)]
    assert rows[0]["alignment_of_real"] == pytest.approx(1)
    assert "alignment_of_real" not in rows[1]


def test_a_copy_in_other_pixels_is_a_template_and_one_in_the_same_is_verbatim(metrics, training):
    """Mirrored, an image has other pixels; the copy spaces of both networks know it."""
    images = [decode_image(sample.image) for sample in training[:40]]
    captions = [sample.caption for sample in training[:40]]
    mirrored = [ImageOps.mirror(image) for image in images]
    drawn = [Drawn("a", "none", "x", images, captions), Drawn("b", "none", "x", mirrored, captions)]
    same, other = evaluate_images(drawn, metrics)
    assert same.row["verbatim_share"] == 1 and same.row["template_share"] == 0
    assert other.row["template_share"] > 0
    for one in (same, other):
        assert one.row["verbatim_share"] + one.row["template_share"] == pytest.approx(one.row["copied_share"])
        assert one.row["verbatim_share"] <= one.row["pixel_copied_share"]
        copied, pixels = one.images["copied_share"], one.images["pixel_copied_share"]
        assert np.array_equal(one.images["template_share"], copied & ~pixels)


def test_quality_is_nothing_for_the_held_out_images_themselves(results, metrics, held_out):
    images = [decode_image(sample.image) for sample in held_out]
    captions = [sample.caption for sample in held_out]
    noise = [Image.effect_noise((64, 64), 90).convert("RGB")] * len(images)
    same, other = evaluate_images(
        [Drawn("a", "none", "held_out", images, captions), Drawn("b", "none", "held_out", noise, captions)],
        metrics,
        resamples=0,
    )
    for distance in ("quality", "imagenet_distance"):
        assert same.row[distance] == pytest.approx(0, abs=1e-2)
        assert other.row[distance] > results[1][0].row[distance]


def test_every_number_of_a_row_stands_inside_its_interval(results):
    for measured in results[1]:
        keys = [key.removesuffix("_low") for key in measured.row if key.endswith("_low")]
        assert {*JUDGES, "alignment", "retrieval_rank", "quality", "seconds_per_image", "template_share"} <= set(keys)
        for key in keys:
            if np.isnan(measured.row[key]):  # what one image a caption cannot tell
                assert key == "similarity_among_seeds"
                continue
            assert measured.row[f"{key}_low"] <= measured.row[key] + 1e-9, key
            assert measured.row[key] <= measured.row[f"{key}_high"] + 1e-9, key


def test_without_resamples_there_are_no_intervals(metrics, results):
    (one,) = evaluate_images(results[0][:1], metrics, resamples=0)
    assert not any(key.endswith(("_low", "_high")) for key in one.row)


def test_nothing_drawn_is_an_error_that_names_the_setting(metrics):
    with pytest.raises(UserError, match="raw, guidance amg, repeated"):
        evaluate_images([Drawn("raw", "amg", "repeated", [], [])], metrics)


@pytest.mark.parametrize("name", ["dual-encoder", "imagenet"])
def test_a_judges_threshold_lets_one_percent_of_the_held_out_pass(metrics, name):
    (judge,) = [metric for metric in metrics if metric.name == name]
    above = judge.copies.held_out_nearest > judge.copies.threshold
    assert np.mean(above) == pytest.approx(0.01, abs=1 / len(above))
