"""The join within cells as tasks: the bits of one machine's, on every engine, and goes on where it was stopped."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from afresh.errors import UserError
from curate.engines.local import LocalEngine
from curate.neighbors.cells import find_pairs_in_cells
from curate.neighbors.tiles import bytes_a_row
from curate.neighbors.verify import Pairs
from curate.stages.cells import Cells, pairs_by_tasks

N, D = 30_000, 16
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="the extra ray is not installed")


class Counting(LocalEngine):
    """This process, which counts the tasks and may stop before some of them."""

    def __init__(self, stop_at: int | None = None) -> None:
        super().__init__(1)
        self.done, self.stop_at = 0, stop_at

    def map(self, function, tasks, **options):
        def run(task):
            if self.done == self.stop_at:
                raise KeyboardInterrupt
            self.done += 1
            function(task)

        return super().map(run, tasks, **options)


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    """A tenth near copies of others; one row has three thousand."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((N, D)) * np.arange(1, D + 1) ** -0.3
    copies = rng.choice(N, N // 10, replace=False)
    rows[copies] = rows[rng.integers(0, N, N // 10)]
    rows[rng.choice(N, 3000, replace=False)] = rows[0]
    rows += 0.1 * rng.standard_normal((N, D)) * np.linalg.norm(rows, axis=1, keepdims=True) / D**0.5
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


@pytest.fixture(scope="module")
def expected(rows) -> Pairs:
    return find_pairs_in_cells(rows, 0.95, crowd=100, threads=1)


def same(found: Pairs, expected: Pairs) -> bool:
    assert found.crowd is not None and expected.crowd is not None
    bits = all(getattr(found, name).tobytes() == getattr(expected, name).tobytes() for name in ("i", "j", "similarity"))
    return bits and found.crowd.rows.tolist() == expected.crowd.rows.tolist()


def join(engine, folder: Path, rows: np.ndarray, memory: int = 10**9) -> Pairs:
    return pairs_by_tasks(engine, folder, rows, 0.95, 100, memory, "joining")


@pytest.mark.parametrize("workers", [1, 2])
def test_tasks_find_what_one_process_finds(rows, expected, tmp_path, workers):
    assert len(expected.crowd.rows) > 2500 and len(expected) > 2000
    with LocalEngine(workers) as engine:
        assert same(join(engine, tmp_path, rows), expected)
    assert len(list(tmp_path.glob("cells-*"))) == 4 and len(list(tmp_path.glob("pairs-*"))) > 4


def test_little_memory_cuts_large_cells_into_parts(rows, expected, tmp_path):
    memory = 2000 * bytes_a_row(D, 2)
    assert same(join(LocalEngine(1), tmp_path, rows, memory), expected)
    tasks = len(list(tmp_path.glob("pairs-*")))
    assert tasks > 50
    assert same(join(LocalEngine(1), tmp_path, rows), expected)  # and with more again
    assert 0 < len(list(tmp_path.glob("pairs-*"))) - tasks < tasks


def test_a_join_that_was_stopped_goes_on_with_what_is_missing(rows, expected, tmp_path):
    whole = Counting()
    join(whole, tmp_path / "whole", rows)
    stopped, again = Counting(stop_at=6), Counting()
    with pytest.raises(KeyboardInterrupt):
        join(stopped, tmp_path / "stopped", rows)
    assert same(join(again, tmp_path / "stopped", rows), expected)
    assert stopped.done + again.done == whole.done and again.done > 3


def test_files_that_no_other_machine_sees_are_named(rows, tmp_path):
    class Elsewhere:
        def map(self, function, tasks, **options):
            return [None for _ in tasks]

    with pytest.raises(UserError, match="rows from 0 was done on another machine"):
        join(Elsewhere(), tmp_path, rows)


def test_a_row_that_is_not_finite_is_named(rows, tmp_path):
    broken = rows.copy()
    broken[20_007, 3] = np.nan
    with pytest.raises(ValueError, match="row 20007 is not finite"):
        join(LocalEngine(1), tmp_path, broken)


def test_tasks_are_few_and_even_whatever_the_number_of_rows():
    for n, cells in ((10_000, 9), (2_000_000, 1953), (100_000_000, 65_536), (5_000_000_000, 65_536)):
        files = Cells(Path("folder"), n, 256, "<f2", 0.9, 100, cells, 3, 0)
        tasks = -(-n // files.rows_a_task)
        assert tasks <= 4096 and files.rows_a_task % min(8192, (1 << 24) // cells) == 0
        assert tasks >= min(60, n / 8192)


@needs_ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ray_finds_what_one_process_finds_and_goes_on_with_its_files(rows, expected, tmp_path):
    from curate.engines.ray import RayEngine

    stopped = Counting(stop_at=6)
    with pytest.raises(KeyboardInterrupt):
        join(stopped, tmp_path / "begun", rows)
    with RayEngine(2) as engine:
        assert same(join(engine, tmp_path / "ray", rows), expected)
        assert same(join(engine, tmp_path / "begun", rows), expected)


@needs_ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_machines_find_what_one_finds(rows, expected, tmp_path):
    import ray
    from ray.cluster_utils import Cluster

    from curate.engines.ray import RayEngine

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        cluster.add_node(num_cpus=1)
        with RayEngine(2, cluster.address) as engine:
            assert same(join(engine, tmp_path, rows), expected)
    finally:
        ray.shutdown()
        cluster.shutdown()
