"""What only large sets show, at a small size: text of more than 2 GiB, and crowds of many rows."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from curate.config import DedupConfig
from curate.decisions.rules import decide
from curate.embed.ngrams import NgramEmbedder
from curate.neighbors.verify import Pairs
from curate.stages.join import join_stage
from curate.stages.publish import ledger_parts
from curate.stages.rows import READ_COLUMNS, Rows


def rows_of(columns: dict, embeddings: np.ndarray) -> Rows:
    n = len(embeddings)
    arrays = [columns.get(name, pa.nulls(n, kind)) for name, kind in READ_COLUMNS]
    table = pa.table(arrays, schema=pa.schema(READ_COLUMNS))
    return Rows(table, np.array([0, n]), np.arange(n), embeddings)


def test_a_ledger_of_more_than_two_gibibytes_of_keys():
    n, together = 2400, 8  # pieces of 8 MiB, all of which are one piece of memory
    piece = pa.array([f"{number}" + "k" * (1 << 20) for number in range(together)])
    keys = pa.chunked_array([piece] * (n // together))
    texts = {name: pa.array([f"{name} {row}" for row in range(n)]) for name in ("shard", "sha256", "caption")}
    rows = rows_of({"key": keys, **texts}, np.zeros((n, 2), np.float16))
    image_of = np.repeat(np.arange(n // 2), 2)  # of two rows each
    near = SimpleNamespace(
        image_of=image_of, caption_of=np.arange(n), image_pairs=Pairs.empty(), caption_pairs=Pairs.empty()
    )
    verdicts = decide(near, rows.captions)
    first = next(ledger_parts(rows, verdicts, None))
    assert first["kept_shard"].to_pylist() == [None if row % 2 == 0 else f"shard {row - 1}" for row in range(n)]
    kept = first["kept_key"].slice(1, 1)[0].as_py()
    assert kept == "0" + "k" * (1 << 20)


def test_a_crowd_is_kept_in_rows_and_not_in_the_footer(tmp_path):
    n = 400
    rng = np.random.default_rng(0)
    embeddings = (np.eye(1, 16) + 0.01 * rng.standard_normal((n, 16))).astype(np.float16)
    texts = pa.array([f"{row:064x}" for row in range(n)])
    rows = rows_of({"pixels": texts, "caption": pa.array(["the same"] * n)}, embeddings)
    config = DedupConfig(workers=1, recall_sample=10)
    found, again = (join_stage(None, tmp_path, rows, ["key"], NgramEmbedder(), config) for _ in range(2))
    assert found.image_pairs.crowd is not None and len(found.image_pairs.crowd.rows) > 300
    assert again.image_pairs.crowd.rows.tolist() == found.image_pairs.crowd.rows.tolist()
    for name in ("i", "j", "similarity"):
        assert np.array_equal(getattr(again.image_pairs, name), getattr(found.image_pairs, name))
    table = pq.read_table(found.caches[0])
    assert table["j"].null_count == len(found.image_pairs.crowd.rows)
    assert sum(map(len, table.schema.metadata.values())) < 100
    options = {"captions": rows.captions, "threshold": 0.9}
    one, two = (decide(joined, **options) for joined in (found, again))
    assert one.kept.sum() == 1 and json.dumps(one.kept.tolist()) == json.dumps(two.kept.tolist())
    assert {field.name for field in dataclasses.fields(one)} >= {"kept", "pooled"}
