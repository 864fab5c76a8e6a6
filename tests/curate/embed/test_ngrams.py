"""Captions as counts of n-grams: near captions are near, and others are not."""

import numpy as np

from curate.embed.ngrams import embed_captions


def test_caption_rows_do_not_depend_on_their_neighbours():
    captions = ["a red apple", "", "x", "日本語のキャプション", "A  RED apple", "a green apple", "\ud800"] * 5
    whole = embed_captions(captions)
    assert whole.shape == (35, 512) and whole.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(whole, axis=1), 1, atol=1e-6)
    assert (whole == embed_captions(captions, block=3)).all()
    assert (whole[0] == whole[4]).all()  # equal once normalised
    assert embed_captions([]).shape == (0, 512)


def test_near_captions_are_near_and_others_are_not():
    captions = [
        "a photograph of a large brown dog on a beach",
        "a photograph of a large brown dog on the beach",
        "two people riding bicycles through a city at night",
        "an oil painting of mountains",
    ]
    cosine = embed_captions(captions) @ embed_captions(captions).T
    assert cosine[0, 1] > 0.85
    assert np.abs(cosine[[0, 0, 2], [2, 3, 3]]).max() < 0.35


def test_hashing_estimates_the_cosine_of_ngram_counts(emoji):
    captions = [caption for _, caption in emoji]
    small, large = (embed_captions(captions, dim=dim) for dim in (512, 65_536))
    error = (small @ small.T - large @ large.T)[~np.eye(len(captions), dtype=bool)]
    assert abs(error.mean()) < 0.02 and error.std() < 0.1
