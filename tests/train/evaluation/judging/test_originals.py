"""Held-out images that are training images are left out, or refused where nothing else is left."""

from __future__ import annotations

import pytest
from PIL import Image

from afresh.errors import UserError
from train.evaluation.judging.originals import never_trained_on


def images(*numbers: int) -> list[Image.Image]:
    return [Image.new("RGB", (8, 8), (number, 0, 0)) for number in numbers]


def test_what_was_trained_on_is_left_out_and_said(capsys):
    left = never_trained_on(images(1, 2, 3, 4), images(2, 9))
    assert [image.getpixel((0, 0))[0] for image in left] == [1, 3, 4]
    assert "held_out: 1 of 4 images are training images, and are left out" in capsys.readouterr().err
    assert len(never_trained_on(images(1, 2), images(3))) == 2 and capsys.readouterr().err == ""
    assert never_trained_on([], images(3)) == []


@pytest.mark.parametrize("held_out", [(1, 2), (1, 2, 3)])
def test_a_set_of_training_images_is_refused(held_out):
    with pytest.raises(UserError, match=r"held_out: 2 of \d images are training images: name shards"):
        never_trained_on(images(*held_out), images(1, 2))
