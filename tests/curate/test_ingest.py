"""Import turns folders, datasets and parquet files into shards: every image as it came, every row accounted for."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import resource
import signal
import struct
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image

from curate.config import ImportConfig
from curate.console import UsageError, UserError, locked
from curate.images import decode_image, image_format, pixel_hash
from curate.ingest import SCHEMA, run_import
from curate.shards import Sample, read_samples, write_shard
from curate.sources import open_source
from curate.sources.folder import MAX_KEY_BYTES, path_key


def encode(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def picture(number: int, size: int = 8) -> Image.Image:
    pixels = np.random.default_rng(number).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def png(number: int) -> bytes:
    return encode(picture(number), "PNG")


def lay_out(folder: Path, files: dict[str, bytes | str]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def ingest(src: object, out: Path, **settings) -> dict:
    names = [str(one) for one in src] if isinstance(src, list) else [str(src)]
    return run_import(ImportConfig(src=names, out=str(out), **settings))


def samples_of(out: Path) -> list[Sample]:
    items = [item for shard in sorted(out.glob("*.tar")) for item in read_samples(str(shard))]
    assert all(isinstance(item, Sample) for item in items)
    return items


def accounts(out: Path) -> dict[str, tuple[str, str | None]]:
    rows = pq.read_table(out / "import.parquet").to_pylist()
    return {row["source"]: (row["status"], row["reason"]) for row in rows}


def fields(sample: Sample) -> dict:
    return json.loads(sample.members["json"])


def written(out: Path) -> dict[str, str]:
    files = [path for path in sorted(out.rglob("*")) if path.is_file()]
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# ------------------------------------------------------------------------------------------------- a folder


@pytest.fixture
def photos(tmp_path) -> Path:
    """Twelve images in three formats, captioned by txt or json, two folders deep."""
    kinds = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}
    files: dict[str, bytes | str] = {}
    for number in range(12):
        ext = list(kinds)[number % 3]
        stem = f"{'cats' if number % 2 else 'dogs/small'}/{number:03d}"
        files[f"{stem}.{ext}"] = encode(picture(number), kinds[ext])
        if number < 6:
            files[f"{stem}.txt"] = f"caption {number}\n"
        else:
            files[f"{stem}.json"] = json.dumps({"caption": f"caption {number}", "alt": "other", "n": number})
    return lay_out(tmp_path / "photos", files)


def test_images_of_a_folder_keep_their_bytes_and_get_the_captions_beside_them(photos, tmp_path):
    summary = ingest(photos, tmp_path / "out")
    assert (summary["samples"], summary["imported"], summary["skipped"]) == (12, 12, 0)
    assert summary["reasons"] == summary["remarks"] == {}
    samples = samples_of(tmp_path / "out")
    assert [fields(sample)["source"] for sample in samples] == sorted(
        str(path.relative_to(photos)) for path in photos.rglob("*.*") if path.suffix not in (".txt", ".json")
    )
    for sample in samples:
        source = photos / fields(sample)["source"]
        assert sample.image == source.read_bytes()
        assert f".{sample.image_ext}" == source.suffix
        assert sample.caption == f"caption {int(source.stem)}"
        assert sample.key == str(source.relative_to(photos).with_suffix("")).replace("/", "__")
    assert fields(samples[-1]) == {
        "caption": "caption 10", "alt": "other", "n": 10, "source": "dogs/small/010.png"
    }  # fmt: skip


def test_the_caption_is_taken_from_the_field_that_is_named(photos, tmp_path):
    summary = ingest(photos, tmp_path / "out", caption_field="alt")
    captions = [sample.caption for sample in samples_of(tmp_path / "out")]
    assert captions.count("other") == 6 and summary["remarks"] == {}


def test_the_account_has_the_shard_and_key_of_every_sample(photos, tmp_path):
    ingest(photos, tmp_path / "out", samples_per_shard=5)
    table = pq.read_table(tmp_path / "out" / "import.parquet")
    assert table.schema.equals(SCHEMA)
    rows = {(row["shard"], row["key"]): row["source"] for row in table.to_pylist()}
    samples = samples_of(tmp_path / "out")
    assert rows == {(sample.shard, sample.key): fields(sample)["source"] for sample in samples}
    assert {shard for shard, _ in rows} == {"000000.tar", "000001.tar", "000002.tar"}


def test_webdataset_reads_what_is_imported(photos, tmp_path):
    import webdataset

    ingest(photos, tmp_path / "out")
    read = list(webdataset.WebDataset(str(tmp_path / "out" / "000000.tar"), shardshuffle=False))
    assert [sample["txt"].decode().strip() for sample in read[:2]] == ["caption 1", "caption 3"]


def write_metadata(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_metadata_files_caption_images_as_imagefolder_reads_them(suffix, tmp_path):
    names = ["b.png", "deep/a.png", "c.png"]
    src = lay_out(tmp_path / "src", {name: png(number) for number, name in enumerate(names)})
    rows = [{"file_name": name, "text": f"it is, {name}", "licence": "CC0"} for name in names]
    write_metadata(src / f"metadata.{suffix}", rows)
    ingest(src, tmp_path / "out")
    samples = samples_of(tmp_path / "out")
    got = [(fields(sample)["source"], sample.image, sample.caption) for sample in samples]
    assert got == [(name, png(number), f"it is, {name}") for number, name in enumerate(names)]
    assert all(fields(sample)["licence"] == "CC0" for sample in samples)

    import datasets

    theirs = datasets.load_dataset("imagefolder", data_dir=str(src), split="train", streaming=True)
    theirs = list(theirs.cast_column("image", datasets.Image(decode=False)))
    assert [(Path(row["image"]["path"]).read_bytes(), row["text"]) for row in theirs] == [
        (image, caption) for _, image, caption in got
    ]


def test_metadata_lists_what_it_names_in_vain_and_leaves_the_rest_to_other_captions(tmp_path):
    src = lay_out(
        tmp_path / "src",
        {
            **{f"in/{name}.png": png(number) for number, name in enumerate("abcd")},
            "out.png": png(9),
            "out.txt": "beside",
            "in/b.txt": "beside b",
            "in/c.json": '{"caption": "beside c", "n": 1}',
            "in/metadata.jsonl": '{"file_name": "a.png", "text": "a"}\n'
            '{"file_name": "b.png", "text": null}\n'
            '{"file_name": "gone.png", "text": "gone"}\n'
            "not json\n"
            '{"file_name": "../../etc/passwd", "text": "no"}\n'
            '{"text": "of nothing"}\n'
            '{"file_name": "a.png", "text": "a again"}\n'
            '{"file_name": "d.png", "text": 4}\n',
        },
    )
    summary = ingest(src, tmp_path / "out")
    captions = [(fields(sample)["source"], sample.caption) for sample in samples_of(tmp_path / "out")]
    assert captions == [
        ("in/a.png", "a"),
        ("in/b.png", "beside b"),
        ("in/a.png", "a again"),
        ("in/d.png", None),
        ("in/c.png", "beside c"),
        ("out.png", "beside"),
    ]
    assert len({sample.key for sample in samples_of(tmp_path / "out")}) == 6
    skipped = {name: reason for name, (status, reason) in accounts(tmp_path / "out").items() if status == "skipped"}
    assert list(skipped) == [f"in/metadata.jsonl#{row}" for row in (2, 3, 4, 5)]
    assert "'gone.png'" in skipped["in/metadata.jsonl#2"] and "not JSON" in skipped["in/metadata.jsonl#3"]
    assert summary["reasons"] == {"cannot be read": 1, "no image": 3}
    assert accounts(tmp_path / "out")["in/d.png"] == ("imported", "no caption: 'text' holds no text (int)")


@pytest.mark.parametrize(
    ("columns", "settings", "needle"),
    [
        (["file_name", "text", "prompt"], {}, "any of text, prompt may be the captions"),
        (["file_name", "words"], {}, "none of text, caption, prompt may be the captions"),
        (["file_name", "words"], {"text_column": "wrods"}, "no column 'wrods'"),
        (["name", "text"], {}, "no column 'file_name'"),
    ],
)
def test_columns_that_do_not_tell_the_caption_are_bad_usage(columns, settings, needle, tmp_path):
    src = lay_out(tmp_path / "src", {"a.png": png(0)})
    write_metadata(src / "metadata.csv", [dict.fromkeys(columns, "a.png")])
    with pytest.raises(UsageError, match="metadata.csv") as raised:
        ingest(src, tmp_path / "out", **settings)
    assert needle in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_a_caption_column_is_chosen_by_name_or_said_to_be_none(tmp_path):
    src = lay_out(tmp_path / "src", {"a.png": png(0)})
    write_metadata(src / "metadata.csv", [{"file_name": "a.png", "words": "w", "text": "t"}])
    ingest(src, tmp_path / "words", text_column="words")
    ingest(src, tmp_path / "none", text_column="")
    words, none = samples_of(tmp_path / "words")[0], samples_of(tmp_path / "none")[0]
    assert words.caption == "w" and fields(words)["text"] == "t"
    assert none.caption is None and fields(none) == {"words": "w", "text": "t", "source": "a.png"}


def test_the_format_is_told_by_the_first_bytes(tmp_path):
    files = {"a.jpg": png(0), "b": encode(picture(1), "JPEG"), "c.png": "words", "d.JPG": encode(picture(3), "WEBP")}
    ingest(lay_out(tmp_path / "src", files), tmp_path / "out", kind="folder")
    samples = samples_of(tmp_path / "out")
    assert [(fields(s)["source"], s.image_ext) for s in samples] == [("a.jpg", "png"), ("b", "jpg"), ("d.JPG", "webp")]
    status, reason = accounts(tmp_path / "out")["c.png"]
    assert status == "skipped" and reason.startswith("not an image:")


def deep_tiff() -> bytes:
    """A TIFF of one pixel with 16 bits for each of its three colours, which Pillow cannot write."""
    entries = [(256, 3, 1, 1), (257, 3, 1, 1), (258, 3, 3, 134), (262, 3, 1, 2), (273, 4, 1, 140), (277, 3, 1, 3)]
    entries += [(278, 3, 1, 1), (279, 4, 1, 6), (259, 3, 1, 1), (284, 3, 1, 1)]
    directory = b"".join(struct.pack("<HHII", *entry) for entry in sorted(entries))
    head = struct.pack("<2sHIH", b"II", 42, 8, len(entries)) + directory + bytes(4)
    return head + struct.pack("<3H", 16, 16, 16) + struct.pack("<3H", 1, 300, 65535)


@pytest.fixture
def odd_formats() -> dict[str, bytes]:
    """Images that no shard carries; the last three cannot be converted."""
    image = picture(1, 16)
    deep = np.random.default_rng(0).integers(0, 65536, (8, 8), dtype=np.uint16)
    turned = Image.Exif()
    turned[0x0112] = 6
    return {
        "a.gif": encode(image, "GIF", save_all=True, append_images=[picture(2, 16)]),
        "b.bmp": encode(image, "BMP"),
        "c.tiff": encode(image.convert("RGBA"), "TIFF"),
        "d.tiff": encode(Image.fromarray(deep), "TIFF"),
        "e.tiff": encode(image.crop((0, 0, 4, 8)), "TIFF", exif=turned),
        "f.tiff": encode(image.convert("CMYK"), "TIFF"),
        "g.tiff": deep_tiff(),
        "h.jp2": b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(50),
    }


def test_what_no_shard_carries_is_skipped_with_its_reason(odd_formats, tmp_path):
    src = lay_out(tmp_path / "src", {**odd_formats, "good.png": png(0)})
    summary = ingest(src, tmp_path / "out")
    assert (summary["imported"], summary["reasons"]) == (1, {"format": 8})
    assert "--convert" in accounts(tmp_path / "out")["a.gif"][1]


def test_convert_keeps_every_pixel_or_skips(odd_formats, tmp_path):
    summary = ingest(lay_out(tmp_path / "src", odd_formats), tmp_path / "out", convert=True)
    assert summary["imported"] == 5 and summary["reasons"] == {"cannot be converted": 2, "format": 1}
    assert summary["remarks"] == {
        f"converted from {ext}; no caption": n for ext, n in (("bmp", 1), ("gif", 1), ("tiff", 3))
    }
    for sample in samples_of(tmp_path / "out"):
        came = odd_formats[fields(sample)["source"]]
        assert sample.image_ext == "png" and image_format(sample.image) == "png"
        if image_format(came) == "tiff":  # a format that decode_image refuses
            with Image.open(io.BytesIO(came)) as original, Image.open(io.BytesIO(sample.image)) as converted:
                assert np.array_equal(np.asarray(original), np.asarray(converted))
        else:
            assert pixel_hash(decode_image(sample.image)) == pixel_hash(decode_image(came))


def test_no_bad_file_costs_a_good_one(tmp_path):
    src = lay_out(
        tmp_path / "src",
        {
            "a/good.png": png(0),
            "a/good.txt": "good",
            "a/good2.png": png(1),
            "empty.png": b"",
            "broken.json": "{",
            "broken.png": png(2),
            "list.json": "[1]",
            "list.png": png(3),
            "orphan.txt": "of no image",
            "README.md": "# words",
            ".hidden.png": png(4),
            "__MACOSX/good.png": png(5),
        },
    )
    (src / "dangling.png").symlink_to(src / "nowhere.png")
    (src / "linked").symlink_to(src / "a")
    (src / "a" / "loop").symlink_to(src)
    (src / "a" / "self").symlink_to(src / "a")
    os.mkfifo(src / "pipe")
    summary = ingest(src, tmp_path / "out")
    account = accounts(tmp_path / "out")
    imported = {name for name, (status, _) in account.items() if status == "imported"}
    assert imported == {"a/good.png", "a/good2.png", "linked/good.png", "linked/good2.png", "broken.png", "list.png"}
    loops = {f"{folder}/{link}" for folder in ("a", "linked") for link in ("loop", "self")}
    bad = {"empty.png", "orphan.txt", "README.md", "dangling.png", "pipe"}
    assert {name for name in account if name not in imported} == bad | loops
    assert summary["reasons"] == {"cannot be read": 6, "no image": 1, "not an image": 2}
    assert summary["remarks"] == {"no caption": 4}
    assert all("leads back" in account[name][1] for name in loops) and "0 bytes" in account["empty.png"][1]
    assert "broken.json" in account["broken.png"][1]


def test_captions_that_cannot_be_read_travel_and_are_listed(tmp_path):
    latin = "déjà vu".encode("latin-1")
    src = lay_out(
        tmp_path / "src",
        {
            "a.png": png(0), "a.txt": latin,
            "b.png": png(1), "b.txt": b"\xef\xbb\xbf with a mark \n",
            "c.png": png(2), "c.TXT": " \n",
            "d.png": png(3),
            "e.png": png(4), "metadata.csv": b"file_name,text,by\ne.png," + latin + b"," + latin + b"\n",
        },
    )  # fmt: skip
    summary = ingest(src, tmp_path / "out")
    by_source = {fields(sample)["source"]: sample for sample in samples_of(tmp_path / "out")}
    for name in ("a.png", "e.png"):
        assert by_source[name].members["txt"] == latin
        assert by_source[name].caption_problem == "caption is not UTF-8"
        assert accounts(tmp_path / "out")[name] == ("imported", "caption is not UTF-8")
    assert by_source["b.png"].caption == "with a mark"
    assert by_source["c.png"].caption == "" and by_source["d.png"].caption is None
    assert summary["remarks"] == {"caption is not UTF-8": 2, "no caption": 2}

    strict = ingest(src, tmp_path / "strict", require_caption=True)
    assert (strict["imported"], strict["reasons"]) == (1, {"caption is not UTF-8": 2, "no caption": 2})


def test_fields_of_a_source_that_shards_use_themselves_move_aside(tmp_path):
    beside = {"source": "a camera", "caption": 3, "n": float("nan")}
    src = lay_out(tmp_path / "src", {"a.png": png(0), "a.json": json.dumps(beside)})
    ingest(src, tmp_path / "out")
    assert fields(samples_of(tmp_path / "out")[0]) == {
        "source": "a.png",
        "source_": "a camera",
        "caption_": 3,
        "n": None,
    }


def test_keys_of_paths_are_distinct_bounded_and_fit_for_a_tar(tmp_path):
    names = [
        "a/b.png", "a__b.png", "a_b.png", "a_/b.png", "a/_b.png", "a.b.png", "a b.png", "a-b.png", "A/b.png",
        "e\u0301.png", "\u00e9.png", "???.png", "!!!.png", "写真/猫.png", "x" * 200 + ".png", "x" * 201 + ".png",
        "a/b/" * 60 + "c.png", "../up.png", "a\\b.png", "\udcff.png", "\udcfe.png", "a\nb.png",
        path_key("a b.png") + ".png",
    ]  # fmt: skip
    keys = [path_key(name) for name in names]
    assert len(set(keys)) == len(names)
    assert all(len(key.encode()) <= MAX_KEY_BYTES and not set(key) & set("/.\\\n ") for key in keys)
    assert write_shard(tmp_path / "s.tar", ((key, {"png": b"x"}) for key in keys)) == len(names)
    assert [keys[0], keys[7], keys[13]] == ["a__b", "a-b", "写真__猫"]  # what can be told apart stays readable


def test_images_that_differ_in_their_suffix_alone_are_two_samples(tmp_path):
    files = {"a.jpg": encode(picture(0), "JPEG"), "a.png": png(0), "a.txt": "both"}
    names = [b"caf\xe9.png", b"caf\xe8.png"]  # not UTF-8
    src = lay_out(tmp_path / "src", files)
    for number, name in enumerate(names):
        Path(os.fsdecode(os.fsencode(src) + b"/" + name)).write_bytes(png(5 + number))
    ingest(src, tmp_path / "out")
    samples = samples_of(tmp_path / "out")
    assert len({sample.key for sample in samples}) == 4
    assert [sample.caption for sample in samples].count("both") == 2
    assert {fields(sample)["source"] for sample in samples} == {"a.jpg", "a.png", r"caf\udce9.png", r"caf\udce8.png"}


def test_a_folder_at_a_url_is_imported_like_a_local_one(photos, tmp_path):
    (photos / "metadata.jsonl").write_text('{"file_name": "cats/001.png", "text": "named"}\n')
    memory = fsspec.filesystem("memory")
    memory.put(f"{photos}/", "/imports/photos/", recursive=True)
    try:
        ingest("memory://imports/photos", tmp_path / "remote")
    finally:
        memory.rm("/imports", recursive=True)
    ingest(photos, tmp_path / "local")
    remote, local = written(tmp_path / "remote"), written(tmp_path / "local")
    assert remote.pop("run.json") != local.pop("run.json")
    assert remote == local


class Outage(MemoryFileSystem):
    """A store whose connection breaks after a number of files."""

    protocol = "outage"
    files_left = 10**9

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).replace("outage://", "memory://"))

    def _open(self, path, mode="rb", **options):
        if mode == "rb":
            Outage.files_left -= 1
            if Outage.files_left < 0:
                raise ConnectionResetError("connection reset by peer")
        return super()._open(path, mode, **options)


def test_an_outage_stops_the_import_and_costs_no_row(tmp_path):
    fsspec.register_implementation("outage", Outage, clobber=True)
    store = Outage()
    for number in range(9):
        store.pipe(f"/outage/{number}.png", png(number))
    try:
        Outage.files_left = 5
        with pytest.raises(UserError, match="cannot be reached .ConnectionResetError"):
            ingest("outage://outage", tmp_path / "out", samples_per_shard=2)
        assert len(list((tmp_path / "out").glob("*.tar"))) == 2
        Outage.files_left = 5  # of nine, four need no second reading
        summary = ingest("outage://outage", tmp_path / "out", samples_per_shard=2)
    finally:
        store.rm("/outage", recursive=True)
    assert (summary["imported"], summary["skipped"]) == (9, 0)


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
    assert fields(samples[3]) == {"score": 0.5, "when": "1970-01-01 00:00:00.000", "source": "t.parquet#3"}


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
    paths = ["in.png", "../above.png", str(src / "above.png"), "http://localhost/x.png", "gone.png", None]
    pq.write_table(table_of(6, image_path=paths), src / "tables" / "t.parquet")
    summary = ingest(src / "tables" / "t.parquet", tmp_path / "out")
    assert summary["imported"] == 1
    assert summary["reasons"] == {"cannot be read": 1, "no image": 1, "path refused": 3}
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


@pytest.fixture
def dataset():
    """Six rows with an encoded image, a caption, a label and a list."""
    import datasets

    features = {
        "image": datasets.Image(),
        "text": datasets.Value("string"),
        "label": datasets.ClassLabel(names=["a", "b"]),
        "boxes": datasets.List(datasets.Value("int32")),
    }
    columns = {
        "image": [{"bytes": png(number), "path": None} for number in range(6)],
        "text": [f"caption {number}" for number in range(6)],
        "label": [0, 1] * 3,
        "boxes": [[1]] * 6,
    }
    datasets.disable_progress_bars()
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def check_dataset(out: Path, name: str) -> None:
    samples = samples_of(out)
    assert [sample.image for sample in samples] == [png(number) for number in range(6)]
    assert [sample.caption for sample in samples] == [f"caption {number}" for number in range(6)]
    assert fields(samples[1]) == {"label": 1, "source": f"{name}#1"}
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


# ------------------------------------------------------------------------------------------- shards and resume


def test_shards_are_closed_by_count_and_by_bytes(photos, tmp_path):
    ingest(photos, tmp_path / "count", samples_per_shard=5)
    assert [len(list(read_samples(str(shard)))) for shard in sorted((tmp_path / "count").glob("*.tar"))] == [5, 5, 2]
    ingest(photos, tmp_path / "bytes", shard_bytes=8000)
    sizes = [tar_sizes(shard) for shard in sorted((tmp_path / "bytes").glob("*.tar"))]
    assert len(sizes) > 3 and all(sum(of_shard) <= 8000 for of_shard in sizes)
    assert all(sum(of_shard) + following[0] > 8000 for of_shard, following in zip(sizes, sizes[1:], strict=False))
    ingest(photos, tmp_path / "each", shard_bytes=1)
    assert len(list((tmp_path / "each").glob("*.tar"))) == 12


def tar_sizes(shard: Path) -> list[int]:
    """Bytes that each sample takes: of every member a header and its data, in blocks of 512."""
    return [
        sum(512 - len(data) // -512 * 512 for data in sample.members.values()) for sample in read_samples(str(shard))
    ]


def test_the_same_source_gives_the_same_bytes_and_is_not_imported_twice(photos, tmp_path):
    first = ingest(photos, tmp_path / "out", samples_per_shard=5)
    ingest(photos, tmp_path / "again", samples_per_shard=5)
    before = written(tmp_path / "out")
    assert before == written(tmp_path / "again")
    stamp = (tmp_path / "out" / "000000.tar").stat().st_mtime_ns
    second = ingest(photos, tmp_path / "out", samples_per_shard=5)
    assert written(tmp_path / "out") == before and (tmp_path / "out" / "000000.tar").stat().st_mtime_ns == stamp
    assert {**first, "seconds": 0} == {**second, "seconds": 0}


@pytest.mark.parametrize("kind", ["folder", "parquet", "dataset"])
def test_a_killed_import_is_continued_to_the_same_bytes(kind, tmp_path, dataset):
    count = 300
    images, captions = [png(number % 50) for number in range(count)], [f"caption {number}" for number in range(count)]
    images[5] = images[199] = b"no image"
    src = tmp_path / "src"
    if kind == "folder":
        lay_out(src, {f"{number // 100}/{number:04d}.png": data for number, data in enumerate(images)})
        lay_out(src, {f"{number // 100}/{number:04d}.txt": text for number, text in enumerate(captions)})
    else:
        lay_out(src, {})
        src.mkdir()
        table = pa.table({"image": [{"bytes": data, "path": None} for data in images], "text": captions})
        pq.write_table(table, src / "t.parquet", row_group_size=70)
    src = src / "t.parquet" if kind == "parquet" else src
    ingest(src, tmp_path / "whole", samples_per_shard=10)

    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-m", "curate", "import", str(src), str(tmp_path / "out"), "--samples_per_shard", "10"]
    process = subprocess.Popen(command, cwd=root, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "out" / "000003.tar").exists() and time.monotonic() < deadline:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    finished = sorted((tmp_path / "out").glob("*.tar"))
    assert 4 <= len(finished) < 30 and not (tmp_path / "out" / "summary.json").exists()
    stamps = {path: path.stat().st_mtime_ns for path in finished[:-1]}  # the last one's account may be missing
    (tmp_path / "out" / ".tmp-1-000077.tar").write_bytes(b"half")
    ingest(src, tmp_path / "out", samples_per_shard=10)
    assert written(tmp_path / "out") == written(tmp_path / "whole")
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps  # nothing was done twice


def test_a_full_disk_stops_with_a_clear_line_and_is_gone_on_from(photos, tmp_path):
    lay_out(photos, {"zebra.png": encode(picture(0, 300), "PNG"), "zebra.txt": "large"})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # the last shard does not fit
    try:
        with pytest.raises(UserError, match=r"000004.tar cannot be written: .*; make room, and the same command"):
            ingest(photos, tmp_path / "out", samples_per_shard=3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(list((tmp_path / "out").glob("*.tar"))) == 4 and not list((tmp_path / "out").glob(".tmp-*"))
    assert ingest(photos, tmp_path / "out", samples_per_shard=3)["imported"] == 13


def test_another_source_or_setting_is_refused_in_the_same_folder(photos, tmp_path):
    ingest(photos, tmp_path / "out")
    before = written(tmp_path / "out")
    with pytest.raises(UsageError, match="other settings .require_caption"):
        ingest(photos, tmp_path / "out", require_caption=True)
    (photos / "cats" / "001.txt").write_text("CAPTION 1\n")  # as long as it was
    with pytest.raises(UsageError, match="other settings .what the source holds"):
        ingest(photos, tmp_path / "out")
    assert written(tmp_path / "out") == before


def test_two_imports_do_not_write_to_one_folder_at_once(photos, tmp_path):
    ingest(photos, tmp_path / "out")
    (tmp_path / "out" / "work").mkdir()
    with (
        locked(tmp_path / "out", tmp_path / "out" / "work" / "lock"),
        pytest.raises(UserError, match="another run is writing to this folder"),
    ):
        ingest(photos, tmp_path / "out")


def test_bad_usage_is_found_before_anything_is_written(photos, tmp_path):
    lay_out(tmp_path / "foreign", {"thesis.txt": "words"})
    lay_out(tmp_path / "tars", {"a.tar": "words"})
    (tmp_path / "nothing").mkdir()
    for src, out, settings, needle in (
        (photos, photos / "out", {}, "lies in the source"),
        (photos, tmp_path, {}, "holds the source"),
        (photos, tmp_path / "foreign", {}, "thesis.txt"),
        (photos, "memory://out*", {}, "has wildcards"),
        (photos, "nosuch://out", {}, "nosuch"),
        (photos, tmp_path / "out", {"work_dir": "w"}, "work_dir goes with an out at a URL"),
        (photos, tmp_path / "out", {"samples_per_shard": 0}, "samples_per_shard"),
        (photos, tmp_path / "out", {"shard_bytes": 0}, "shard_bytes"),
        (photos, tmp_path / "out", {"split": "train"}, "split and subset are for datasets"),
        ([photos, photos], tmp_path / "out", {}, "only parquet files are imported several at a time"),
        (tmp_path / "no" / "such" / "place", tmp_path / "out", {}, "no such file or folder"),
        (tmp_path / "nothing", tmp_path / "out", {}, "holds no files"),
        (tmp_path / "tars", tmp_path / "out", {}, "tar shards, which need no import"),
        (tmp_path / "tars" / "a.tar", tmp_path / "out", {}, "neither a folder nor a .parquet file"),
        (tmp_path / "*.parquet", tmp_path / "out", {}, "no such parquet file"),
        ("nosuch://x", tmp_path / "out", {}, "nosuch"),
        ("pipe: rm -rf x", tmp_path / "out", {"kind": "parquet"}, "pipe: URLs are refused"),
    ):
        with pytest.raises(UsageError) as raised:
            ingest(src, out, **settings)
        assert needle in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_a_source_without_a_single_image_fails_and_says_why(tmp_path):
    src = lay_out(tmp_path / "src", {"a.txt": "words", "b.png": "words"})
    for _ in range(2):
        with pytest.raises(
            UserError, match="none of the 2 rows can be imported .1 times no image, 1 times not an image"
        ):
            ingest(src, tmp_path / "out")
    assert len(accounts(tmp_path / "out")) == 2 and not list((tmp_path / "out").glob("*.tar"))


def test_the_command_prints_the_summary(photos, run_cli, tmp_path):
    done = run_cli("curate", "import", photos, "out", "--text_column=", "--samples_per_shard", 5, "--json")
    summary = json.loads(done.stdout)
    assert done.returncode == 0 and (summary["imported"], summary["shards"]) == (12, 3)
    assert {"samples", "skipped", "reasons", "bytes", "seconds"} <= set(summary)
    settings = json.loads((tmp_path / "out" / "run.json").read_text())
    assert settings["text_column"] == ""
