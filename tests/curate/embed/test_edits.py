"""Edits: seeded, in RGB, and each does what it is called."""

import numpy as np
import pytest

from curate.embed.edits import EDITS, crop, jpeg, resize, rotate, strong_edit, text


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


def test_rotation_by_an_angle_needs_no_luck_and_a_quarter_turn_keeps_every_pixel(emoji):
    image = emoji[3][0].crop((0, 0, 60, 40))
    tilted = rotate(image, np.random.default_rng(0), 15)
    assert tilted.size == (60, 40) and tilted.tobytes() == rotate(image, np.random.default_rng(1), 15).tobytes()
    assert tilted.getpixel((0, 0)) == (255, 255, 255)
    turned = np.asarray(rotate(image, np.random.default_rng(0), 90))
    assert (turned == np.rot90(np.asarray(image))).all()


def test_text_is_written_in_one_colour_over_a_small_part(emoji):
    image = emoji[3][0].resize((256, 256))
    for seed in range(5):
        written = text(image, np.random.default_rng(seed))
        assert written.tobytes() == text(image, np.random.default_rng(seed)).tobytes()
        changed = (np.asarray(written) != np.asarray(image)).any(axis=2)
        assert 0.005 < changed.mean() < 0.1
        colours, counts = np.unique(np.asarray(written)[changed], axis=0, return_counts=True)
        assert counts.max() > 0.5 * changed.sum()


def test_grayscale_has_no_colour_and_flip_is_its_own_inverse(emoji):
    image, rng = emoji[3][0], np.random.default_rng(0)
    grey = np.asarray(EDITS["grayscale"](image, rng))
    assert (grey == grey[..., :1]).all()
    assert EDITS["flip"](EDITS["flip"](image, rng), rng).tobytes() == image.tobytes()
