"""Views of an index: the kept images as other embedders see them, made once, on a scale of their own."""

from pathlib import Path

import numpy as np
import pytest

from afresh.errors import UserError
from curate.config import DedupConfig
from curate.dedup import run_dedup
from curate.embed.registry import load_embedder
from curate.index.calibration import Calibration
from curate.index.training_index import TrainingIndex
from curate.reading.writing import write_shard
from curate.sample_set import load_part
from curate.stages.views import build_views, kept_images, strict, views_of


@pytest.fixture(scope="module")
def curated(tmp_path_factory) -> Path:
    """Twenty images, three of them twice."""
    folder = tmp_path_factory.mktemp("views")
    samples = [(s.key, dict(s.members)) for s in load_part("finetune")[:20]]
    samples += [(f"{key}-again", members) for key, members in samples[:3]]
    write_shard(str(folder / "raw" / "000000.tar"), samples)
    run_dedup(DedupConfig(shards=[str(folder / "raw")], out=str(folder / "out"), workers=1))
    return folder / "out"


def test_each_view_holds_the_kept_images_and_is_made_once(curated):
    index = TrainingIndex.load(curated)
    views = views_of(str(curated), index)
    assert [embedder.name for _, embedder in views] == ["copy-detector", "luminance", "edges", "chroma"]
    images = dict(kept_images(curated))
    for view, embedder in views:
        assert len(view) == 20 and set(view.keys) == set(images) and view.embedder_digest == embedder.digest
        assert list(view.captions) == [index.captions[row] for row in np.flatnonzero(index.kept)]
        vectors = embedder.embed([images[key] for key in view.keys])
        seen = np.linalg.norm(vectors, axis=1) > 0.9  # a grey image has no chroma
        assert seen.sum() > 15 and (embedder.name == "chroma" or seen.all())
        vectors = vectors[seen]
        assert ((vectors * view.vectors(np.flatnonzero(seen))).sum(1) > 0.95).all()  # a row is its own image's
        cosine, _ = view.search(vectors, 1)
        assert (view.calibrate(cosine[:, 0]) > 0.5).all()
    made = {path: path.stat().st_mtime_ns for path in (curated / "views").rglob("*") if path.is_file()}
    views_of(str(curated / "index"), index)
    assert made == {path: path.stat().st_mtime_ns for path in (curated / "views").rglob("*") if path.is_file()}


def test_an_index_without_its_shards_has_none_and_other_shards_are_refused(curated, tmp_path):
    index = TrainingIndex.load(curated)
    index.save(tmp_path / "index")
    assert views_of(str(tmp_path), index) == []
    with pytest.raises(UserError, match="20 kept rows, but its shards 19 images"):
        build_views(index, iter(list(kept_images(curated))[1:]), [load_embedder("luminance")])
    with pytest.raises(UserError, match="20 kept rows, but its shards 20 images, or others"):
        build_views(index, iter(list(kept_images(curated))[::-1]), [load_embedder("luminance")])


def test_look_alikes_do_not_move_the_similarity_at_which_a_copy_begins():
    """Distances to the nearest of many follow Weibull's law; three of a hundred rows are look-alikes."""
    rng = np.random.default_rng(0)
    cosines = 1 - 0.4 * rng.weibull(6.0, 300)
    expected = 1 - 0.4 * (-np.log1p(-0.01)) ** (1 / 6)
    assert strict(cosines).cosine[3] == pytest.approx(expected, abs=0.05)
    twins = np.concatenate([cosines, np.full(9, 0.999)])
    assert strict(twins).cosine[3] == pytest.approx(expected, abs=0.05)
    assert Calibration.fit(twins).cosine[3] > 0.95  # where a copy of another contrast would be none
    assert strict(cosines[:1]) == Calibration()
