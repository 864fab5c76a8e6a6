"""Edits: seeded, in RGB, and each does what it is called."""

import numpy as np
import pytest

from curate.edits import EDITS, crop, jpeg, resize, strong_edit


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_is_a_function_of_image_and_seed(name, emoji):
    image = emoji[3][0]
    before = image.tobytes()
    one, two = (EDITS[name](image, np.random.default_rng(5)) for _ in range(2))
    assert one.mode == "RGB" and one.tobytes() == two.tobytes()
    assert image.tobytes() == before
    assert one.size != image.size or one.tobytes() != before


def test_strong_edits_keep_the_size_and_differ_by_seed(emoji):
    image = emoji[3][0]
    edited = [strong_edit(image, np.random.default_rng(seed)) for seed in range(8)]
    assert {result.size for result in edited} == {image.size}
    assert len({result.tobytes() for result in edited}) == 8


def test_amounts_can_be_set(emoji):
    image, rng = emoji[3][0], np.random.default_rng(0)
    assert resize(image, rng, 2.0).size == (128, 128)
    assert crop(image, rng, 0.75).size == (32, 32)
    coarse, fine = (np.asarray(jpeg(image, rng, quality), float) for quality in (5, 95))
    original = np.asarray(image, float)
    assert np.abs(coarse - original).mean() > 2 * np.abs(fine - original).mean()


def test_grayscale_has_no_colour_and_flip_is_its_own_inverse(emoji):
    image, rng = emoji[3][0], np.random.default_rng(0)
    grey = np.asarray(EDITS["grayscale"](image, rng))
    assert (grey == grey[..., :1]).all()
    assert EDITS["flip"](EDITS["flip"](image, rng), rng).tobytes() == image.tobytes()
