"""One run at a time: who holds a lock, who does not, and what a file system without locks is told."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from errno import EACCES, EIO, ENOLCK, ENOSYS, ENOTSUP

import filelock
import pytest

from afresh.errors import UserError
from afresh.runs import locked, try_lock
from tests.conftest import ROOT


def test_a_second_run_is_told_that_another_one_writes(tmp_path):
    lock = tmp_path / "lock"
    with locked(tmp_path, lock):
        with pytest.raises(UserError, match="another run is writing to this folder"), locked(tmp_path, lock):
            pass
        assert try_lock(lock) is None
    with locked(tmp_path, lock):
        pass


HOLDING = """
import sys, time
from afresh.runs import locked
with locked("x", sys.argv[1]):
    print(1, flush=True)
    time.sleep(60)
"""


def test_the_system_lifts_the_lock_of_a_killed_run(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLDING, str(tmp_path / "lock")], cwd=ROOT, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"1\n"
        assert try_lock(tmp_path / "lock") is None
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    with locked(tmp_path, tmp_path / "lock"):
        pass


@pytest.mark.parametrize("number", [ENOTSUP, EACCES])
def test_a_file_system_without_locks_is_not_another_run(tmp_path, monkeypatch, number):
    def refuse(self, *args, **options):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    reason = rf"lock: cannot be locked \({os.strerror(number)}\)"
    with pytest.raises(UserError, match=reason), locked("x", tmp_path / "lock"):
        pass


@pytest.mark.skipif(os.name == "nt", reason="flock is none of Windows")
@pytest.mark.parametrize("number", [ENOSYS, ENOLCK, EIO])
def test_what_flock_cannot_do_is_neither_a_lock_nor_another_run(tmp_path, monkeypatch, number):
    import fcntl

    def refuse(file, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    for _ in range(2):  # a file that a run left behind is no lock
        with pytest.raises(UserError, match=rf"cannot be locked \(.*{os.strerror(number)}"):
            try_lock(tmp_path / "lock")


@pytest.mark.skipif(os.name == "nt", reason="flock is none of Windows")
def test_an_error_that_a_lock_takes_for_its_holder_is_told_apart(tmp_path, monkeypatch):
    import fcntl

    def busy(self, *args, **options):  # as older filelocks make of any error
        raise filelock.Timeout(str(tmp_path / "lock"))

    def refuse(file, operation):
        raise OSError(ENOLCK, os.strerror(ENOLCK))

    monkeypatch.setattr(filelock.FileLock, "acquire", busy)
    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(UserError, match="No locks available"):
        try_lock(tmp_path / "lock")


def test_the_file_that_is_locked_keeps_what_it_holds(tmp_path):
    (tmp_path / "lock").write_text("something")
    with locked(tmp_path, tmp_path / "lock"):
        pass
    assert (tmp_path / "lock").read_text() == "something"
