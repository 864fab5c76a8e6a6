"""What a job leaves at a URL is what it leaves in a folder, to the byte, however often it was stopped on the way."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import numpy as np
import pytest
from fsspec.implementations.local import LocalFileSystem

from afresh.errors import UsageError, UserError
from afresh.storage import Store
from curate.config import DedupConfig, ExportConfig, ImportConfig, ReportConfig, SearchConfig
from curate.dedup import run_dedup
from curate.export import run_export
from curate.index.training_index import TrainingIndex
from curate.ingest import run_import
from curate.reading.samples import Sample, read_samples
from curate.reading.writing import write_shard
from curate.report import run_report
from curate.results.ledger import read_ledger
from curate.search import run_search

ROOT = Path(__file__).resolve().parents[2]
MEMORY = "memory://results/out"


@pytest.fixture(autouse=True)
def _away_from_home(tmp_path, monkeypatch):
    """The user's cache folder is the test's, and what lies in memory ends with the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield
    memory = fsspec.filesystem("memory")
    if memory.exists("/results"):
        memory.rm("/results", recursive=True)


@pytest.fixture(scope="module")
def shards(tmp_path_factory, sample_shards) -> Path:
    """Two shards of 30 samples, some of the second in the first, too."""
    folder = tmp_path_factory.mktemp("shards")
    samples = [sample for sample in read_samples(sample_shards[0]) if isinstance(sample, Sample)][:50]
    for name, some in (("a", samples[:30]), ("b", samples[20:])):
        write_shard(folder / f"{name}.tar", [(f"{name}{sample.key}", sample.members) for sample in some])
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory, sample_shards) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for sample in list(read_samples(sample_shards[0]))[:40]:
        (folder / f"{sample.key}.webp").write_bytes(sample.image)
        (folder / f"{sample.key}.txt").write_text(str(sample.caption))
    return folder


def settings(shards: Path, out: object, **changes) -> DedupConfig:
    base = {"shards": [str(shards)], "out": str(out), "workers": 1, "samples_per_shard": 8}
    return DedupConfig(**{**base, **changes})


@pytest.fixture(scope="module")
def curated(shards, tmp_path_factory) -> Path:
    """The same curation in a local folder."""
    out = tmp_path_factory.mktemp("local") / "out"
    run_dedup(settings(shards, out))
    return out


def files_at(where: object) -> dict[str, str]:
    """Hashes of what is promised, by name: all but ``work/``."""
    filesystem, root = fsspec.core.url_to_fs(str(where))
    found = {path.removeprefix(root).lstrip("/"): filesystem.cat_file(path) for path in filesystem.find(root)}
    return {name: hashlib.sha256(data).hexdigest() for name, data in found.items() if not name.startswith("work/")}


def local_files(url: str) -> set[str]:
    """What a curation at a URL left on this machine."""
    folder = Store(url).made_in
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_curation_at_a_url_is_the_local_one_and_leaves_only_caches_here(shards, curated):
    summary = run_dedup(settings(shards, MEMORY))
    assert summary["shards"] >= 4 and files_at(MEMORY) == files_at(curated)
    kept_here = local_files(MEMORY)
    assert len([name for name in kept_here if name.startswith("work/read/")]) == 2
    assert {name for name in kept_here if not name.startswith(("work/read/", "work/pairs-"))} == {"work/lock"}


def test_workers_write_to_a_url_too(shards, curated, tmp_path):
    url = f"file://{tmp_path}/out"
    run_dedup(settings(shards, url, workers=2, work_dir=str(tmp_path / "here")))
    assert files_at(url) == files_at(curated)
    assert not (tmp_path / "cache").exists() and list((tmp_path / "here").glob("out-*/work/read/*.parquet"))


def test_readers_take_the_url(shards, curated, tmp_path):
    run_dedup(settings(shards, MEMORY))
    for asked in ({"caption": "grinning face"}, {"image": str(next_image(shards, tmp_path))}):
        found, expected = (run_search(SearchConfig(out=str(out), k=3, **asked)) for out in (MEMORY, curated))
        assert found["nearest"] == expected["nearest"]
    before = files_at(MEMORY)
    fsspec.filesystem("memory").rm_file("/results/out/report.html")
    assert run_report(ReportConfig(out=MEMORY))["report"] == f"{MEMORY}/report.html"
    assert files_at(MEMORY) == before
    for form in ("ids", "parquet", "dataset"):
        for name, out in (("url", MEMORY), ("local", str(curated))):
            run_export(ExportConfig(out=out, dest=str(tmp_path / form / name), format=form))
    assert (tmp_path / "ids" / "url").read_bytes() == (tmp_path / "ids" / "local").read_bytes()
    assert files_at(tmp_path / "parquet" / "url") == files_at(tmp_path / "parquet" / "local")


def next_image(shards: Path, folder: Path) -> Path:
    (folder / "asked.webp").write_bytes(next(iter(read_samples(str(shards / "a.tar")))).image)
    return folder / "asked.webp"


def test_an_index_at_a_url_is_mapped_from_a_copy_that_follows_its_changes(shards, curated, tmp_path):
    url = f"file://{tmp_path}/out"
    run_dedup(settings(shards, url))
    local = TrainingIndex.load(curated)
    for where in (url, f"{url}/index"):
        index = TrainingIndex.load(where)
        assert isinstance(index.embeddings, np.memmap) and (index.embeddings == local.embeddings).all()
        assert (index.captions, index.keys, index.calibration) == (local.captions, local.keys, local.calibration)
    (copy,) = (tmp_path / "cache" / "afresh").glob("copy-*/*/embeddings.npy")
    stamp = copy.stat().st_mtime_ns
    TrainingIndex.load(url)
    assert copy.stat().st_mtime_ns == stamp  # not fetched again
    run_dedup(settings(shards / "a.tar", url))
    assert len(TrainingIndex.load(url)) == 30
    assert len(list((tmp_path / "cache" / "afresh").glob("copy-*/*/embeddings.npy"))) == 1


def test_an_index_at_a_url_is_opened_by_several_at_once(curated):
    fsspec.filesystem("memory").put(str(curated / "index"), "/results/index", recursive=True)
    together = threading.Barrier(4)

    def load(_: int) -> int:
        together.wait()
        return len(TrainingIndex.load("memory://results/index"))

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(load, range(4))) == [len(TrainingIndex.load(curated))] * 4


def test_what_stands_in_a_curation_at_a_url_is_dropped(shards, tmp_path):
    run_dedup(settings(shards / "a.tar", MEMORY))
    summary = run_dedup(settings(shards / "b.tar", tmp_path / "second", against=[MEMORY]))
    dropped = [row for row in read_ledger(tmp_path / "second").to_pylist() if row["reason"] == "other_set"]
    assert len(dropped) == summary["reasons"]["other_set"] >= 10
    assert all(row["kept_shard"] == f"{MEMORY}:a.tar" for row in dropped)


def test_a_killed_curation_goes_on_at_its_url_to_the_same_bytes(shards, curated, tmp_path):
    out, cache = tmp_path / "out", tmp_path / "cache"
    command = ["curate", "dedup", str(shards), f"file://{out}", "--workers", "1", "--samples_per_shard", "8"]
    expected = files_at(curated)
    for folder, sign in ((cache, "afresh/out-*/work/read/*.parquet"), (out, "work/shards/[0-9]*.json")):
        process = subprocess.Popen([sys.executable, "-m", *command], cwd=ROOT, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while not list(folder.glob(sign)) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (out / "summary.json").exists()
        whole = {name: value for name, value in files_at(out).items() if not Path(name).name.startswith(".tmp-")}
        assert whole.items() <= expected.items()  # what has its name is whole
    done = [out / "shards" / f"{marker.stem}.tar" for marker in (out / "work" / "shards").glob("[0-9]*.json")]
    stamps = {path: path.stat().st_mtime_ns for path in done}
    left_over = [out / "shards" / ".tmp-1-000003.tar", out / "work" / "shards" / ".tmp-1-000003.json"]
    for path in left_over:
        path.write_bytes(b"half of it")
    (Store(f"file://{out}").made_in / "shards").mkdir(exist_ok=True)
    (Store(f"file://{out}").made_in / "shards" / "000099.tar").write_bytes(b"whole, and not sent")
    run_dedup(settings(shards, f"file://{out}"))
    assert files_at(out) == expected and not any(path.exists() for path in left_over)
    assert stamps and {path: path.stat().st_mtime_ns for path in done} == stamps  # not written again
    assert not any(name.startswith("shards/") for name in local_files(f"file://{out}"))


def test_shards_at_the_url_are_kept_when_the_local_folder_is_lost(shards, curated, tmp_path):
    url = f"file://{tmp_path}/out"
    run_dedup(settings(shards, url))
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "shards").iterdir()}
    shutil.rmtree(tmp_path / "cache")
    first, second, *_ = sorted(stamps)
    first.unlink()
    second.write_bytes(second.read_bytes()[:-512])
    run_dedup(settings(shards, url))
    assert files_at(url) == files_at(curated)
    assert {path for path in stamps if path.stat().st_mtime_ns != stamps[path]} == {first, second}


def test_a_changed_setting_is_noticed_at_the_url(shards, tmp_path, capsys):
    run_dedup(settings(shards, MEMORY, write_dropped=True))
    with pytest.raises(UserError, match="none of the"):
        run_dedup(settings(broken(tmp_path), MEMORY))
    said = capsys.readouterr().err
    assert "write_dropped: True → False; 1 shards to read, 2 gone" in said
    assert not fsspec.filesystem("memory").exists("/results/out/summary.json")  # unfinished from then on
    run_dedup(settings(shards, MEMORY, threshold=0.99, samples_per_shard=20))
    run_dedup(settings(shards, tmp_path / "fresh", threshold=0.99, samples_per_shard=20))
    assert files_at(MEMORY) == files_at(tmp_path / "fresh")


def broken(folder: Path) -> Path:
    write_shard(folder / "broken.tar", [("a", {"jpg": b"?", "txt": b"words"})])
    return folder / "broken.tar"


class Halting(LocalFileSystem):
    """A disk elsewhere whose line breaks in the middle of a file, after a number of whole ones."""

    protocol = "halting"
    files_left = 10**9

    def put_file(self, path1, path2, callback=None, **options):
        Halting.files_left -= 1
        if Halting.files_left < 0:
            data = Path(path1).read_bytes()
            Path(self._strip_protocol(path2)).write_bytes(data[: len(data) // 2])
            raise ConnectionResetError("connection reset by peer")
        super().put_file(path1, path2)


def test_a_line_that_breaks_leaves_no_part_of_a_file_and_costs_no_finished_one(shards, curated, images, tmp_path):
    fsspec.register_implementation("halting", Halting, clobber=True)
    expected, interrupted = files_at(curated), 0
    try:
        for whole in (0, 1, 3, 5, 9, 14, 100):
            Halting.files_left = whole
            try:
                run_dedup(settings(shards, f"halting://{tmp_path}/out"))
            except UserError as error:
                interrupted += 1
                if whole:
                    assert error.exit_code == 1 and "goes on there once it can" in str(error)
                else:
                    assert error.exit_code == 2 and "cannot write to halting://" in str(error)
            there = files_at(tmp_path / "out") if (tmp_path / "out").exists() else {}
            assert there.items() <= expected.items()
        assert interrupted >= 5 and there == expected
        Halting.files_left = 5
        with pytest.raises(UserError, match="goes on there once it can"):
            run_import(ImportConfig(src=[str(images)], out=f"halting://{tmp_path}/imported", samples_per_shard=9))
        Halting.files_left = 100
        run_import(ImportConfig(src=[str(images)], out=f"halting://{tmp_path}/imported", samples_per_shard=9))
    finally:
        Halting.files_left = 10**9
    run_import(ImportConfig(src=[str(images)], out=str(tmp_path / "local"), samples_per_shard=9))
    assert files_at(tmp_path / "imported") == files_at(tmp_path / "local")


def test_an_import_at_a_url_is_the_local_one(images, tmp_path):
    for out in (MEMORY, str(tmp_path / "local")):
        summary = run_import(ImportConfig(src=[str(images)], out=out, samples_per_shard=9))
        assert (summary["imported"], summary["shards"]) == (40, 5)
    assert files_at(MEMORY) == files_at(tmp_path / "local")
    assert set(fsspec.filesystem("memory").find("/results/out")) == {
        f"/results/out/{name}" for name in files_at(tmp_path / "local")
    }
    assert not Store(MEMORY).made_in.exists()
    again = run_import(ImportConfig(src=[str(images)], out=MEMORY, samples_per_shard=9))
    assert {**again, "seconds": 0} == {**summary, "seconds": 0}
    with pytest.raises(UsageError, match="other settings .samples_per_shard"):
        run_import(ImportConfig(src=[str(images)], out=MEMORY, samples_per_shard=8))


def test_a_killed_import_goes_on_at_its_url_to_the_same_bytes(images, tmp_path):
    out = tmp_path / "out"
    command = ["curate", "import", str(images), f"file://{out}", "--samples_per_shard", "2"]
    process = subprocess.Popen([sys.executable, "-m", *command], cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (out / "work" / "000002.parquet").exists() and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "summary.json").exists()
    accounts = sorted((out / "work").glob("[0-9]*.parquet"))
    stamps = {path: path.stat().st_mtime_ns for path in (out / f"{account.stem}.tar" for account in accounts)}
    assert len(stamps) >= 3
    for where in (f"file://{out}", str(tmp_path / "local")):
        run_import(ImportConfig(src=[str(images)], out=where, samples_per_shard=2))
    assert files_at(out) == files_at(tmp_path / "local")
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps


def test_what_cannot_be_written_to_is_bad_usage_before_any_work(shards, images, tmp_path):
    memory = fsspec.filesystem("memory")
    memory.pipe("/results/mine/thesis.txt", b"years of work")
    memory.put(f"{shards}/", "/results/shards/", recursive=True)
    (tmp_path / "file").write_text("words")
    cases = [
        ("nosuch://bucket/out", "nosuch"),
        ("memory://results/mine", "not empty and no"),
        ("memory://results/mine/thesis.txt", "is a file"),
        ("memory://results/*", "has wildcards"),
        (f"file://{tmp_path}/file/out", "cannot write to"),
    ]
    if importlib.util.find_spec("s3fs") is None:
        cases.append(("s3://bucket/out", "s3fs"))
    for out, needle in cases:
        for run in (
            lambda out: run_dedup(settings(shards, out)),
            lambda out: run_import(ImportConfig(src=[str(images)], out=out)),
        ):
            with pytest.raises(UsageError, match=needle):
                run(out)
    for read in (
        lambda out: run_search(SearchConfig(out=out, caption="x")),
        lambda out: run_report(ReportConfig(out=out)),
        lambda out: run_export(ExportConfig(out=out, dest=str(tmp_path / "kept"))),
        lambda out: run_dedup(settings(shards, tmp_path / "out", against=[out])),
    ):
        with pytest.raises(UsageError, match="nosuch://bucket cannot be opened"):
            read("nosuch://bucket")
        with pytest.raises(UserError, match=r"memory://results/mine.*(no such file|is missing)"):
            read("memory://results/mine")
    with pytest.raises(UsageError, match="holds the input"):
        run_dedup(settings("memory://results/shards/*.tar", "memory://results"))
    with pytest.raises(UsageError, match="holds the input"):
        run_dedup(settings(shards, f"file://{shards.parent}"))
    with pytest.raises(UsageError, match="lies in the source"):
        run_import(ImportConfig(src=[str(images)], out=f"file://{images}/out"))
    with pytest.raises(UsageError, match="memory of one process"):
        run_dedup(settings(shards, MEMORY, workers=2))
    assert not (tmp_path / "out").exists() and not (tmp_path / "kept").exists()
    assert set(memory.find("/results")) == {
        "/results/mine/thesis.txt", "/results/shards/a.tar", "/results/shards/b.tar"
    }  # fmt: skip


def test_the_command_says_where_it_works_and_what_it_cannot_open(run_cli):
    assert "XDG_CACHE_HOME" in run_cli("curate", "dedup", "--help").stdout
    missing = run_cli("curate", "search", "nosuch://bucket", "--caption", "x")
    assert missing.returncode == 2 and missing.stderr.count("\n") == 1
    assert missing.stderr.startswith("error: nosuch://bucket cannot be opened: Protocol not known")


@pytest.mark.skipif(os.name == "nt", reason="the lock needs fcntl")
def test_two_runs_of_one_machine_do_not_write_to_one_url_at_once(shards):
    import fcntl

    run_dedup(settings(shards, MEMORY))
    with open(Store(MEMORY).made_in / "work" / "lock", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=f"{MEMORY}: another run"):
            run_dedup(settings(shards, MEMORY))
