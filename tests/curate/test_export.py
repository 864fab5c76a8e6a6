"""Export hands on what a curation kept, image bytes untouched, whole or not at all."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from afresh.errors import UsageError, UserError
from curate.config import DedupConfig, ExportConfig, ImportConfig
from curate.dedup import run_dedup
from curate.export import run_export
from curate.ingest import run_import
from curate.reading.images import decode_image
from curate.reading.samples import Sample, read_samples
from curate.reading.writing import write_shard
from curate.results.ledger import read_ledger


def webp_of(sample: Sample, quality: int) -> bytes:
    buffer = io.BytesIO()
    decode_image(sample.image).resize((48, 48)).save(buffer, "WEBP", quality=quality)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def curated(tmp_path_factory, sample_shards) -> Path:
    """A curation of 40 emoji, 10 of them with a copy under another caption, one broken and one without a caption."""
    folder = tmp_path_factory.mktemp("export")
    *originals, bare = [sample for sample in read_samples(sample_shards[0]) if isinstance(sample, Sample)][::9][:41]
    first = [(sample.key, dict(sample.members)) for sample in originals]
    second = [
        (sample.key, {"webp": webp_of(sample, 80), "txt": f"another word for it, {number}".encode()})
        for number, sample in enumerate(originals[:10])
    ]
    second.append(("broken", {"jpg": b"no image", "txt": b"words"}))
    second.append(("bare", {"webp": bare.image, "json": b'{"by": "hand"}'}))
    write_shard(folder / "b.tar", first)
    write_shard(folder / "a.tar", second)
    run_dedup(
        DedupConfig(
            shards=[str(folder)], out=str(folder / "out"), workers=1, missing_caption="empty", on_caption_differs="pool"
        )
    )
    return folder / "out"


def export(out: Path, dest: Path, **settings) -> dict:
    return run_export(ExportConfig(out=str(out), dest=str(dest), **settings))


def kept(out: Path) -> list[dict]:
    return [row for row in read_ledger(out).to_pylist() if row["status"] == "kept"]


def input_samples(out: Path) -> dict[tuple[str, str], Sample]:
    samples = [item for shard in sorted(out.parent.glob("*.tar")) for item in read_samples(str(shard))]
    return {(sample.shard, sample.key): sample for sample in samples if isinstance(sample, Sample)}


def encoded_rows(dest: Path, how: str) -> list[dict]:
    import datasets

    data = datasets.load_from_disk(str(dest)) if how == "dataset" else datasets.load_dataset(str(dest), split="train")
    assert isinstance(data.features["image"], datasets.Image)
    assert isinstance(data[0]["image"], Image.Image)
    return list(data.cast_column("image", datasets.Image(decode=False)))


@pytest.mark.parametrize("how", ["dataset", "parquet"])
def test_kept_samples_are_handed_on_with_their_bytes_and_all_their_captions(how, curated, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    summary = export(curated, tmp_path / "dest", format=how)
    rows, ledger, came = encoded_rows(tmp_path / "dest", how), kept(curated), input_samples(curated)
    assert summary["samples"] == len(rows) == len(ledger)
    assert [(row["shard"], row["key"]) for row in rows] == [(row["shard"], row["key"]) for row in ledger]
    pooled = 0
    for row in rows:
        sample = came[row["shard"], row["key"]]
        assert row["image"] == {"bytes": sample.image, "path": f"{sample.key}.{sample.image_ext}"}
        assert row["caption"] == sample.caption
        assert row["captions"][:1] == ([sample.caption] if sample.caption else [])
        pooled += len(row["captions"]) > 1
    assert pooled == json.loads((curated / "summary.json").read_text())["captions_pooled"] > 0
    bare = next(row for row in rows if row["key"] == "bare")
    assert (bare["caption"], bare["captions"], bare["json"]) == (None, [], '{"by": "hand"}')


def test_an_export_leaves_nothing_else_behind(curated, tmp_path):
    (tmp_path / ".tmp-dest" / "cache" / "half").mkdir(parents=True)  # of a run that was killed
    for name in ("dest", "table"):
        export(curated, tmp_path / name, format="dataset" if name == "dest" else "parquet")
    assert {path.name for path in tmp_path.iterdir()} == {"dest", "table"}
    assert {path.suffix for path in (tmp_path / "dest").iterdir()} == {".arrow", ".json"}


def test_parquet_files_are_bounded_and_equal_for_equal_curations(curated, tmp_path):
    for name in ("one", "two"):
        export(curated, tmp_path / name, format="parquet", file_bytes=20_000)
    files = sorted((tmp_path / "one").iterdir())
    assert len(files) > 2 and [path.name for path in files][:2] == ["000000.parquet", "000001.parquet"]
    for path in files:
        images = pq.read_table(path, columns=["image"])["image"].to_pylist()
        assert sum(len(image["bytes"]) for image in images) <= 20_000 or len(images) == 1
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
    export(curated, tmp_path / "each", format="parquet", file_bytes=1)
    assert len(list((tmp_path / "each").iterdir())) == len(kept(curated))


@pytest.mark.parametrize("status", ["kept", "dropped", "unreadable"])
def test_an_id_list_names_the_samples_of_a_status_in_byte_order(status, curated, tmp_path):
    summary = export(curated, tmp_path / "ids.txt", format="ids", status=status)
    lines = (tmp_path / "ids.txt").read_bytes().split(b"\n")
    assert lines.pop() == b"" and lines == sorted(lines) and summary["samples"] == len(lines) > 0
    rows = [row for row in read_ledger(curated).to_pylist() if row["status"] == status]
    assert sorted(f"{row['shard']}/{row['key']}".encode() for row in rows) == lines


def test_shards_that_do_not_match_the_ledger_are_named_and_nothing_is_written(curated, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(curated, out)
    samples = list(read_samples(str(out / "shards" / "000000.tar")))
    write_shard(out / "shards" / "000000.tar", [(s.key, s.members) for s in samples[:5] + samples[6:]])
    for how in ("dataset", "parquet"):
        with pytest.raises(UserError, match=f"where the ledger has kept sample {samples[5].key!r}"):
            export(out, tmp_path / "dest", format=how)
    (out / "shards" / "000000.tar").write_bytes((curated / "shards" / "000000.tar").read_bytes()[:-20_000])
    with pytest.raises(UserError, match="truncated"):
        export(out, tmp_path / "dest", format="parquet")
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_bad_usage_is_refused_by_name(curated, tmp_path):
    (tmp_path / "there").mkdir()
    for dest, settings, needle in (
        (tmp_path / "there", {}, "exists; name a new folder"),
        (tmp_path / "there", {"format": "ids"}, "is a folder"),
        (tmp_path / "new", {"status": "dropped"}, "--format ids"),
        (tmp_path / "new", {"file_bytes": 0}, "file_bytes"),
        ("s3://bucket/new", {}, "must be local"),
    ):
        with pytest.raises(UsageError) as raised:
            export(curated, dest, **settings)
        assert needle in str(raised.value)
    with pytest.raises(UserError, match="is .* a folder that `curate dedup` wrote to its end"):
        export(tmp_path / "there", tmp_path / "new")
    assert list(tmp_path.iterdir()) == [tmp_path / "there"]


def test_from_a_folder_of_images_to_a_dataset_and_back_to_shards_no_byte_changes(sample_shards, tmp_path, run_cli):
    originals = [sample for sample in read_samples(sample_shards[0]) if isinstance(sample, Sample)][::12]
    (tmp_path / "images").mkdir()
    for number, sample in enumerate(originals):
        (tmp_path / "images" / f"{number}.webp").write_bytes(sample.image)
        (tmp_path / "images" / f"{number}.txt").write_text(str(sample.caption))
    for command in (
        ["import", "images", "shards"],
        ["dedup", "shards", "curated", "--workers", "1"],
        ["export", "curated", "dataset"],
        ["import", "dataset", "again", "--text_column", "caption"],
    ):
        done = run_cli("curate", *command)
        assert done.returncode == 0, done.stderr
    rows = encoded_rows(tmp_path / "dataset", "dataset")
    assert 0 < len(rows) <= len(originals)
    for row in rows:
        original = originals[int(row["key"])]
        assert (row["image"]["bytes"], row["caption"]) == (original.image, original.caption)
    again = [item for item in read_samples(str(tmp_path / "again" / "000000.tar")) if isinstance(item, Sample)]
    assert [(sample.image, sample.caption) for sample in again] == [
        (row["image"]["bytes"], row["caption"]) for row in rows
    ]


def test_what_was_imported_without_a_caption_is_curated_by_dedups_own_rule(sample_shards, tmp_path):
    (tmp_path / "images").mkdir()
    for number, sample in enumerate(list(read_samples(sample_shards[0]))[:4]):
        (tmp_path / "images" / f"{number}.webp").write_bytes(sample.image)
        if number:
            (tmp_path / "images" / f"{number}.txt").write_text(str(sample.caption))
    run_import(ImportConfig(src=[str(tmp_path / "images")], out=str(tmp_path / "shards")))
    settings = {"shards": [str(tmp_path / "shards")], "workers": 1}
    strict = run_dedup(DedupConfig(out=str(tmp_path / "strict"), **settings))
    lenient = run_dedup(DedupConfig(out=str(tmp_path / "lenient"), missing_caption="empty", **settings))
    assert (strict["unreadable"], lenient["unreadable"]) == (1, 0)
