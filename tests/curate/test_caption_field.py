"""Captions in a field of one's own: every step from shards to training and export takes them from there."""

from __future__ import annotations

import json

from curate.check import run_check
from curate.config import CheckConfig, ExportConfig
from curate.dedup import run_dedup
from curate.export import kept_samples, run_export
from curate.reading.writing import write_shard
from curate.results.ledger import read_ledger
from tests.curate.made_mess import settings
from tests.curate.made_sources import encode, picture
from train.finetune.data.scan import scan


def test_a_field_that_is_named_holds_the_caption_from_check_to_export(tmp_path):
    captions = ["a tall tree", "two cups on a table", "the sea at night"]
    samples = [
        (str(number), {"png": encode(picture(number, 64), "PNG"), "txt": b"IMG_0001.jpg",
                       "json": json.dumps({"alt": [caption, f"again {number}"], "caption": "other"}).encode()})
        for number, caption in enumerate(captions)
    ]  # fmt: skip
    write_shard(tmp_path / "in" / "a.tar", samples)
    shards = [str(tmp_path / "in")]
    assert run_check(CheckConfig(shards=shards, caption_field="alt", workers=1))["problems"] == 0
    run_dedup(settings(tmp_path / "in", tmp_path / "out", caption_field="alt"))
    assert [row["caption"] for row in read_ledger(tmp_path / "out").to_pylist()] == captions
    shard_set = scan([str(tmp_path / "out" / "shards")], tmp_path / "samples.arrow", caption_field="alt")
    both = [(caption, f"again {number}") for number, caption in enumerate(captions)]
    assert [shard_set.captions(row) for row in range(3)] == both
    assert [sample.captions for sample, _ in kept_samples(str(tmp_path / "out"))] == both
    run_export(ExportConfig(out=str(tmp_path / "out"), dest=str(tmp_path / "kept"), format="parquet"))

    run_dedup(settings(tmp_path / "in", tmp_path / "out"))  # what was read by another field is read again
    assert {row["caption"] for row in read_ledger(tmp_path / "out").to_pylist()} == {"IMG_0001.jpg"}
