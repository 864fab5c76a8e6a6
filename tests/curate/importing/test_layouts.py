"""Folders as people keep them: by splits, by how often they are to be seen, zipped, with what systems leave behind."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from afresh.errors import UsageError
from tests.curate.made_sources import accounts, encode, fields, ingest, lay_out, picture, png, samples_of

BY_SPLIT = {
    "train/cats/a.png": png(0),
    "train/cats/a.txt": "a",
    "Test/b.png": png(1),
    "val/c.png": png(2),
    "metadata.jsonl": '{"file_name": "train/cats/a.png", "text": "named"}\n',
}


def sources(out: Path) -> list[str]:
    return [fields(sample)["source"] for sample in samples_of(out)]


@pytest.mark.parametrize("above", ["", "set/"])
def test_a_folder_of_splits_is_not_merged_unless_that_is_said(above, tmp_path):
    src = lay_out(tmp_path / "src", {above + name: data for name, data in BY_SPLIT.items()})
    with pytest.raises(UsageError, match="src has Test, train, val; name one of them"):
        ingest(src, tmp_path / "out")
    with pytest.raises(UsageError, match="there is no 'dev'"):
        ingest(src, tmp_path / "out", split="dev")
    assert not (tmp_path / "out").exists()
    ingest(src, tmp_path / "train", split="train")
    assert sources(tmp_path / "train") == [f"{above}train/cats/a.png"]
    ingest(src, tmp_path / "all", split="all")
    assert sorted(sources(tmp_path / "all")) == sorted(above + name for name in BY_SPLIT if name.endswith(".png"))


def test_folders_that_are_no_splits_of_one_set_are_one(tmp_path):
    for number, tops in enumerate((("train", "boat"), ("test", "val"), ("training set", "tests"))):
        src = lay_out(tmp_path / f"src{number}", {f"{top}/a.png": png(place) for place, top in enumerate(tops)})
        assert ingest(src, tmp_path / f"out{number}")["imported"] == 2
        with pytest.raises(UsageError, match="no folders of splits"):
            ingest(src, tmp_path / "none", split="train")


def test_folders_named_by_their_repeats_say_them_in_the_json(tmp_path, capsys):
    files = {"10_sks dog/a.png": png(0), "1_dog/b.png": png(1), "1_dog/b.txt": "a dog", "10_sks dog/c.png": png(2)}
    files |= {"10_sks dog/c.caption": "sks dog on grass"}
    src = lay_out(tmp_path / "src", files)
    ingest(src, tmp_path / "out")
    found = [(fields(s)["source"], s.number("repeats"), s.caption) for s in samples_of(tmp_path / "out")]
    assert found == [
        ("10_sks dog/a.png", 10, "sks dog"),
        ("10_sks dog/c.png", 10, "sks dog on grass"),
        ("1_dog/b.png", 1, "a dog"),
    ]
    assert "--weight_field repeats" in capsys.readouterr().err


@pytest.mark.parametrize("names", [["10_dog/a.png", "b.png"], ["2019_trip/a.png"], ["10_dog/a.png", "x/5_cat/b.png"]])
def test_other_folders_say_nothing_of_repeats(names, tmp_path):
    src = lay_out(tmp_path / "src", {name: png(number) for number, name in enumerate(names)})
    ingest(src, tmp_path / "out")
    assert all("repeats" not in fields(sample) and sample.caption is None for sample in samples_of(tmp_path / "out"))


def test_a_zip_is_imported_like_the_folder_in_it(tmp_path):
    files = {"p/a.png": png(0), "p/a.txt": "a", "p/metadata.csv": "file_name,text\nb.png,b\n", "p/b.png": png(1)}
    src = lay_out(tmp_path / "src", files)
    with zipfile.ZipFile(tmp_path / "photos.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(src.rglob("*.*")):
            archive.write(path, path.relative_to(src))
        archive.writestr("__MACOSX/p/._a.png", b"?")
    ingest(src, tmp_path / "folder")
    ingest(tmp_path / "photos.zip", tmp_path / "out")
    assert (tmp_path / "out" / "000000.tar").read_bytes() == (tmp_path / "folder" / "000000.tar").read_bytes()


def test_a_damaged_file_of_a_zip_costs_itself_alone(tmp_path):
    path = tmp_path / "photos.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(3):
            archive.writestr(f"{number}.png", png(number))
    data = bytearray(path.read_bytes())
    data[data.index(png(1)) + 60] ^= 0xFF
    path.write_bytes(data)
    summary = ingest(path, tmp_path / "out")
    assert (summary["imported"], summary["reasons"]) == (2, {"cannot be read": 1})


def test_what_is_no_image_is_told_by_its_name_where_that_helps(tmp_path):
    files = {
        "a.png": png(0),
        "more.zip": b"PK\3\4" + bytes(60),
        "b.jxl": b"\xff\x0a" + bytes(60),
        "c.jxl": b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(60),
        "Thumbs.db": b"?",
        "desktop.ini": b"?",
    }
    ingest(lay_out(tmp_path / "src", files), tmp_path / "out")
    found = accounts(tmp_path / "out")
    assert sorted(found) == ["a.png", "b.jxl", "c.jxl", "more.zip"]
    assert "zip archive" in found["more.zip"][1] and all("jxl images" in found[f"{name}.jxl"][1] for name in "bc")


def test_an_image_with_long_metadata_is_imported_and_stays_readable(tmp_path):
    from PIL.PngImagePlugin import PngInfo

    from curate.reading.images import decode_image

    text = PngInfo()
    text.add_text("parameters", "masterpiece, " * 300_000, zip=True)
    ingest(lay_out(tmp_path / "src", {"a.png": encode(picture(0), "PNG", pnginfo=text)}), tmp_path / "out")
    assert decode_image(samples_of(tmp_path / "out")[0].image).size == (8, 8)
