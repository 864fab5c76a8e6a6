"""The training index: exact search, a calibration to trust, a folder that is checked when it is opened."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from afresh.errors import UserError
from curate.index.calibration import Calibration, nearest_distinct, without_twins
from curate.index.training_index import TrainingIndex


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def index() -> TrainingIndex:
    rng = np.random.default_rng(0)
    rows = unit(rng.standard_normal((300, 24)) + 1.0)
    rows[200:] = rows[:100]  # copies, dropped
    captions = [f"Caption {k % 40}" for k in range(298)] + [None, "caption  7"]
    return TrainingIndex.build(
        rows,
        captions,
        [f"{k % 3:06d}.tar" for k in range(300)],
        [f"key{k}" for k in range(300)],
        np.arange(300) < 200,
        np.arange(300) % 200,
        "layout",
    )


def test_search_finds_what_brute_force_finds(index, monkeypatch):
    queries = np.random.default_rng(1).standard_normal((7, 24)).astype(np.float32)
    rows = unit(index.embeddings.astype(np.float32))
    cosine = unit(queries) @ rows.T
    for elements in (1 << 24, 500):  # at once, and in many blocks
        monkeypatch.setattr("curate.index.training_index._BLOCK_ELEMENTS", elements)
        fresh = replace(index)
        for k in (1, 10, 300, 1000):
            similarity, found = fresh.search(queries, k)
            assert similarity.shape == found.shape == (7, min(k, 300))
            assert (similarity.dtype, found.dtype) == (np.float32, np.int64)
            assert similarity.flags.c_contiguous and found.flags.c_contiguous  # or torch warns of every use
            np.testing.assert_allclose(similarity, np.sort(cosine, 1)[:, ::-1][:, :k], atol=1e-6)
            np.testing.assert_allclose(np.take_along_axis(cosine, found, 1), similarity, atol=1e-6)


def test_an_index_held_in_memory_answers_the_same(index, monkeypatch):
    monkeypatch.setattr("curate.index.training_index._BLOCK_ELEMENTS", 500)
    queries = np.random.default_rng(1).standard_normal((7, 24)).astype(np.float32)
    held, not_held = replace(index), replace(index)
    held.search(queries, 1)  # from the file
    held.hold()
    not_held.hold(most=300 * 24 * 4 - 1)
    assert held._held is not None and not_held._held is None
    (similarity, rows), (expected, found) = held.search(queries, 10), not_held.search(queries, 10)
    np.testing.assert_array_equal(rows, found)
    np.testing.assert_allclose(similarity, expected, atol=1e-6)


def test_equal_rows_come_in_their_order(index):
    similarity, found = index.search(index.vectors([5, 17]), 2)
    assert found.tolist() == [[5, 205], [17, 217]]
    np.testing.assert_allclose(similarity, 1, atol=1e-6)


def test_equal_rows_of_many_blocks_come_in_their_order(monkeypatch):
    monkeypatch.setattr("curate.index.training_index._BLOCK_ELEMENTS", 500)
    axes = np.random.default_rng(2).integers(0, 5, 3000)
    rows = np.eye(5, dtype=np.float16)[axes]
    index = TrainingIndex.build(rows, *[["x"] * 3000] * 3, np.ones(3000, bool), np.arange(3000), "layout")
    queries = np.random.default_rng(3).standard_normal((7, 5)).astype(np.float32)
    for k in (40, 2000):  # fewer than are equal, and more
        _, found = index.search(queries, k)
        for query, numbers in zip(queries, found, strict=True):
            np.testing.assert_array_equal(numbers, np.lexsort((np.arange(3000), -query[axes]))[:k])


def test_a_search_is_exact_whatever_precision_the_process_chose_and_leaves_it(index):
    expected = index.search(index.vectors(np.arange(9)), 5)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = index.search(index.vectors(np.arange(9)), 5)
            assert torch.is_autocast_enabled("cpu")
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_what_is_no_number_is_answered_as_that(index):
    queries = np.stack([np.full(24, np.nan, np.float32), index.vectors(3)])
    similarity, rows = index.search(queries, 2)
    assert np.isnan(similarity[0]).all()
    assert rows[1, 0] == 3


def test_search_takes_torch_and_single_vectors(index):
    vector = torch.tensor(index.vectors(3), requires_grad=True)
    assert index.search(vector, 1)[1].tolist() == [[3]]
    assert index.search(index.vectors(3), 1)[1].tolist() == [[3]]
    with pytest.raises(ValueError, match="length 24"):
        index.search(np.ones((1, 5)), 1)


def test_captions_and_images_are_counted(index):
    assert index.counts[0] == sum(k % 40 == 0 for k in range(298))
    assert index.counts[298] == 0  # no caption
    assert index.counts[299] == index.counts[7]  # equal once normalised
    assert index.group_counts[0] == 2 and index.group_counts[150] == 1


def test_calibration_is_on_kept_samples_that_are_no_copies(index):
    nearest = nearest_distinct(index.embeddings, index.kept, index.group)
    assert len(nearest) == 200 and nearest.max() < 0.99
    fitted = index.calibrate(np.array([nearest.min(), np.median(nearest), np.quantile(nearest, 0.99), 1.0]))
    np.testing.assert_allclose(fitted, [0, 0.1, 0.5, 1], atol=1e-4)
    alone = nearest_distinct(index.embeddings, index.kept, np.zeros(300, np.int64))
    assert len(alone) == 0


def built(rows: np.ndarray, **options) -> TrainingIndex:
    names, n = ["x"] * len(rows), len(rows)
    return TrainingIndex.build(rows, names, names, names, np.ones(n, bool), np.arange(n), "layout", **options)


@pytest.mark.parametrize("dimensions", [8, 24])
@pytest.mark.parametrize("share", [0.02, 0.08])
def test_twins_of_other_groups_do_not_calibrate(dimensions, share):
    """Groups that nobody told: an edited copy counts as one by an index with twins as it does by one without."""
    rng = np.random.default_rng(0)
    rows = unit(rng.standard_normal((1000, dimensions)))
    twins = unit(rows[: round(500 * share)] + 1e-3 * rng.standard_normal((round(500 * share), dimensions)))
    clean, mixed = built(rows), built(np.concatenate([rows, twins]))
    at = clean.calibration.cosine[1:4]
    np.testing.assert_allclose(mixed.calibrate(np.array(at)), [0, 0.1, 0.5], atol=0.06)
    nearest = nearest_distinct(rows, np.ones(1000, bool), np.arange(1000))
    assert len(without_twins(nearest)) >= 999  # and a set that has no twins keeps all


def test_what_curation_counts_as_one_image_does_not_calibrate():
    """Kept under captions of their own, near rows may be of two groups."""
    rng = np.random.default_rng(0)
    rows = unit(rng.standard_normal((300, 24)))
    near = unit(rows + 0.05 * rng.standard_normal(rows.shape))  # a near one for every second row of all
    cosines = nearest_distinct(np.concatenate([rows, near]), np.ones(600, bool), np.arange(600), 0.9)
    assert len(cosines) == 600 and cosines.max() < 0.9
    clean, mixed = built(rows, threshold=0.9), built(np.concatenate([rows, near]), threshold=0.9)
    assert mixed.calibrate(0.95) > 0.5
    np.testing.assert_allclose(mixed.calibration.cosine, clean.calibration.cosine, atol=0.06)


def test_calibration_is_monotone_and_alike_in_numpy_and_torch(index):
    cosine = np.linspace(-1, 1, 1001)
    values = index.calibrate(cosine)
    assert (np.diff(values) > 0).all() and values[0] == -1 and values[-1] == 1
    x = torch.tensor(cosine, dtype=torch.float32, requires_grad=True)
    y = index.calibrate(x)
    np.testing.assert_allclose(y.detach().numpy(), values, atol=1e-5)
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert (slope > 0).all()
    np.testing.assert_allclose(index.calibration.inverse()(values), cosine, atol=1e-9)
    assert float(index.calibrate(1.0)) == 1.0


@pytest.mark.parametrize("cosines", [[], [0.3], [0.7] * 50, [1.0] * 50, [-1.0] * 5, [np.nan, 0.2, 0.4]])
def test_calibration_of_odd_samples_stays_monotone(cosines):
    fitted = Calibration.fit(np.array(cosines, np.float32))
    assert (np.diff(fitted(np.linspace(-1, 1, 401))) > 0).all()
    if len(cosines) < 2:
        assert fitted == Calibration()


def test_a_saved_index_is_the_same_and_its_bytes_too(index, tmp_path):
    index.save(tmp_path / "one" / "index")
    index.save(tmp_path / "two")
    files = sorted(path.name for path in (tmp_path / "two").iterdir())
    assert files == ["embeddings.npy", "index.json", "samples.parquet"]
    for name in files:
        assert (tmp_path / "one" / "index" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    loaded = TrainingIndex.load(tmp_path / "one")  # the output folder of dedup
    assert isinstance(loaded.embeddings, np.memmap) and loaded.embeddings.dtype == np.float16
    assert (loaded.embeddings == index.embeddings).all()
    for name in ("captions", "shards", "keys", "embedder", "calibration"):
        assert getattr(loaded, name) == getattr(index, name)
    assert (loaded.kept == index.kept).all() and (loaded.group == index.group).all()
    assert (loaded.search(index.vectors([1]), 5)[1] == index.search(index.vectors([1]), 5)[1]).all()


def test_an_empty_index_loads(tmp_path):
    TrainingIndex.build(np.empty((0, 8), np.float32), [], [], [], [], [], "layout").save(tmp_path)
    similarity, rows = TrainingIndex.load(tmp_path).search(np.ones(8), 3)
    assert similarity.shape == rows.shape == (1, 0)


def test_a_broken_folder_is_refused_by_name(index, tmp_path):
    with pytest.raises(UserError, match="index.json is missing"):
        TrainingIndex.load(tmp_path)
    index.save(tmp_path)
    about = json.loads((tmp_path / "index.json").read_text())

    (tmp_path / "index.json").write_text(json.dumps(about | {"rows": 299}))
    with pytest.raises(UserError, match="does not fit together"):
        TrainingIndex.load(tmp_path)
    (tmp_path / "index.json").write_text(json.dumps(about | {"format": 99}))
    with pytest.raises(UserError, match="format 99"):
        TrainingIndex.load(tmp_path)
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(UserError, match="not an index's description"):
        TrainingIndex.load(tmp_path)
    (tmp_path / "index.json").write_text(json.dumps(about))
    (tmp_path / "embeddings.npy").write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot be read"):
        TrainingIndex.load(tmp_path)
    (tmp_path / "embeddings.npy").unlink()
    with pytest.raises(UserError, match=r"embeddings\.npy is missing"):
        TrainingIndex.load(tmp_path)


def test_columns_must_have_one_length():
    with pytest.raises(ValueError, match="one of each a row"):
        TrainingIndex.build(np.ones((2, 4)), ["x"], ["s"] * 2, ["k"] * 2, [True] * 2, [0, 1], "layout")
