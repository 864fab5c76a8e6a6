"""Ray gives what this machine's processes give, to the byte, and either goes on where the other one stopped."""

from __future__ import annotations

import importlib.util
import os
import shutil

import pytest

from afresh.errors import UsageError, UserError
from curate.dedup import run_dedup
from curate.engines.ray import RayEngine
from curate.engines.registry import open_engine
from tests.curate.engines.deadly import (
    OnGpu,
    die_at_three,
    die_once,
    fail_at_two,
    niceness,
    process_id,
    seen_gpus,
    square,
)
from tests.curate.made_mess import promised, settings

there = importlib.util.find_spec("ray") is not None
needs_ray = pytest.mark.skipif(not there, reason="the extra ray is not installed")


def test_a_missing_extra_is_named(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "ray" else find(name, *rest))
    for name in ("ray", "ray:auto", "ray://somewhere:10001"):
        with pytest.raises(UsageError, match=r"pip install 'afresh\[ray\]'"):
            open_engine(name, 1)


@pytest.fixture(scope="module")
def ray():
    """Ray on this machine, of two processors."""
    with RayEngine(2) as engine:
        yield engine


@needs_ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_results_come_in_the_order_of_the_tasks(ray):
    assert ray.map(square, range(300), desc="squaring") == [number**2 for number in range(300)]
    assert ray.map(square, [], desc="squaring") == []
    assert len(set(ray.map(process_id, range(8), desc="asking"))) <= 2


@needs_ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_workers_have_the_priority_of_who_started_them(ray):
    assert set(ray.map(niceness, range(4), desc="asking")) == {os.nice(0)}


@needs_ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_error_is_raised_as_it_was(ray):
    with pytest.raises(UserError, match="^shard two is broken$"):
        ray.map(fail_at_two, range(5), desc="failing")


@needs_ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_lost_worker_costs_its_task_alone_and_a_deadly_task_is_named(ray, tmp_path):
    tasks = [(str(tmp_path), number) for number in range(6)]
    assert ray.map(die_once, tasks, desc="reading") == list(range(6))
    with pytest.raises(UserError, match="killed while reading 3, 3 times each"):
        ray.map(die_at_three, range(5), desc="reading")


@pytest.mark.parametrize(
    "engine", ["local", pytest.param("ray", marks=[needs_ray, pytest.mark.slow, pytest.mark.timeout(900)])]
)
def test_a_curation_within_cells_has_the_same_bytes_on_two_workers(mess, tmp_path, engine):
    run_dedup(settings(mess, tmp_path / "one", join="cells"))
    run_dedup(settings(mess, tmp_path / "two", join="cells", engine=engine, workers=2))
    assert promised(tmp_path / "one") == promised(tmp_path / "two")
    assert not [path for path in (tmp_path / "two/work").glob("pairs-*") if path.is_dir()]


@needs_ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_curation_on_ray_has_the_same_bytes_begun_there_or_finished_there(ray, curated, mess, tmp_path):
    there = settings(mess, tmp_path / "ray", engine="ray", workers=2)
    run_dedup(there)
    assert promised(tmp_path / "ray") == promised(curated[0])
    for name, first, second in (("one", "ray", "local"), ("other", "local", "ray")):
        out = tmp_path / name
        shutil.copytree(tmp_path / "ray" if first == "ray" else curated[0], out)
        caches = sorted((out / "work/read").glob("*.parquet"))
        times = {path: path.stat().st_mtime_ns for path in caches}
        for path in (caches[1], out / "shards/000000.tar"):
            path.unlink()
        run_dedup(settings(mess, out, engine=second))
        assert promised(out) == promised(curated[0])
        assert {path for path in caches if path.stat().st_mtime_ns != times[path]} == {caches[1]}


@needs_ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_task_sees_the_gpu_that_it_was_given():
    import ray as its_own

    if its_own.is_initialized():
        its_own.shutdown()
    its_own.init(num_cpus=2, num_gpus=2, include_dashboard=False)  # Ray believes that there are two
    try:
        with RayEngine(2) as engine:
            assert engine.gpus == 2
            seen = engine.map(seen_gpus, [OnGpu(1.0)] * 6, desc="asking")
            assert {gpus for _, gpus in seen} == {"0", "1"}
            halves = engine.map(seen_gpus, [OnGpu(0.5)] * 4, desc="asking")
            assert {gpus for _, gpus in halves} <= {"0", "1"}
    finally:
        its_own.shutdown()
