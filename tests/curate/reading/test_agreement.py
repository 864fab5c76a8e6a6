"""``curate check``, ``curate dedup`` and ``train finetune`` agree on every sample of a table of odd ones."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from curate.check import USABLE, run_check
from curate.config import CheckConfig
from curate.dedup import run_dedup
from curate.results.ledger import read_ledger
from tests.curate.made_mess import settings
from tests.curate.reading.odd_archives import ODD
from train.finetune.config import Augmentation
from train.finetune.data.images import ImageLoader, SampleError
from train.finetune.data.scan import scan


def file_of(name: str) -> str:
    return f"{list(ODD).index(name):03d}-{re.sub(r'[^A-Za-z0-9]+', '-', name)}.tar"


@pytest.fixture(scope="module")
def readers(tmp_path_factory) -> dict[str, Counter]:
    """``(shard, key)`` of what each of them can use, and how often; the same sizes and captions for all."""
    folder = tmp_path_factory.mktemp("odd")
    for name, odd in ODD.items():
        (folder / "in" / file_of(name)).parent.mkdir(exist_ok=True)
        (folder / "in" / file_of(name)).write_bytes(odd.data)
    run_dedup(settings(folder / "in", folder / "out"))
    ledger = read_ledger(folder / "out").to_pylist()
    curated = Counter((row["shard"], row["key"]) for row in ledger if row["status"] != "unreadable")

    checked = run_check(CheckConfig(shards=[str(folder / "in")], workers=1, list_at_most=None))
    bad = {(row["shard"], row["key"], row["kind"]) for row in checked["listed"] if row["kind"] not in USABLE}
    lost = Counter({(shard, key) for shard, key, _ in bad if key})
    everything = Counter((row["shard"], row["key"]) for row in ledger if row["key"])
    assert checked["readable"] == curated.total() and checked["samples"] == len(ledger)

    shard_set = scan([str(folder / "in")], folder / "samples.arrow")
    ledger = [row for row in ledger if row["status"] != "unreadable"]
    seen = {(row["shard"], row["key"]): (row["width"], row["height"], row["caption"]) for row in ledger}
    loader = ImageLoader(shard_set, [(16, 16)], "center", Augmentation(), seed=0)
    trained = Counter(trained_on(loader, Path(folder)))
    for row, name in enumerate(shard_set.ids):
        if name in trained and trained[name] == 1:
            size = (shard_set.value(row, "width"), shard_set.value(row, "height"))
            assert (*size, shard_set.captions(row)[0]) == (*seen[name][:2], seen[name][2] or ""), name
    return {"check": everything - lost, "dedup": curated, "finetune": trained}


def trained_on(loader: ImageLoader, folder: Path) -> list[tuple[str, str]]:
    """Samples of which training gets pixels and captions."""
    found = []
    for row in range(len(loader.shard_set)):
        try:
            pixels = loader.load(row, 0)
        except SampleError:
            continue
        assert pixels.shape == (3, 16, 16) and all(isinstance(text, str) for text in loader.shard_set.captions(row))
        found.append(loader.shard_set.identity(row))
    return found


@pytest.mark.parametrize("name", ODD)
def test_all_readers_take_the_same_samples(readers, name):
    found = {who: sorted(Counter({k: n for (s, k), n in of.items() if s == file_of(name)}).elements())
             for who, of in readers.items()}  # fmt: skip
    assert found == dict.fromkeys(found, sorted(ODD[name].usable))


def test_there_are_many_of_them():
    assert len(ODD) >= 80 and len({odd.data for odd in ODD.values()}) == len(ODD)
