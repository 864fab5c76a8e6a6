"""Cores: shared out by size, and threads that give their results in order and run ahead no further than told."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from afresh import cores
from afresh.cores import WAITING, cpu_count, cpu_quota, in_order, share_the_machine, shares
from afresh.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def square(number: int) -> int:
    return number * number


def fail_at_two(number: int) -> int:
    if number == 2:
        raise UserError("shard two is broken")
    return number


# -------------------------------------------------------------------------------------------------- cores at hand


def machine(root: Path, own: str, files: dict[str, str]) -> Path:
    """A file system with the control groups of a process."""
    for name, text in {"proc/self/cgroup": own, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


V1 = "9:name=systemd:/\n4:cpu,cpuacct:/docker/abc\n2:memory:/docker/abc\n"


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1.5),
        ("0::/job/step\n", {"sys/fs/cgroup/job/cpu.max": "50000 100000\n", "sys/fs/cgroup/cpu.max": "max 100000"}, 0.5),
        ("0::/job\n", {"sys/fs/cgroup/job/cpu.max": "400000 100000", "sys/fs/cgroup/cpu.max": "300000 100000"}, 3.0),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        ("0::/\n", {}, None),
        (
            V1,
            {
                "sys/fs/cgroup/cpu,cpuacct/docker/abc/cpu.cfs_quota_us": "200000\n",
                "sys/fs/cgroup/cpu,cpuacct/docker/abc/cpu.cfs_period_us": "100000\n",
            },
            2.0,
        ),
        (  # in a container its own group is the root of what it sees
            V1,
            {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "250000", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "50000"},
            5.0,
        ),
        (V1, {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"}, None),
    ],
)
def test_a_control_groups_quota_is_found_in_both_versions(tmp_path, own, files, expected):
    assert cpu_quota(machine(tmp_path, own, files)) == expected


def test_without_control_groups_there_is_no_quota(tmp_path):
    assert cpu_quota(tmp_path) is None


def test_cores_are_those_of_the_affinity_and_of_the_quota(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    for quota, expected in ((None, 8), (2.5, 2), (0.5, 1), (64.0, 8)):
        monkeypatch.setattr(cores, "cpu_quota", lambda quota=quota: quota)
        assert cpu_count() == expected
        environment: dict[str, str] = {}
        share_the_machine(environment)
        assert environment.get("OMP_NUM_THREADS") == (str(expected) if expected < 8 else None)


@pytest.mark.parametrize("own", [{"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "9"}, {"KMP_BLOCKTIME": "200"}])
def test_what_the_user_has_set_stays(monkeypatch, own):
    monkeypatch.setattr(cores, "cpu_quota", lambda: 0.5)
    environment = {**own, "OMP_NUM_THREADS": "3"}
    share_the_machine(environment)
    assert environment == {**own, "OMP_NUM_THREADS": "3"}


@pytest.mark.parametrize("package", ["train", "curate"])
def test_a_job_started_by_hand_and_its_workers_wait_without_spinning_for_long(package):
    # What the job's process and a process that it starts have in their environment when torch is loaded.
    program = f"""
import json, os, subprocess, sys
from {package}.cli import main
main(["--version"])
assert "torch" not in sys.modules
worker = subprocess.run([sys.executable, "-c", "import json, os; print(json.dumps(dict(os.environ)))"],
                        stdout=subprocess.PIPE, check=True).stdout
print(json.dumps([dict(os.environ), json.loads(worker)]))
"""
    env = {name: value for name, value in os.environ.items() if name not in (*WAITING, "OMP_WAIT_POLICY")}
    env["PYTHONPATH"] = str(ROOT)
    done = subprocess.run([sys.executable, "-c", program], env=env, stdout=subprocess.PIPE, check=True)
    for seen in json.loads(done.stdout.splitlines()[-1]):
        assert seen.items() >= WAITING.items()


def test_launch_sh_sets_the_same():
    (line,) = re.findall(r"^  export (GOMP_SPINCOUNT.*)$", (ROOT / "launch.sh").read_text(), re.MULTILINE)
    assert dict(word.split("=") for word in line.split()) == WAITING


# ------------------------------------------------------------------------------------------------ work on threads


def test_threads_are_shared_out_by_size():
    assert shares([1000], 8) == [8]
    assert shares([9000, 100, 100], 8) == [8, 1, 1]
    assert shares([500, 500], 2) == shares([1, 1, 1, 1], 2)[:2] == [1, 1]
    assert shares([500, 500, 500], 8) == [3, 3, 3]
    assert shares([9000, None], 4) == shares([0, 0], 4) == [2, 2]
    assert shares([], 4) == []


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_what_runs_on_threads_comes_in_order(threads):
    def late_first(number: int) -> int:
        time.sleep(0.01 if number % 5 == 0 else 0)
        return number * number

    done = in_order(late_first, iter(range(60)), threads, at_most=9, weigh=lambda _: 1, weight=100)
    assert list(done) == [number * number for number in range(60)]


@pytest.mark.parametrize("limits", [{"at_most": 5, "weight": 10**9}, {"at_most": 10**9, "weight": 5}])
def test_threads_run_ahead_no_further_than_they_may(limits):
    taken = 0

    def items():
        nonlocal taken
        for number in range(50):
            taken += 1
            yield number

    for done, _ in enumerate(in_order(square, items(), 3, weigh=lambda _: 1, **limits)):
        assert taken - done <= 5 + 1
    assert taken == 50


def test_what_weighs_more_than_is_held_goes_alone():
    running = 0

    def alone(_: int) -> int:
        nonlocal running
        running += 1
        time.sleep(0.002)
        seen, running = running, running - 1
        return seen

    assert set(in_order(alone, range(9), 4, at_most=99, weigh=lambda _: 1000, weight=10)) == {1}


def test_an_error_comes_in_its_place_and_no_thread_stays_behind():
    before = threading.active_count()
    done = in_order(fail_at_two, range(100), 4, at_most=50, weigh=lambda _: 1, weight=99)
    assert [next(done), next(done)] == [0, 1]
    with pytest.raises(UserError, match="shard two"):
        next(done)
    assert threading.active_count() == before
    left = in_order(square, range(100), 4, at_most=50, weigh=lambda _: 1, weight=99)
    next(left)
    left.close()
    assert threading.active_count() == before
