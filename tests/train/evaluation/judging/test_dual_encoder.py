"""The independent judge: what its towers guarantee, and what the carried one has learned."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from afresh.errors import UserError
from train.evaluation.judging.dual_encoder import DualEncoder, DualEncoderConfig, word_parts, words


@pytest.fixture(scope="module")
def fresh() -> DualEncoder:
    torch.manual_seed(0)
    return DualEncoder(DualEncoderConfig(width=32, queries=4, buckets=512, text_width=16)).eval()


@pytest.fixture(scope="module")
def carried() -> DualEncoder:
    return DualEncoder.load()


def test_unseen_words_share_parts_with_known_ones():
    def shared(a: str, b: str) -> int:
        return len(set(word_parts(a, 1 << 20)) & set(word_parts(b, 1 << 20)))

    assert shared("smiling", "smiled") >= 3
    assert shared("smiling", "octopus") == 0
    assert shared("up", "upwards") >= 1


def test_words_ignore_case_punctuation_and_compatibility_forms():
    assert words("Smiling Face, ﬁre!") == ["smiling", "face", "fire"]
    assert words("…") == []


def test_embeddings_are_unit_rows_and_do_not_depend_on_the_batch(fresh, emoji):
    images, captions = [image for image, _ in emoji[:9]], [caption for _, caption in emoji[:9]]
    for embed, inputs in (
        (fresh.embed_images, images),
        (fresh.copy_features, images),
        (fresh.embed_texts, captions),
    ):
        rows = embed(inputs)
        assert rows.shape == (9, 32) and rows.dtype == np.float32
        assert np.linalg.norm(rows, axis=1) == pytest.approx(np.ones(9), abs=1e-5)
        assert embed(inputs[4:5]) == pytest.approx(rows[4:5], abs=1e-4)
    assert fresh.image_features(images, batch_size=2) == pytest.approx(fresh.image_features(images), abs=1e-4)


def test_nothing_and_wordless_captions_have_embeddings(fresh):
    assert fresh.embed_images([]).shape == fresh.embed_texts([]).shape == (0, 32)
    rows = fresh.embed_texts(["", "…", "a face"])
    assert np.isfinite(rows).all()
    assert rows[0] == pytest.approx(rows[1])


def test_saved_in_half_precision_and_loaded_it_embeds_the_same(fresh, emoji, tmp_path):
    fresh.save(tmp_path)
    loaded = DualEncoder.load(tmp_path)
    assert loaded.config == fresh.config
    assert loaded.embed_images([emoji[0][0]]) == pytest.approx(fresh.embed_images([emoji[0][0]]), abs=5e-3)
    assert loaded.embed_texts(["a face"]) == pytest.approx(fresh.embed_texts(["a face"]), abs=5e-3)


def test_a_folder_that_is_no_dual_encoder_is_named(fresh, tmp_path):
    with pytest.raises(UserError, match="model.safetensors: missing"):
        DualEncoder.load(tmp_path)
    fresh.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"width": 64}))
    with pytest.raises(UserError, match="not a dual encoder"):
        DualEncoder.load(tmp_path)


def test_the_carried_weights_are_small():
    import train

    folder = Path(train.__file__).parent / "assets" / "dual_encoder"
    assert sum(file.stat().st_size for file in folder.iterdir()) < 3_000_000


def test_the_carried_one_finds_the_captions_of_images_it_never_saw(carried):
    from curate.reading.images import decode_image
    from curate.sample_set import load_part
    from train.evaluation.judging.metrics import retrieval_rank

    samples = load_part("held_out")
    images = carried.embed_images([decode_image(sample.image) for sample in samples])
    captions = list(dict.fromkeys(sample.caption for sample in samples))
    own = [captions.index(sample.caption) for sample in samples]
    rank = retrieval_rank(images, carried.embed_texts(captions), own)
    assert np.median(rank) <= 15  # by chance: 100
    assert np.mean(rank <= 10) >= 0.4  # by chance: 0.05


def test_the_carried_one_tells_copies_from_look_alikes(carried):
    from curate.embed.edits import EDITS
    from curate.reading.images import decode_image
    from curate.sample_set import load_part
    from train.memorization.detection.roc import roc_auc

    held_out = [decode_image(sample.image) for sample in load_part("held_out")]
    training = [decode_image(sample.image) for sample in load_part("finetune")]
    rows = carried.copy_features(held_out)
    nearest = (rows @ carried.copy_features(training).T).max(axis=1)
    for edit in ("jpeg", "resize", "blur"):
        rng = np.random.default_rng(0)
        edited = carried.copy_features([EDITS[edit](image, rng) for image in held_out])
        copies = (edited * rows).sum(axis=1)
        labels = np.repeat([1, 0], [len(copies), len(nearest)])
        assert roc_auc(np.concatenate([copies, nearest]), labels) > 0.95, edit
