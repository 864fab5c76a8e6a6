"""Fixtures for every test: the carried sample set, a tiny pipeline, and the command line as a user has it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# Set before any library reads it: nothing in the suite may reach for a model hub.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ.setdefault("MPLBACKEND", "Agg")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _quiet_machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Offline, on at most two threads, and outside any launched job, also for the processes a test starts.

    Threads are set again at the end, for the fixtures of the next module, which come before this one.
    """
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    threads = str(min(2, int(os.environ.get("OMP_NUM_THREADS") or 2)))
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "ACCELERATE_USE_CPU", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)

    def set_threads() -> None:
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(int(threads))

    set_threads()
    yield
    set_threads()


@pytest.fixture(scope="session")
def sample_shards() -> list[str]:
    """Paths of the four carried tar shards."""
    from curate.sample_set import sample_shards

    return sample_shards()


@pytest.fixture(scope="session")
def emoji(sample_shards: list[str]) -> list[tuple]:
    """The first 64 carried samples as (PIL image, caption)."""
    from itertools import islice

    from curate.reading.images import decode_image
    from curate.reading.samples import read_samples

    samples = islice(read_samples(sample_shards[0]), 64)
    return [(decode_image(sample.image), sample.caption) for sample in samples]


@pytest.fixture(scope="session")
def tiny_pipe():
    """A randomly initialised Stable Diffusion pipeline of 64×64 pixels; do not change it in place."""
    import torch

    from train.sample_model.small import tiny_pipeline

    torch.set_num_threads(min(2, torch.get_num_threads()))
    return tiny_pipeline(seed=0)


@pytest.fixture(scope="session")
def sample_model() -> Path:
    """Folder of the carried sample model."""
    import train

    return Path(train.__file__).parent / "assets" / "sample_model"


@pytest.fixture
def run_cli(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """``run_cli("curate", "dedup", ...)`` runs ``python -m curate dedup ...`` and returns what became of it.

    The working folder is the test's own; ``stdout``, ``stderr`` and ``returncode`` are on the result.
    """

    def run(
        package: str, *args: object, timeout: float = 240, **env: str
    ) -> subprocess.CompletedProcess[str]:
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        return subprocess.run(
            [sys.executable, "-m", package, *map(str, args)],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            timeout=timeout,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), **env},
        )

    return run
