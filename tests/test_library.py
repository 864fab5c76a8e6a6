"""The page on the library does what it says."""

from __future__ import annotations

import itertools

from PIL import Image

from curate.reading.images import decode_image
from curate.reading.samples import Sample, read_samples
from curate.reading.writing import write_shard
from curate.results.ledger import read_ledger
from tests.documents import run_page


def test_the_page_on_the_library_does_what_it_says(sample_shards, tmp_path, monkeypatch, capsys):
    samples = [item for url in sample_shards for item in read_samples(url) if isinstance(item, Sample)][::200]
    apple, castle, tree = (decode_image(sample.image) for sample in itertools.islice(samples, 3))
    (tmp_path / "photos" / "trip").mkdir(parents=True)
    apple.save(tmp_path / "photos" / "apple.png")
    apple.save(tmp_path / "photos" / "trip" / "apple 1.png", compress_level=1)
    castle.save(tmp_path / "photos" / "castle.png")
    castle.resize((castle.width // 2, castle.height // 2), Image.Resampling.LANCZOS).save(
        tmp_path / "photos" / "trip" / "castle.png"
    )
    tree.save(tmp_path / "photos" / "tree.png")
    (tmp_path / "photos" / "torn.png").write_bytes(b"\0" * 100)
    (tmp_path / "out" / "shards").mkdir(parents=True)
    write_shard(tmp_path / "out" / "shards" / "000000.tar", ((one.key, one.members) for one in samples))
    monkeypatch.chdir(tmp_path)
    assert run_page("library.md") == 6
    reasons = read_ledger(tmp_path / "curated", ["reason"])["reason"].to_pylist()
    assert set(reasons) == {None, "filter:my_steps:described"}
