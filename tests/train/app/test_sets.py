"""The tab Set: what stands in a curation, and a review that the next one reads."""

from __future__ import annotations

import pytest

from afresh.errors import UsageError, UserError
from curate.config import DedupConfig
from curate.dedup import run_dedup
from curate.results.ledger import DROPPED, KEPT, read_ledger
from tests.train.app.hostile import CAPTIONS, encoded, picked
from train.app.pictures import Pictures
from train.app.review import Review
from train.app.sets import CuratedSet


@pytest.fixture(scope="module")
def whole(curated) -> CuratedSet:
    out, shards = curated
    return CuratedSet(str(out), Pictures(str(out), [shards]))


def test_groups_stand_by_size_with_the_kept_sample_first(whole):
    assert len(whole.groups) == len(CAPTIONS)
    for group in whole.page(1):
        assert [one["status"] for one in group] == [KEPT, DROPPED, DROPPED]
        assert {one["group_size"] for one in group} == {3}
    assert whole.page(999) == whole.page(whole.pages) and whole.page(-5) == whole.page(1)


def test_a_search_by_text_and_by_image_finds_the_sample(whole, emoji, tmp_path):
    found = whole.by_text(picked(emoji)[10][1])
    assert found[0]["key"] == "010-0" and found[0]["similarity"] == pytest.approx(1)
    (tmp_path / "some.png").write_bytes(encoded(picked(emoji)[10][0]))
    by_image = whole.by_image(str(tmp_path / "some.png"))
    assert by_image[0]["key"] == "010-0" and by_image[0]["similarity"] > by_image[1]["similarity"]
    with pytest.raises(UsageError):
        whole.by_text("  ")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    with pytest.raises(UserError, match="broken.png"):
        whole.by_image(str(tmp_path / "broken.png"))


def test_why_names_the_grounds_and_what_stands_for_it(whole):
    dropped = next(one for group in whole.page(1) for one in group if one["status"] == DROPPED)
    found = whole.why(dropped["row"])
    assert found["instead"]["key"] == dropped["kept_key"] and found["instead"]["status"] == KEPT
    text = " ".join(found["lines"])
    assert f"{dropped['image_similarity']:.3f}" in text and "0.97 on" in text and dropped["kept_key"] in text
    (line,) = whole.why(found["instead"]["row"])["lines"]
    assert "2 more" in line
    with pytest.raises(UsageError):
        whole.why(10**9)


def test_images_come_from_the_input_or_from_what_was_written(curated, whole):
    out, _ = curated
    bare = Pictures(str(out))
    for row in read_ledger(out, ["shard", "key", "status", "width", "height"]).to_pylist():
        image = whole.pictures.image(row["shard"], row["key"])
        assert image is not None and image.size == (row["width"], row["height"])
        alone = bare.image(row["shard"], row["key"])
        if row["status"] == KEPT:
            assert alone is not None and alone.tobytes() == image.tobytes(), row
    assert bare.image("000000.tar", "nobody") is None


def test_a_review_is_two_lists_that_the_next_curation_reads(curated, whole, tmp_path):
    _, shards = curated
    (kept, dropped, *_), (other, *_) = whole.page(1)[:2]
    review = Review(tmp_path / "review")
    assert review.command([shards], "runs/c") == ""
    for one, decision in ((dropped, "keep"), (kept, "exclude"), (other, "exclude")):
        review.decide((one["shard"], one["key"]), decision)
    review.decide((other["shard"], other["key"]), None)
    again = Review(tmp_path / "review")  # as another page would find it
    assert again.decided == review.decided and len(again.decided) == 2
    command = again.command([shards], "runs/c")
    assert f"--keep {again.path('keep')} --exclude {again.path('exclude')}" in command and "runs/c-reviewed" in command
    out = tmp_path / "reviewed"
    lists = {"keep": str(again.path("keep")), "exclude": str(again.path("exclude"))}
    run_dedup(DedupConfig([shards], str(out), image_embedder="copy-detector", threshold=0.97, workers=1, **lists))
    status = {row["key"]: (row["status"], row["reason"]) for row in read_ledger(out).to_pylist()}
    assert status[dropped["key"]] == (KEPT, None) and status[kept["key"]] == (DROPPED, "excluded")
    assert status[other["key"]] == (KEPT, None)


def test_a_sample_is_never_in_both_lists_and_an_emptied_list_is_empty(tmp_path):
    review = Review(tmp_path)
    review.decide(("s.tar", "a"), "keep")
    review.decide(("s.tar", "a"), "exclude")
    assert review.path("keep").read_text() == "" and review.path("exclude").read_text() == "s.tar\ta\n"


def test_a_key_that_a_list_cannot_hold_leaves_the_review_as_it_was(tmp_path):
    review = Review(tmp_path)
    review.decide(("s.tar", "a"), "keep")
    with pytest.raises(UserError, match="tab or line end"):
        review.decide(("s.tar", "a\tb"), "keep")
    assert Review(tmp_path).decided == review.decided == {("s.tar", "a"): "keep"}
