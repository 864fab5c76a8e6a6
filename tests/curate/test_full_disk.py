"""A full disk stops curation with one clear line, and costs nothing that was finished."""

from __future__ import annotations

import os
import re
import resource
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from afresh.errors import UserError
from curate.config import DedupConfig, ImportConfig
from curate.dedup import run_dedup
from curate.index.training_index import TrainingIndex
from curate.ingest import run_import
from curate.reading.samples import read_samples
from curate.reading.writing import write_shard

PAGE = 4096
SAYS = re.compile(r"(?P<path>\S+) cannot be written: (No space left on device|File too large); make room, and the same")


@pytest.fixture(scope="module")
def shards(tmp_path_factory, sample_shards) -> Path:
    folder = tmp_path_factory.mktemp("shards")  # their vectors fill more pages than a run gives free
    samples = [(sample.key, sample.members) for sample in read_samples(sample_shards[0])][:32]
    for number in range(2):
        write_shard(folder / f"{number}.tar", samples[16 * number : 16 * (number + 1)])
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory, sample_shards) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for sample in list(read_samples(sample_shards[0]))[:24]:
        (folder / f"{sample.key}.webp").write_bytes(sample.image)
        (folder / f"{sample.key}.txt").write_text(str(sample.caption))
    return folder


@pytest.fixture
def disk(tmp_path) -> Iterator[Callable[[int], Path]]:
    """``disk(bytes)`` is a file system of that size, the same one when it is called again."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def sized(size: int) -> Path:
        options = f"{'remount,' if os.path.ismount(folder) else ''}size={size}"
        made = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True)
        if made.returncode:
            pytest.skip(f"a small file system cannot be mounted here: {made.stderr.strip()}")
        return folder

    try:
        yield sized
    except FileNotFoundError as error:
        pytest.skip(f"a small file system cannot be mounted here: {error}")
    finally:
        if os.path.ismount(folder):
            subprocess.run(["umount", folder], check=True)


def dedup(shards: Path, out: Path) -> dict:
    config = DedupConfig(shards=[str(shards)], out=str(out), workers=1, samples_per_shard=8, write_dropped=True)
    return run_dedup(config)


def ingest(images: Path, out: Path) -> dict:
    return run_import(ImportConfig(src=[str(images)], out=str(out), samples_per_shard=5))


def bytes_of(out: Path) -> dict[str, bytes]:
    files = [path for path in out.rglob("*") if path.is_file() and path.relative_to(out).parts[0] != "work"]
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def kind(message: str, out: Path) -> str:
    """The file that a message of a full disk names, with a star for its number or digest."""
    said = SAYS.match(message)
    assert said is not None, message
    return re.sub(r"[0-9a-f]{6,}", "*", str(Path(said["path"]).relative_to(out)))


def what_did_not_fit(
    run: Callable[[Path], dict], disk: Callable[[int], Path], expected: dict[str, bytes]
) -> set[str]:
    """Run on a disk that gains a page after each failure; the kinds of files that did not fit.

    After each failure what has its name is whole, nothing else is there, and finished shards are not written again.
    """
    size, failed = 3 * PAGE, set()
    stamps: dict[Path, int] = {}
    while size < 3 << 20:
        out = disk(size) / "out"
        try:
            run(out)
        except UserError as error:
            assert error.exit_code == 1
            failed.add(kind(str(error), out))
            assert bytes_of(out).items() <= expected.items() and not list(out.rglob(".tmp-*"))
            size += PAGE
        else:
            assert bytes_of(out) == expected
            assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
            return failed
        finished = [path for path in out.glob("shards/*.tar") if (out / "work/shards" / f"{path.stem}.json").is_file()]
        assert all(path.stat().st_mtime_ns == stamps.setdefault(path, path.stat().st_mtime_ns) for path in finished)
    raise AssertionError("the disk is large enough by now")


def test_a_full_disk_stops_each_stage_of_curation_which_goes_on_once_there_is_room(shards, tmp_path, disk):
    disk(PAGE)
    dedup(shards, tmp_path / "whole")
    failed = what_did_not_fit(lambda out: dedup(shards, out), disk, bytes_of(tmp_path / "whole"))
    # While the job runs, the rows that were read and those of the ledger lie on the disk once more.
    assert failed >= {"work/read/*.parquet", "work/read/table", "shards/*.tar", "index/embeddings.npy"}
    assert failed & {"work/table", "ledger.parquet"}


def test_a_full_disk_stops_an_import_which_goes_on_once_there_is_room(images, tmp_path, disk):
    disk(PAGE)
    ingest(images, tmp_path / "whole")
    failed = what_did_not_fit(lambda out: ingest(images, out), disk, bytes_of(tmp_path / "whole"))
    assert failed >= {"*.tar", "work/*.parquet"}


def test_the_command_ends_with_one_line_and_its_workers_leave_nothing(shards, sample_shards, run_cli, disk):
    """The worker that has the large shard is ended in the middle of it."""
    out = disk(3 * PAGE) / "out"
    done = run_cli("curate", "dedup", sample_shards[1], shards / "0.tar", out, "--workers", 2)
    last = done.stderr.splitlines()[-1].removeprefix("error: ")
    assert done.returncode == 1 and SAYS.match(last) and "Traceback" not in done.stderr
    assert not list(out.rglob(".tmp-*"))


@contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """No file of this process may grow beyond ``size`` bytes: a full disk for those who may not mount one."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_files_that_may_not_grow_stop_curation_too(shards, tmp_path):
    dedup(shards, tmp_path / "whole")
    sizes = sorted({path.stat().st_size for path in (tmp_path / "whole").rglob("*") if path.is_file()})
    expected, failed = bytes_of(tmp_path / "whole"), set()
    for size in [size for size in sizes if size > PAGE]:
        with no_file_above(size - 1), pytest.raises(UserError, match=SAYS) as raised:
            dedup(shards, tmp_path / "out")
        failed.add(kind(str(raised.value), tmp_path / "out"))
        assert bytes_of(tmp_path / "out").items() <= expected.items() and not list((tmp_path / "out").rglob(".tmp-*"))
    assert failed >= {"work/read/*.parquet", "shards/*.tar"}
    dedup(shards, tmp_path / "out")
    assert bytes_of(tmp_path / "out") == expected


def test_an_index_that_does_not_fit_says_so(tmp_path):
    rows = np.ones((500, 64), np.float16)
    names = [f"{number}" for number in range(500)]
    index = TrainingIndex.build(rows, names, names, names, np.ones(500, bool), np.arange(500), "layout")
    for size in (40_000, 100):  # within the rows, within the header
        with no_file_above(size), pytest.raises(UserError, match=r"embeddings\.npy cannot be written: File too large"):
            index.save(tmp_path / "index")
        assert not list((tmp_path / "index").iterdir())


def test_a_copy_of_an_index_that_does_not_fit_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rows, names = np.eye(64, dtype=np.float16), [f"{number}" for number in range(64)]
    index = TrainingIndex.build(rows, names, names, names, np.ones(64, bool), np.arange(64), "layout")
    index.save(tmp_path / "index")
    with no_file_above(5000), pytest.raises(UserError, match=r"cache.*npy cannot be written: File too large"):
        TrainingIndex.load(f"file://{tmp_path}/index")
    assert (TrainingIndex.load(f"file://{tmp_path}/index").embeddings == rows).all()
