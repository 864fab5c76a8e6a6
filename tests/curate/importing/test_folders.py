"""A folder of images becomes shards: captions from the files beside them, and every file accounted for."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import struct
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image

from afresh.errors import UsageError, UserError
from curate.importing.folders import MAX_KEY_BYTES, path_key
from curate.ingest import SCHEMA
from curate.reading.images import decode_image, image_format, pixel_hash
from curate.reading.writing import write_shard
from tests.curate.made_sources import accounts, encode, fields, ingest, lay_out, picture, png, samples_of, written


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


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENOMEM, errno.EIO])
def test_what_the_machine_lacks_ends_the_import_and_costs_no_row(photos, tmp_path, monkeypatch, number):
    def fail(path, mode):
        if path.endswith("003.jpg"):
            raise OSError(number, os.strerror(number))
        return open(path, mode)

    said = f"003.jpg cannot be reached.*{os.strerror(number)}"
    with monkeypatch.context() as patch, pytest.raises(UserError, match=said):
        patch.setattr("curate.importing.rows.open", fail, raising=False)
        ingest(photos, tmp_path / "out")
    assert ingest(photos, tmp_path / "out")["imported"] == 12


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


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_lines_of_metadata_end_where_their_format_says_so(suffix, encoding, tmp_path):
    odd = "a\u2028b\x85c\x0cd"
    lines = {"csv": ["file_name,text", f"a.png,{odd}", "sub\\b.png,two"]}
    rows = [{"file_name": "a.png", "text": odd}, {"file_name": "sub\\b.png", "text": "two"}]
    lines["jsonl"] = [json.dumps(row, ensure_ascii=False) for row in rows]
    src = lay_out(tmp_path / "src", {"a.png": png(0), "sub/b.png": png(1)})
    (src / f"metadata.{suffix}").write_bytes("".join(f"{line}\r\n" for line in lines[suffix]).encode(encoding))
    summary = ingest(src, tmp_path / "out")
    captions = {fields(sample)["source"]: sample.caption for sample in samples_of(tmp_path / "out")}
    assert captions == {"a.png": odd, "sub/b.png": "two"} and summary["skipped"] == 0


@pytest.mark.parametrize(
    ("table", "complaint"),
    [
        ("file_name,text\na.png,a\nb.png,a cat, on a mat\n", r"row 2 \(line 3\) has 3 values where the header has 2"),
        ("file_name,text\na.png,a cat\non a mat\n", r"row 2 \(line 3\) has 1 values"),
        ('file_name,text\na.png,"a cat\nb.png,a dog\n', "row 1 .* cannot be read"),
        ("file_name,text,text\na.png,a,b\n", "two columns are named 'text'"),
    ],
)
def test_a_table_that_would_lose_a_part_of_a_caption_is_refused_with_its_row(table, complaint, tmp_path):
    src = lay_out(tmp_path / "src", {"a.png": png(0), "b.png": png(1), "metadata.csv": table})
    with pytest.raises(UserError, match=f"metadata.csv: {complaint}"):
        ingest(src, tmp_path / "out")
    assert not (tmp_path / "out").exists()


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
    assert none.caption is None and fields(none) == {"words": "w", "text_": "t", "source": "a.png"}


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
        assert by_source[name].caption_problem.startswith("caption is not UTF-8: ")
        assert accounts(tmp_path / "out")[name] == ("imported", by_source[name].caption_problem)
    assert by_source["b.png"].caption == "with a mark"
    assert by_source["c.png"].caption == "" and by_source["d.png"].caption is None
    assert summary["remarks"] == {"caption is not UTF-8": 2, "no caption": 2}

    strict = ingest(src, tmp_path / "strict", require_caption=True)
    assert (strict["imported"], strict["reasons"]) == (1, {"caption is not UTF-8": 2, "no caption": 2})


def test_captions_beside_images_have_the_suffixes_that_trainers_know(tmp_path):
    files = {f"{name}.png": png(number) for number, name in enumerate("abcdef")}
    files |= {"a.caption": "a", "b.cap": "b", "c.CAPTION": "c", "d.cap": "other", "d.txt": "d", "d.caption": "other"}
    files |= {"e.txt": "ein Bär\n".encode("utf-16"), "f.json": '{"prompt": ["f", "more"], "n": 1}', "g.cap": "orphan"}
    summary = ingest(lay_out(tmp_path / "src", files), tmp_path / "out")
    captions = {fields(sample)["source"]: sample.caption for sample in samples_of(tmp_path / "out")}
    assert captions == {f"{name}.png": name for name in "abcdf"} | {"e.png": "ein Bär"}
    assert samples_of(tmp_path / "out")[4].members["txt"] == "ein Bär".encode()
    assert samples_of(tmp_path / "out")[5].captions == ("f", "more")
    assert summary["reasons"] == {"no image": 1} and summary["remarks"] == {}


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
