"""Search finds the nearest samples of a curation by image or caption."""

from __future__ import annotations

import pytest

from afresh.errors import UsageError, UserError
from curate.config import SearchConfig
from curate.reading.samples import read_samples
from curate.search import run_search


def test_search_finds_an_image_and_a_caption(curated, mess, tmp_path):
    out, summary = curated
    sample = next(iter(read_samples(str(mess / "a.tar"))))
    (tmp_path / "query.webp").write_bytes(sample.image)
    found = run_search(SearchConfig(out=str(out), image=str(tmp_path / "query.webp"), k=4))
    assert found["samples"] == summary["kept"] + summary["dropped"]
    similarities = [row["similarity"] for row in found["nearest"]]
    assert len(similarities) == 4 and similarities == sorted(similarities, reverse=True)
    assert similarities[0] > 0.99
    by_caption = run_search(SearchConfig(out=str(out), caption="  OTHER   07 ", k=1))
    assert by_caption["nearest"][0]["key"] == "other07"


@pytest.mark.parametrize(
    ("changes", "error"),
    [({}, UsageError), ({"image": "x", "caption": "y"}, UsageError), ({"image": "nowhere.png"}, UserError)],
)
def test_search_says_what_is_wrong(curated, changes, error):
    with pytest.raises(error, match="image"):
        run_search(SearchConfig(out=str(curated[0]), **changes))
