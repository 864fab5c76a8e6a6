"""What a kept sample tells of its dropped copies adds up, in one curation or in several, one after the other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from curate.dedup import run_dedup
from curate.reading.samples import Sample
from curate.reading.writing import write_shard
from curate.results.ledger import read_ledger
from curate.sample_set import load_part
from curate.stages.accounts import added_to, duplicates_of
from curate.stages.write import with_account
from tests.curate.made_mess import everything, settings


def curate(tmp_path: Path, name: str, samples: dict[str, dict[str, bytes]], *before: Path) -> Path:
    """A shard of ``samples``, curated together with what earlier curations kept; the folder of the kept."""
    write_shard(tmp_path / name / "new.tar", samples.items())
    shards = [str(folder) for folder in before] + [str(tmp_path / name)]
    run_dedup(settings(tmp_path, tmp_path / f"{name}-out", shards=shards))
    return tmp_path / f"{name}-out" / "shards"


def kept(shards: Path) -> dict[str, Sample]:
    return {key: sample for (_, key), sample in everything(shards).items()}


@pytest.fixture
def image() -> bytes:
    return load_part("held_out")[0].image


def test_a_second_curation_keeps_the_first_ones_account_byte_for_byte(tmp_path, image):
    first = curate(tmp_path, "first", {
        "a": {"png": image, "txt": b"the caption that is longest"}, "b": {"png": image, "txt": b"another one"}
    })  # fmt: skip
    assert kept(first)["a"].account == {"duplicates": 1, "captions": ["another one"]}
    run_dedup(settings(first, tmp_path / "again"))
    assert kept(tmp_path / "again" / "shards")["a"].members == kept(first)["a"].members


def test_copies_in_turn_give_the_account_of_copies_at_once(tmp_path, image):
    captions = [
        "the caption that is longest",
        "the first of others",
        "the first of others",
        "one more of them",
        "the last",
    ]
    copies = {f"s{n}": {"png": image, "txt": text.encode()} for n, text in enumerate(captions)}
    at_once = curate(tmp_path, "once", copies)
    folder = curate(tmp_path, "turn0", {"s0": copies["s0"], "s1": copies["s1"]})
    for n in (2, 3, 4):
        folder = curate(tmp_path, f"turn{n - 1}", {f"s{n}": copies[f"s{n}"]}, folder)
    one, other = (kept(shards)["s0"].account for shards in (at_once, folder))
    assert one == other == {"duplicates": 4, "captions": ["the first of others", "one more of them", "the last"]}


def test_a_dropped_copy_hands_on_what_it_stood_for(tmp_path, image):
    """The copy that stood for two others is dropped for a better one: three captions stay, and three copies count."""
    better = {"png": image, "txt": b"the very longest caption, which decides who stays"}
    small = {"a": {"png": image, "txt": b"the first caption"}, "b": {"png": image, "txt": b"second"}}
    before = curate(tmp_path, "first", small | {"c": {"png": image, "txt": b"third"}})
    after = kept(curate(tmp_path, "second", {"z": better}, before))
    assert after["z"].account == {"duplicates": 3, "captions": ["the first caption", "second", "third"]}
    assert set(after) == {"z"}


def test_a_copy_under_the_same_caption_hands_on_its_others_too(tmp_path, image):
    with_others = {
        "png": image,
        "txt": b"one caption",
        "json": b'{"afresh": {"duplicates": 2, "captions": ["x", "y"]}}',
    }
    folder = curate(tmp_path, "set", {"a": {"png": image, "txt": b"one caption"}, "b": with_others})
    assert kept(folder)["a"].account == {"duplicates": 3, "captions": ["x", "y"]}
    assert read_ledger(folder.parent)["reason"].to_pylist() == [None, "exact_image"]


def test_what_is_dropped_for_its_caption_alone_is_no_copy(tmp_path):
    one, other = (sample.image for sample in load_part("held_out")[:2])
    alike = {"txt": b"one caption"}
    write_shard(tmp_path / "s.tar", [("a", {"png": one, **alike}), ("b", {"png": other, **alike})])
    run_dedup(settings(tmp_path / "s.tar", tmp_path / "out", max_per_caption=1))
    assert read_ledger(tmp_path / "out")["reason"].to_pylist() == [None, "caption_quota"]
    assert kept(tmp_path / "out" / "shards")["a"].account == {}


@pytest.mark.parametrize("number", [None, -1, True, 1.5, "3", 10**30, [1]])
def test_an_account_that_says_nothing_of_use_counts_as_none(number):
    assert duplicates_of({"duplicates": number}) == 0
    sample = Sample("s", "a", {"jpg": b"", "json": json.dumps({"afresh": {"duplicates": number, "by": "me"}}).encode()})
    assert added_to(sample, 2, ["a"]) == {"duplicates": 2, "captions": ["a"], "by": "me"}


def test_an_account_beside_the_json_is_the_one_that_grows_and_somebody_elses_field_stays():
    account = {"duplicates": 2, "captions": ["a"]}
    grown = with_account({"jpg": b"1", "json": b"[1]", "AFRESH.json": b"{}"}, account)
    assert list(grown) == ["jpg", "json", "AFRESH.json"] and json.loads(grown["AFRESH.json"]) == account
    foreign = with_account({"jpg": b"1", "json": b'{"afresh": "v1"}'}, account)
    assert foreign["json"] == b'{"afresh": "v1"}' and Sample("s", "a", foreign).account == account
