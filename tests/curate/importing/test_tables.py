"""Parquet files and Hugging Face datasets become shards: images as they are stored, every row accounted for."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from afresh.errors import UsageError, UserError
from curate.config import ImportConfig
from curate.importing import values as values_module
from curate.importing.sources import open_source
from curate.reading.images import decode_image
from tests.curate.made_sources import accounts, encode, fields, ingest, lay_out, picture, png, samples_of

# ---------------------------------------------------------------------------------------------------- parquet


def table_of(count: int, **columns) -> pa.Table:
    return pa.table({**columns, "caption": [f"caption {number}" for number in range(count)]})


@pytest.mark.parametrize("kind", ["bytes", "struct", "path"])
def test_parquet_holds_images_as_bytes_structs_or_paths(kind, tmp_path):
    images = [png(number) for number in range(10)]
    lay_out(tmp_path / "src" / "images", {f"{number}.png": data for number, data in enumerate(images)})
    paths = [f"images/{number}.png" for number in range(10)]
    column: list = {"bytes": images, "path": paths}.get(kind) or [
        {"bytes": data, "path": None} if number % 2 else {"bytes": None, "path": path}
        for number, (data, path) in enumerate(zip(images, paths, strict=True))
    ]
    table = table_of(10, image=column, score=[0.5] * 10, when=pa.array([0] * 10, pa.timestamp("ms")), other=[[1]] * 10)
    pq.write_table(table, tmp_path / "src" / "t.parquet", row_group_size=3)
    ingest(tmp_path / "src" / "t.parquet", tmp_path / "out")
    samples = samples_of(tmp_path / "out")
    assert [sample.image for sample in samples] == images
    assert [sample.caption for sample in samples] == [f"caption {number}" for number in range(10)]
    assert [sample.key for sample in samples] == [f"{number:09d}" for number in range(10)]
    when = "1970-01-01 00:00:00.000"
    assert fields(samples[3]) == {"score": 0.5, "when": when, "other": [1], "source": "t.parquet#3"}


NESTED = {
    "boxes": ([[1.5, 2.0], [], None], pa.list_(pa.float32())),
    "fixed": ([[1, 2], [3, 4], None], pa.list_(pa.int64(), 2)),
    "deep": ([[[1], [2, 3]], [[]], []], pa.list_(pa.list_(pa.int64()))),
    "size": ([{"w": 1, "of": "a"}, {"w": None, "of": "b"}, None], pa.struct([("w", pa.int64()), ("of", pa.string())])),
    "objects": (
        [[{"label": "cat", "box": [0, 1]}, {"label": None, "box": None}], [], None],
        pa.list_(pa.struct([("label", pa.string()), ("box", pa.list_(pa.int64()))])),
    ),
    "scores": ([{"cat": 0.5}, {}, None], pa.map_(pa.string(), pa.float64())),
    "mask": ([{"path": "m.png"}, {"path": None}, None], pa.struct([("path", pa.string())])),
}


@pytest.mark.parametrize("where", ["parquet", "dataset", "metadata"])
def test_whatever_json_can_hold_reaches_the_json_of_its_sample(where, tmp_path, capsys):
    columns = {name: pa.array(values, kind) for name, (values, kind) in NESTED.items()}
    columns["mask"] = pa.array(
        [{"path": "m.png", "bytes": b"?"}, {"path": None, "bytes": None}, None],
        pa.struct([("path", pa.string()), ("bytes", pa.binary())]),
    )
    if where == "dataset":  # which know no maps
        del columns["scores"]
    columns["raw"] = pa.array([[b"?"]] * 3)
    values_module._say_lost.cache_clear()
    src = tmp_path / "src"
    src.mkdir()
    if where == "metadata":
        lay_out(src, {f"{number}.png": png(number) for number in range(3)})
        columns["file_name"] = pa.array([f"{number}.png" for number in range(3)])
        pq.write_table(table_of(3, **columns), src / "metadata.parquet")
    else:
        pq.write_table(table_of(3, image=[png(number) for number in range(3)], **columns), src / "t.parquet")
    image_column = None if where == "metadata" else "image"
    ingest(src / "t.parquet" if where == "parquet" else src, tmp_path / "out", image_column=image_column)
    for number, sample in enumerate(samples_of(tmp_path / "out")):
        found = fields(sample)
        expected = {name: values[number] for name, (values, _) in NESTED.items() if name in columns}
        assert {name: found[name] for name in expected} == expected
        assert "raw" not in found
    assert "left out, for json holds no bytes: the columns raw" in capsys.readouterr().err


def test_parquet_files_are_found_by_glob_brace_range_folder_and_url(tmp_path):
    tables = tmp_path / "tables"
    tables.mkdir()
    for number in range(3):
        pq.write_table(table_of(2, image=[png(2 * number), png(2 * number + 1)]), tables / f"{number}.parquet")
    memory = fsspec.filesystem("memory")
    memory.put(f"{tables}/", "/tables/", recursive=True)
    sources = [
        [tables / f"{number}.parquet" for number in range(3)],
        tables / "*.parquet",
        tables / "{0..2}.parquet",
        tables,
        "memory://tables/*.parquet",
        "memory://tables",
    ]
    outs = [tmp_path / f"out{number}" for number in range(len(sources))]
    try:
        for src, out in zip(sources, outs, strict=True):
            ingest(src, out, kind="parquet")
    finally:
        memory.rm("/tables", recursive=True)
    shards = {(out / "000000.tar").read_bytes() for out in outs}
    assert len(shards) == 1
    assert [fields(sample)["source"] for sample in samples_of(outs[0])] == [
        f"{n}.parquet#{r}" for n in range(3) for r in (0, 1)
    ]
    assert [sample.image for sample in samples_of(outs[0])] == [png(number) for number in range(6)]


def test_paths_in_a_table_lead_nowhere_else(tmp_path):
    src = lay_out(tmp_path / "src" / "tables", {"in.png": png(0)}).parent
    lay_out(src, {"above.png": png(1)})
    lay_out(src / "tables", {"sub/in.png": png(0)})
    paths = ["in.png", "../above.png", str(src / "above.png"), "http://localhost/x.png", "gone.png", None]
    paths += ["sub\\in.png", "..\\above.png"]  # as Windows writes them
    pq.write_table(table_of(8, image_path=paths), src / "tables" / "t.parquet")
    summary = ingest(src / "tables" / "t.parquet", tmp_path / "out")
    assert summary["imported"] == 2
    assert summary["reasons"] == {"cannot be read": 1, "no image": 1, "path refused": 4}
    wide = ingest(src / "tables" / "t.parquet", tmp_path / "wide", image_root="/")
    assert wide["imported"] == 1 and samples_of(tmp_path / "wide")[0].image == png(1)


def test_a_damaged_row_group_costs_its_own_rows_alone(tmp_path):
    images = [encode(picture(number, 48), "PNG") for number in range(40)]
    pq.write_table(table_of(40, image=images), tmp_path / "a.parquet", row_group_size=10, use_dictionary=False)
    damaged = bytearray((tmp_path / "a.parquet").read_bytes())
    start = pq.read_metadata(tmp_path / "a.parquet").row_group(1).column(0).data_page_offset
    damaged[start : start + 40] = b"\xff" * 40
    (tmp_path / "b.parquet").write_bytes(damaged)
    (tmp_path / "c.parquet").write_bytes(damaged[:5000])
    sources = [tmp_path / f"{name}.parquet" for name in "abc"]
    summary = ingest(sources, tmp_path / "out")
    assert (summary["samples"], summary["imported"], summary["reasons"]) == (81, 70, {"cannot be read": 11})
    skipped = [name for name, (status, _) in accounts(tmp_path / "out").items() if status == "skipped"]
    assert skipped == [*(f"b.parquet#{row}" for row in range(10, 20)), "c.parquet"]
    assert len({sample.key for sample in samples_of(tmp_path / "out")}) == 70
    source = open_source(ImportConfig(src=[str(path) for path in sources]))
    rows = [(row.source, row.key) for row in source.rows()]
    for start in (0, 15, 40, 45, 55, 79, 80, 81):
        assert [(row.source, row.key) for row in source.rows(start)] == rows[start:]
    with pytest.raises(UserError, match="c.parquet: cannot be read"):
        ingest(tmp_path / "c.parquet", tmp_path / "none")


def test_a_table_larger_than_memory_is_read_a_few_rows_at_a_time(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (300, 100_000), dtype=np.uint8)
    images = [png(0) + row.tobytes() for row in noise]
    table, small_pages = table_of(300, image=images), {"use_dictionary": False, "write_batch_size": 8}
    pq.write_table(table, tmp_path / "t.parquet", compression="none", **small_pages)
    del images, noise, table
    source = open_source(ImportConfig(src=[str(tmp_path / "t.parquet")]))
    before, most = pa.total_allocated_bytes(), 0
    tracemalloc.start()  # what is read goes through Python's memory, what is decoded through Arrow's
    try:
        for row in source.rows():
            row.read()
            most = max(most, pa.total_allocated_bytes() - before)
        most += tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert 3_000_000 < most < 20_000_000  # of 30 MB in one row group


@pytest.mark.parametrize(
    ("columns", "needle"),
    [
        ({"a": [b"1"], "b": [b"2"], "text": ["t"]}, "any of a, b may be the images"),
        ({"words": ["w"], "text": ["t"]}, "no column looks like images"),
        ({"image": [b"1"]}, "none of text, caption, prompt"),
    ],
)
def test_a_table_must_tell_its_columns(columns, needle, tmp_path):
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    with pytest.raises(UsageError, match="t.parquet") as raised:
        ingest(tmp_path / "t.parquet", tmp_path / "out")
    assert needle in str(raised.value)


def test_text_of_a_table_that_is_not_utf8_costs_nothing(tmp_path):
    offsets, data = np.array([0, 2, 4], np.int32), b"ok\xff\xfe"
    texts = pa.Array.from_buffers(pa.string(), 2, [None, pa.py_buffer(offsets), pa.py_buffer(data)])
    pq.write_table(pa.table({"image": [png(0), png(1)], "text": texts, "by": texts}), tmp_path / "t.parquet")
    summary = ingest(tmp_path / "t.parquet", tmp_path / "out")
    good, bad = samples_of(tmp_path / "out")
    assert good.caption == "ok" and bad.members["txt"] == b"\xff\xfe"
    assert summary["remarks"] == {"caption is not UTF-8": 1}
    assert fields(good)["by"] == "ok" and fields(bad)["by"] == "\udcff\udcfe"


def test_of_several_captions_the_first_counts_and_all_travel(tmp_path):
    table = pa.table({"image": [png(0), png(1)], "text": [["one", "two"], []]})
    pq.write_table(table, tmp_path / "t.parquet")
    ingest(tmp_path / "t.parquet", tmp_path / "out")
    several, none = samples_of(tmp_path / "out")
    assert several.caption == "one" and fields(several)["text"] == ["one", "two"]
    assert none.caption is None


# --------------------------------------------------------------------------------------------------- datasets


def check_dataset(out: Path, name: str) -> None:
    samples = samples_of(out)
    assert [sample.image for sample in samples] == [png(number) for number in range(6)]
    assert [sample.caption for sample in samples] == [f"caption {number}" for number in range(6)]
    assert fields(samples[1]) == {"label": 1, "boxes": [1], "source": f"{name}#1"}
    assert [sample.key for sample in samples] == [f"{number:09d}" for number in range(6)]


def test_a_saved_dataset_is_imported_with_its_stored_bytes(dataset, tmp_path):
    dataset.save_to_disk(str(tmp_path / "saved"))
    ingest(tmp_path / "saved", tmp_path / "out")
    check_dataset(tmp_path / "out", "saved")


def test_of_several_splits_one_is_named(dataset, tmp_path):
    import datasets

    both = datasets.DatasetDict({"train": dataset, "test": dataset.select([0])})
    both.save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(UsageError, match="has train, test; name one of them"):
        ingest(tmp_path / "saved", tmp_path / "out")
    with pytest.raises(UsageError, match="got val"):
        ingest(tmp_path / "saved", tmp_path / "out", split="val")
    ingest(tmp_path / "saved", tmp_path / "out", split="train")
    check_dataset(tmp_path / "out", "train")


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_a_folder_of_tables_is_streamed_by_its_splits(dataset, suffix, tmp_path, monkeypatch):
    data = tmp_path / "set" / "data"
    data.mkdir(parents=True)
    for split, part in (("train", dataset), ("test", dataset.select([0]))):
        if suffix == "parquet":
            part.to_parquet(str(data / f"{split}-00000-of-00001.parquet"))
        else:
            part.save_to_disk(str(tmp_path / "saved" / split))
            (tmp_path / "saved" / split / "data-00000-of-00001.arrow").rename(data / f"{split}-00000.arrow")
    ingest(tmp_path / "set", tmp_path / "out", split="train", samples_per_shard=2)
    check_dataset(tmp_path / "out", "train")


def test_a_dataset_of_paths_or_arrays_is_imported(tmp_path):
    import datasets

    lay_out(tmp_path / "images", {"0.png": png(0)})
    paths = datasets.Dataset.from_dict({"image": [str(tmp_path / "images" / "0.png")], "text": ["a"]})
    (tmp_path / "paths").mkdir()
    paths.cast_column("image", datasets.Image()).to_parquet(str(tmp_path / "paths" / "t.parquet"))
    ingest(tmp_path / "paths", tmp_path / "out")
    assert samples_of(tmp_path / "out")[0].image == png(0)

    arrays = [np.asarray(picture(number)) for number in range(3)]
    features = {"pixels": datasets.Array3D((8, 8, 3), "uint8"), "text": datasets.Value("string")}
    stored = datasets.Dataset.from_dict({"pixels": arrays, "text": ["a"] * 3}, features=datasets.Features(features))
    stored.save_to_disk(str(tmp_path / "arrays"))
    ingest(tmp_path / "arrays", tmp_path / "pixels", image_column="pixels")
    decoded = [np.asarray(decode_image(sample.image)) for sample in samples_of(tmp_path / "pixels")]
    assert all(np.array_equal(one, other) for one, other in zip(decoded, arrays, strict=True))


def test_a_hub_name_without_a_network_is_one_clear_line(run_cli, tmp_path):
    done = run_cli("curate", "import", "owner/name", "out")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith(
        "error: src: owner/name: no such folder here, and no dataset of this name"
    )
    assert len([line for line in done.stderr.splitlines() if line.startswith("error")]) == 1
    assert not (tmp_path / "out").exists()
