"""Import, whatever the source: shards of bounded size, the same bytes every time, killed or not, and clear refusals."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from afresh.errors import UsageError, UserError
from afresh.runs import locked
from curate.reading.samples import read_samples
from tests.curate.made_sources import accounts, encode, ingest, lay_out, picture, png, written


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
    finished = sorted((tmp_path / "out").glob("[0-9]*.tar"))
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
