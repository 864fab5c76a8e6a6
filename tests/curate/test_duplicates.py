"""``find_duplicates``: what ``curate dedup`` decides, of folders, shards, lists and embeddings, as a table."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import afresh
from afresh.errors import UsageError
from curate.config import DedupConfig
from curate.dedup import run_dedup
from curate.reading.images import decode_image
from curate.reading.samples import Sample, read_samples
from curate.reading.writing import write_shard
from curate.results.ledger import read_ledger

ROOT = Path(__file__).resolve().parent.parent.parent


def encode(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def originals(sample_shards) -> list[Sample]:
    """Samples of which no two look alike."""
    return [item for url in sample_shards for item in read_samples(url) if isinstance(item, Sample)][::63]


@pytest.fixture
def shards(originals, tmp_path) -> Path:
    """Two shards with exact copies, near ones and damage."""
    folder = tmp_path / "shards"
    folder.mkdir()
    first = [(one.key, one.members) for one in originals]
    copies = []
    for one in originals[:8]:
        image = decode_image(one.image)
        small = encode(image.resize((48, 48), Image.Resampling.LANCZOS), "JPEG", quality=80)
        copies += [(f"{one.key}-small", {"jpg": small, "txt": one.members["txt"]}), (f"{one.key}-again", one.members)]
    copies.append(("broken", {"jpg": b"\xff\xd8\xff broken", "txt": b"x"}))
    copies.append(("textless", {"png": encode(decode_image(originals[9].image), "PNG")}))
    write_shard(folder / "a.tar", first)
    write_shard(folder / "b.tar", copies)
    *_, last = read_samples(str(folder / "b.tar"))
    end = last.offsets["png"] + len(last.image)
    (folder / "b.tar").write_bytes((folder / "b.tar").read_bytes()[:end])
    return folder


@pytest.fixture
def photos(originals, tmp_path) -> Path:
    """Images without captions, some in two places, and files that are none."""
    folder = tmp_path / "photos"
    (folder / "cats" / "small").mkdir(parents=True)
    for number, one in enumerate(originals[:6]):
        (folder / "cats" / f"{number}.webp").write_bytes(one.image)
    (folder / "cats" / "small" / "0.jpg").write_bytes(
        encode(decode_image(originals[0].image).resize((48, 48)), "JPEG", quality=85)
    )
    (folder / "copy of 1.webp").write_bytes(originals[1].image)
    (folder / "copy of 2.bmp").write_bytes(encode(decode_image(originals[2].image), "BMP"))
    (folder / "copy of 3.tif").write_bytes(encode(decode_image(originals[3].image), "TIFF"))
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 cut")
    (folder / "README.txt").write_text("not a caption of anything")
    (folder / "film.mp4").write_bytes(b"\0\0\0 ftypisom")
    (folder / ".hidden.webp").write_bytes(originals[1].image)
    return folder


def groups(table) -> dict[str, list[str]]:
    """Who stands for whom: kept source → the others of its group, by the names of their files."""
    found: dict[str, list[str]] = {}
    for row in table.filter(table["kept"]).to_pylist():
        found[Path(row["source"]).name] = []
    for row in table.to_pylist():
        if row["stand_in"] is not None:
            found[Path(row["stand_in"]).name].append(Path(row["source"]).name)
    return found


# ---------------------------------------------------------------------------------------- as the job decides


@pytest.mark.parametrize(
    "settings",
    [{}, {"threshold": 0.8, "rule": "components"}, {"keep_copies": 2, "prefer": ["caption_length", "lossless"]}],
    ids=["defaults", "components", "copies"],
)
def test_the_table_of_shards_has_the_decisions_of_the_ledger(shards, tmp_path, settings):
    job = {"shards": [str(shards)], "out": str(tmp_path / "out"), "workers": 1, "missing_caption": "empty"}
    run_dedup(DedupConfig(**job, **settings))
    ledger = read_ledger(tmp_path / "out").to_pylist()
    table = afresh.find_duplicates(shards, lone=True, **settings)

    def name(shard, key):
        return f"{shard}/{key}" if key else shard

    expected = {
        name(row["shard"], row["key"]): (
            row["status"] == "kept", name(row["kept_shard"], row["kept_key"]), row["image_similarity"], row["reason"],
            row["group_size"],
        )
        for row in ledger
    }  # fmt: skip
    found = {
        row["source"]: (row["kept"], row["stand_in"], row["similarity"], row["reason"], row["group_size"])
        for row in table.to_pylist()
    }
    assert found == expected
    of_ledger = {name(row["shard"], row["key"]): row["group"] for row in ledger}
    renumbered = {(of_ledger[row["source"]], row["group"]) for row in table.to_pylist()}
    assert len(renumbered) == len({one for one, _ in renumbered}) == len({one for _, one in renumbered})
    assert {row["status"] for row in ledger} == {"kept", "dropped", "unreadable"}


def test_only_groups_and_what_cannot_be_read_are_given_unless_asked(shards):
    table = afresh.find_duplicates(shards)
    everything = afresh.find_duplicates(shards, lone=True)
    assert len(table) < len(everything) == len([item for url in ("a.tar", "b.tar") for item in _items(shards / url)])
    rows = table.to_pylist()
    assert all(row["group_size"] is None or row["group_size"] > 1 for row in rows)
    assert [row["reason"] is not None and row["group"] is None for row in rows] == sorted(
        row["group"] is None for row in rows
    )
    of_groups = [row["group"] for row in rows if row["group"] is not None]
    assert of_groups == sorted(of_groups) and of_groups[0] == 0 and set(of_groups) == set(range(of_groups[-1] + 1))
    for number in set(of_groups):
        assert [row["kept"] for row in rows if row["group"] == number][0]


def _items(path: Path) -> list:
    return list(read_samples(str(path)))


def test_processes_make_no_difference(shards, photos):
    assert afresh.find_duplicates(shards, workers=2).equals(afresh.find_duplicates(shards))


# -------------------------------------------------------------------------------------------- what is given


def test_a_folder_of_images_needs_no_captions_and_no_import(photos):
    table = afresh.find_duplicates(photos)
    assert groups(table) == {
        "0.webp": ["0.jpg"],
        "1.webp": ["copy of 1.webp"],
        "2.webp": ["copy of 2.bmp"],
        "3.webp": ["copy of 3.tif"],
    }
    rows = {Path(row["source"]).name: row for row in table.to_pylist()}
    assert rows["copy of 1.webp"]["reason"] == "exact_image" and rows["copy of 1.webp"]["similarity"] == 1
    assert rows["copy of 2.bmp"]["reason"] == rows["copy of 3.tif"]["reason"] == "exact_image"
    assert "malformed" in rows["broken.jpg"]["reason"] and rows["broken.jpg"]["group"] is None
    assert all(Path(row["source"]).is_file() for row in table.to_pylist())  # so that they can be opened, or removed
    everything = afresh.find_duplicates(str(photos), lone=True)
    assert len(everything) == 11  # neither the text, the film nor the hidden file


def test_a_folder_at_a_url_is_read_like_a_local_one(photos):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(str(photos), "/duplicates", recursive=True)
    table, local = afresh.find_duplicates("memory://duplicates"), afresh.find_duplicates(photos)
    assert groups(table) == groups(local) and table["source"][0].as_py().startswith("memory://duplicates/")
    assert table.drop_columns(["source", "stand_in"]).equals(local.drop_columns(["source", "stand_in"]))
    memory.rm("/duplicates", recursive=True)


def test_captions_beside_images_are_read(photos):
    (photos / "cats" / "0.txt").write_text("a red apple on a white plate")
    (photos / "cats" / "small" / "0.txt").write_text("nothing of the kind")
    (photos / "copy of 1.json").write_text('{"caption": "a caption of its own"}')
    (photos / "metadata.csv").write_text("of another, program\n1,2\n")
    rows = {Path(row["source"]).name: row for row in afresh.find_duplicates(photos).to_pylist()}
    assert rows["0.jpg"]["reason"] == "near_image"
    assert rows["copy of 1.webp"]["kept"]  # for its caption is longer
    assert rows["1.webp"]["stand_in"].endswith("copy of 1.webp")


def test_lists_of_paths_and_of_images_are_decided_alike(photos):
    paths = sorted(path for path in photos.rglob("[!.b]*.*") if path.suffix in (".webp", ".jpg", ".bmp"))
    by_path = afresh.find_duplicates([str(path) for path in paths])
    assert groups(by_path) == {"0.webp": ["0.jpg"], "1.webp": ["copy of 1.webp"], "2.webp": ["copy of 2.bmp"]}
    images = (Image.open(path) for path in paths)  # taken one by one
    in_memory = afresh.find_duplicates(images)
    named = [str(paths[int(number)]) for number in in_memory["source"].to_pylist()]
    assert named == by_path["source"].to_pylist()
    assert in_memory["similarity"].equals(by_path["similarity"])
    mixed = afresh.find_duplicates([paths[0], Image.open(paths[0])])
    assert groups(mixed) == {paths[0].name: ["1"]}


def test_missing_and_broken_files_of_a_list_have_their_rows(photos, tmp_path):
    table = afresh.find_duplicates([photos / "film.mp4", photos / "nowhere.jpg", photos / "cats" / "0.webp"])
    reasons = [row["reason"] for row in table.to_pylist()]
    assert len(reasons) == 2 and reasons[0].startswith("not an image") and "No such file" in reasons[1]
    noise = Image.effect_noise((64, 64), 50)
    broken = Image.open(io.BytesIO(encode(noise, "PNG")[:300]))
    assert "cannot be decoded" in afresh.find_duplicates([broken])["reason"][0].as_py()


def test_captions_given_with_images_decide_between_copies(originals):
    images = [decode_image(originals[0].image)] * 2 + [decode_image(originals[1].image)]
    table = afresh.find_duplicates(images, captions=["short", "a longer caption of the same", None])
    assert [(row["source"], row["kept"]) for row in table.to_pylist()] == [("1", True), ("0", False)]


def test_rows_of_embeddings_are_compared_by_their_cosine():
    rng = np.random.default_rng(0)
    embeddings = rng.standard_normal((400, 32))
    embeddings[7], embeddings[9] = embeddings[3], 5 * embeddings[3] + 0.01
    embeddings[40] = embeddings[2] + 0.2 * rng.standard_normal(32)
    cosine = np.corrcoef(embeddings[2], embeddings[40])[0, 1]
    for dtype in (np.float64, np.float32, np.float16):
        table = afresh.find_duplicates(embeddings.astype(dtype))
        assert groups(table) == {"2": ["40"], "3": ["7", "9"]}
        similarity = dict(zip(table["source"].to_pylist(), table["similarity"].to_pylist(), strict=True))
        assert similarity["2"] is None and abs(similarity["7"] - 1) < 1e-3
        assert abs(similarity["40"] - cosine) < 0.02
    crowd = np.concatenate([np.tile(embeddings[:1], (500, 1)), embeddings[100:]])
    assert groups(afresh.find_duplicates(crowd)) == {"0": [str(row) for row in range(1, 500)]}
    import torch

    assert groups(afresh.find_duplicates(torch.from_numpy(embeddings))) == {"2": ["40"], "3": ["7", "9"]}


def test_a_set_without_copies_gives_an_empty_table_of_the_same_columns(originals):
    table = afresh.find_duplicates(np.eye(5))
    assert len(table) == 0 and table.column_names[:4] == ["group", "group_size", "source", "kept"]
    assert len(afresh.find_duplicates(np.empty((0, 8), np.float32))) == 0
    assert len(afresh.find_duplicates([])) == 0
    assert len(afresh.find_duplicates(np.eye(5), lone=True)) == 5


@pytest.mark.parametrize(
    ("source", "options", "needle"),
    [
        ("nowhere", {}, "nowhere is not a folder"),
        ("nowhere/*.tar", {}, "no such file"),
        ("one.png", {}, "is one file; name a folder"),
        ("empty", {}, "holds no files"),
        (7, {}, "got int"),
        ([7], {}, "item 0 is a int"),
        (Image.new("RGB", (8, 8)), {}, "got Image"),
        (np.eye(3, dtype=int), {}, "floating-point numbers"),
        (np.ones(3), {}, "floating-point numbers"),
        (np.full((3, 2), np.nan), {}, "embeddings: "),
        (np.eye(3), {"prefer": ["resolution"]}, "prefer: embeddings tell nothing"),
        (np.eye(3), {"captions": ["a"]}, "there are 1 of them, and 3 embeddings"),
        (["a.png", "b.png"], {"captions": ["a"]}, "there are 1 of them, and 2 images"),
        ([Image.new("RGB", (8, 8))], {"captions": ["a", "b"]}, "there are 2 of them, and 1 images"),
        (".", {"captions": ["a"]}, "have their own"),
        (np.eye(3), {"threshold": 2.0}, "threshold must be in (0, 1], got 2.0"),
        (np.eye(3), {"keep_copies": 0}, "keep_copies must be at least 1"),
        (np.eye(3), {"rule": "gready"}, "rule: unknown 'gready'"),
        (["a.png"], {"prefer": "beauty"}, "unknown criterion 'beauty'"),
        (["a.png"], {"embedder": "clip"}, "unknown embedder 'clip'"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(source, options, needle, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "one.png")
    with pytest.raises(UsageError) as caught:
        afresh.find_duplicates(source, **options)
    assert needle in str(caught.value) and "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------ the library


def test_importing_the_library_loads_nothing_heavy():
    heavy = ("torch", "numpy", "pyarrow", "webdataset", "PIL", "curate", "train")
    program = f"import sys, afresh; print([name for name in {heavy!r} if name in sys.modules]); afresh.find_duplicates"
    program += "; print('torch' in sys.modules, 'webdataset' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "[]\nFalse False\n"


def test_nothing_is_left_behind(photos, tmp_path, monkeypatch):
    before = sorted(tmp_path.rglob("*"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr("tempfile.tempdir", None)
    afresh.find_duplicates(photos)
    assert list((tmp_path / "tmp").iterdir()) == []
    assert sorted(path for path in tmp_path.rglob("*") if path != tmp_path / "tmp") == before
