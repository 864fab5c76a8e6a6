"""Curation writes the same bytes wherever and however it was run: again, moved, killed, with other settings."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from afresh.errors import UserError
from curate.dedup import run_dedup
from tests.curate.made_mess import promised, settings


@pytest.mark.parametrize(("workers", "join_memory"), [(1, 2.0), (2, 1e-9)])
def test_the_same_input_gives_the_same_bytes_anywhere(curated, mess, tmp_path, workers, join_memory):
    shutil.copytree(mess, tmp_path / "moved")
    run_dedup(settings(tmp_path / "moved", tmp_path / "out", workers=workers, join_memory=join_memory))
    assert promised(tmp_path / "out") == promised(curated[0])


def test_inputs_are_not_touched(mess, tmp_path):
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in mess.iterdir()}
    run_dedup(settings(mess, tmp_path / "out"))
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in mess.iterdir()} == before


def test_a_second_run_reads_only_what_is_missing_and_gives_the_same(curated, mess, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(curated[0], out)
    caches = sorted((out / "work" / "read").glob("*.parquet"))
    times = {path: path.stat().st_mtime_ns for path in caches}
    caches[1].unlink()
    (out / "shards" / "000000.tar").unlink()
    (out / ".tmp-1-ledger.parquet").write_bytes(b"left over by a killed run")
    run_dedup(settings(mess, out))
    assert {path for path in caches if path.stat().st_mtime_ns != times[path]} == {caches[1]}
    assert promised(out) == promised(curated[0])


def test_a_killed_run_is_continued_to_the_same_bytes(curated, mess, tmp_path):
    out = tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "curate",
        "dedup",
        str(mess),
        str(out),
        "--workers",
        "1",
        "--batch_size",
        "32",
    ]
    root = str(Path(__file__).parents[2])
    for expected in ("work/read/*.parquet", "work/shards/*.json"):
        process = subprocess.Popen(command, cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while not list(out.glob(expected)) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        for parquet in out.rglob("[!.]*.parquet"):
            pq.read_metadata(parquet)  # what stands under its name is whole
    run_dedup(settings(mess, out))
    assert promised(out) == promised(curated[0])


def test_a_changed_setting_or_input_is_noticed_and_gives_what_a_fresh_run_gives(
    curated, mess, tmp_path, capsys
):
    out, moved = tmp_path / "out", tmp_path / "mess"
    shutil.copytree(mess, moved)
    run_dedup(settings(moved, out))
    run_dedup(settings(moved, out, threshold=0.99, samples_per_shard=20))
    assert "threshold: 0.9 → 0.99" in capsys.readouterr().err
    run_dedup(settings(moved, tmp_path / "fresh", threshold=0.99, samples_per_shard=20))
    assert promised(out) == promised(tmp_path / "fresh") != promised(curated[0])
    (moved / "b.tar").unlink()
    run_dedup(settings(moved, out))
    assert "1 gone" in capsys.readouterr().err
    run_dedup(settings(moved, tmp_path / "fresh"))
    assert promised(out) == promised(tmp_path / "fresh")


@pytest.mark.skipif(os.name == "nt", reason="the lock needs fcntl")
def test_two_runs_do_not_write_to_one_folder_at_once(curated, mess):
    import fcntl

    with open(curated[0] / "work" / "lock", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another run"):
            run_dedup(settings(mess, curated[0]))


def test_a_job_that_was_narrowed_and_widened_again_reads_nothing_twice(curated, mess, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(curated[0], out)
    caches = {path: path.stat().st_mtime_ns for path in (out / "work").rglob("*.parquet")}
    run_dedup(settings(mess / "a.tar", out))
    run_dedup(settings(mess, out))
    assert {path: path.stat().st_mtime_ns for path in caches} == caches
    assert promised(out) == promised(curated[0])


def test_caches_that_nobody_used_for_a_month_go(curated, mess, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(curated[0], out)
    read = sorted((out / "work" / "read").glob("*.parquet"))
    for age, path in ((29, out / "work" / "read" / "young.parquet"), (31, out / "work" / "pairs-old.parquet")):
        shutil.copy(read[0], path)
        os.utime(path, (time.time() - age * 24 * 3600,) * 2)
    for path in read:
        os.utime(path, (time.time() - 99 * 24 * 3600,) * 2)  # and used now
    joins = [out / "work/pairs-stopped-before", out / "work/pairs-stopped-now"]
    for folder in joins:
        folder.mkdir()
        (folder / "vectors").touch()
    os.utime(joins[0], (time.time() - 99 * 24 * 3600,) * 2)
    run_dedup(settings(mess, out))
    assert set((out / "work" / "read").glob("*.parquet")) == {*read, out / "work" / "read" / "young.parquet"}
    assert not (out / "work" / "pairs-old.parquet").exists()
    assert all(time.time() - path.stat().st_atime < 3600 for path in read)
    assert [folder.exists() for folder in joins] == [False, True]
