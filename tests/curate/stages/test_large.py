"""What only large sets show, at a small size: text of more than 2 GiB, and crowds of many rows."""

from __future__ import annotations

import dataclasses
import json
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import curate.decisions.parts
from curate.config import DedupConfig
from curate.decisions.rules import decide
from curate.embed.ngrams import NgramEmbedder
from curate.engines.local import LocalEngine
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


def test_decisions_hold_less_than_a_hundred_bytes_a_row(monkeypatch):
    n = 1 << 17  # in groups of four, all of them near one another
    one = np.arange(n) // 4 * 4
    i, j = np.concatenate([np.stack([one[::4] + a, one[::4] + b]) for a in range(4) for b in range(a + 1, 4)], axis=1)
    order = np.lexsort((j, i))
    pairs = Pairs(i[order], j[order], np.full(len(i), 0.95, np.float32))
    captions = pa.array([f"caption {row}" for row in range(n)])
    near = SimpleNamespace(
        image_of=np.arange(n), caption_of=np.arange(n), image_pairs=pairs, caption_pairs=Pairs.empty()
    )
    decide(near, captions)  # loads what it needs
    for name in ("PART", "_LINKS"):
        monkeypatch.setattr(curate.decisions.parts, name, n // 16)
    tracemalloc.start()
    verdicts = decide(near, captions)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most / n < 100 and verdicts.kept.sum() == n // 4
    held = [getattr(verdicts, field.name) for field in dataclasses.fields(verdicts)]
    assert sum(array.nbytes for array in held if isinstance(array, np.ndarray)) <= 21 * n


def test_what_the_join_finds_is_read_from_files(tmp_path):
    rng = np.random.default_rng(0)
    embeddings = np.repeat(rng.standard_normal((100, 16)), 3, axis=0).astype(np.float16)
    n = len(embeddings)
    texts = pa.array([f"{row:064x}" for row in range(n)])
    rows = rows_of({"pixels": texts, "caption": pa.array([f"caption {row // 2}" for row in range(n)])}, embeddings)
    for join, engine in (("exact", None), ("cells", LocalEngine(1)), ("cells", None)):
        for _ in range(2):  # the second time from the cache
            config = DedupConfig(workers=1, recall_sample=10, join=join, min_caption_chars=10)
            found = join_stage(engine, tmp_path, rows, [join], NgramEmbedder(), config)
            assert len(found.image_pairs) == n and len(found.caption_pairs) > 0
            arrays = [found.image_of, found.first, found.caption_of]
            for pairs in (found.image_pairs, found.caption_pairs):
                arrays += [pairs.i, pairs.j, pairs.similarity]
            assert all(isinstance(array.base, np.memmap) for array in arrays)
    assert all(path.suffix == ".parquet" for path in tmp_path.iterdir())


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
    assert {field.name for field in dataclasses.fields(one)} >= {"code", "pooled"}
