"""A curation whose workers, machines or driver are lost on the way gives the same bytes."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from afresh.errors import UserError
from curate.dedup import run_dedup
from curate.engines.registry import open_engine
from curate.neighbors.cells import find_pairs_in_cells
from curate.neighbors.verify import Pairs
from curate.stages.cells import pairs_by_tasks
from tests.curate.made_mess import promised, settings

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="the extra ray is not installed")
STAGES = {"read": "work/read/.tmp-*", "write": "shards/.tmp-*", "publish": "index/index.json"}


def local_workers() -> list[int]:
    return [child.pid for child in multiprocessing.active_children() if child.pid]


def ray_workers() -> list[int]:
    """Workers that run a task and stem from this process."""
    parents, titles = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            titles[int(folder.name)] = (folder / "cmdline").read_bytes()
        except OSError:
            continue

    def ours(process: int) -> bool:
        while process > 1 and process != os.getpid():
            process = parents.get(process, 0)
        return process == os.getpid()

    at_work = tuple(f"ray::{task}".encode() for task in ("reading", "joining", "writing", "picturing"))
    return [process for process, title in titles.items() if title.startswith(at_work) and ours(process)]


@contextmanager
def when_there(out: Path, pattern: str, act: Callable[[], bool]) -> Iterator[list[bool]]:
    """Act once when a file of that pattern is in ``out``, until it has worked; the list tells whether it has."""
    done, over = [], threading.Event()

    def watch() -> None:
        while not over.is_set() and not done:
            if any(out.glob(pattern)) and act():
                done.append(True)
            time.sleep(0.001)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield done
    finally:
        over.set()
        thread.join()


def kill_one(workers: Callable[[], list[int]]) -> bool:
    for process in workers()[:1]:
        os.kill(process, signal.SIGKILL)
        return True
    return False


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("engine", ["local", pytest.param("ray", marks=needs_ray)])
def test_a_worker_that_is_killed_in_a_stage(curated, mess, tmp_path, stage, engine):
    out, workers = tmp_path / "out", {"local": local_workers, "ray": ray_workers}[engine]
    with when_there(out, STAGES[stage], lambda: kill_one(workers)) as killed:
        run_dedup(settings(mess, out, workers=2, engine=engine, samples_per_shard=10))
    run_dedup(settings(mess, tmp_path / "quiet", samples_per_shard=10))
    assert killed and promised(out) == promised(tmp_path / "quiet")


def test_a_shard_that_kills_its_workers_is_named_when_the_others_are_read(mess, tmp_path, monkeypatch):
    (tmp_path / "deadly.py").write_text(
        "import os, signal\n"
        "def spare(sample):\n"
        "    if sample.shard == 'b.tar':\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return True\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.syspath_prepend(str(tmp_path))
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"killed while reading b\.tar, 3 times each; all else of this stage"):
        run_dedup(settings(mess, out, workers=2, steps=["deadly:spare"]))
    assert len(list((out / "work/read").glob("*.parquet"))) == len(list(mess.glob("*.tar"))) - 1


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    """A file of rows for some tasks of the join: a tenth are near copies, and a thousand are copies of one."""
    n, d, rng = 40_000, 16, np.random.default_rng(0)
    rows = rng.standard_normal((n, d), dtype=np.float32)
    copies = rng.choice(n, n // 10, replace=False)
    rows[copies] = rows[rng.integers(0, n, n // 10)]
    rows[rng.choice(n, 1000, replace=False)] = rows[0]
    rows += 0.02 * rng.standard_normal((n, d), dtype=np.float32)
    path = tmp_path_factory.mktemp("rows") / "rows.npy"
    np.save(path, rows.astype(np.float16))
    return path


def join(rows: Path, folder: Path, engine: str = "local", workers: int = 1) -> Pairs:
    with open_engine(engine, workers) as opened:
        return pairs_by_tasks(opened, folder, np.load(rows), 0.95, 100, 10**9, "joining")


def same_pairs(found: Pairs, rows: Path) -> bool:
    expected = find_pairs_in_cells(np.load(rows), 0.95, crowd=100)
    bits = [getattr(found, name).tobytes() == getattr(expected, name).tobytes() for name in ("i", "j", "similarity")]
    return all(bits) and found.crowd is not None and np.array_equal(found.crowd.rows, expected.crowd.rows)


@pytest.mark.parametrize("files", ["cells", "pairs"])
@pytest.mark.parametrize("engine", ["local", pytest.param("ray", marks=needs_ray)])
def test_a_worker_that_is_killed_in_the_join(rows, tmp_path, engine, files):
    workers = {"local": local_workers, "ray": ray_workers}[engine]
    with when_there(tmp_path, f".tmp-*-{files}-*", lambda: kill_one(workers)) as killed:
        found = join(rows, tmp_path, engine, 2)
    assert killed and same_pairs(found, rows)


@pytest.mark.parametrize("files", ["cells", "pairs"])
@pytest.mark.parametrize("engine", ["local", pytest.param("ray", marks=needs_ray)])
def test_a_driver_that_is_killed_in_the_join_and_run_again_here(rows, tmp_path, engine, files):
    out, root = tmp_path / "out", str(Path(__file__).parents[2])
    code = (
        "from pathlib import Path\n"
        "from tests.curate.test_lost_workers import join\n"
        f"if __name__ == '__main__': join(Path({str(rows)!r}), Path({str(out)!r}), {engine!r}, 2)\n"
    )
    (tmp_path / "driver.py").write_text(code)
    environment = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    process = subprocess.Popen([sys.executable, str(tmp_path / "driver.py")], cwd=root, env=environment)
    deadline = time.monotonic() + 300
    while not list(out.glob(f"{files}-*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.0005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    there = {path: path.stat().st_mtime_ns for path in out.glob(f"{files}-*")}
    assert there
    assert same_pairs(join(rows, out), rows)
    assert all(path.stat().st_mtime_ns == before for path, before in there.items())


@needs_ray
def test_a_driver_on_ray_that_is_killed_and_run_again_here(curated, mess, tmp_path):
    out, root = tmp_path / "out", str(Path(__file__).parents[2])
    command = [sys.executable, "-m", "curate", "dedup", str(mess), str(out), "--engine", "ray", "--workers", "2"]
    process = subprocess.Popen(
        [*command, "--batch_size", "32"], cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 300
    while not list(out.glob("work/read/*.parquet")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert not (out / "summary.json").exists()
    run_dedup(settings(mess, out))
    assert promised(out) == promised(curated[0])


@needs_ray
def test_a_machine_that_is_taken_from_the_cluster(curated, mess, tmp_path):
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        second = cluster.add_node(num_cpus=1)
        out = tmp_path / "out"

        def take() -> bool:
            cluster.remove_node(second)
            return True

        with when_there(out, STAGES["read"], take) as taken:
            run_dedup(settings(mess, out, workers=2, engine=f"ray:{cluster.address}"))
        assert taken and promised(out) == promised(curated[0])
    finally:
        ray.shutdown()
        cluster.shutdown()


@needs_ray
@pytest.mark.parametrize("files", ["cells", "pairs"])
def test_a_machine_that_is_taken_from_the_cluster_in_the_join(rows, tmp_path, files):
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        second = cluster.add_node(num_cpus=1)

        def take() -> bool:
            cluster.remove_node(second)
            return True

        with when_there(tmp_path, f"{files}-*", take) as taken:
            found = join(rows, tmp_path, f"ray:{cluster.address}", 2)
        assert taken and same_pairs(found, rows)
    finally:
        ray.shutdown()
        cluster.shutdown()
