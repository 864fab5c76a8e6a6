"""A curation from and to S3 has the bytes of one on a local disk, whatever the store does on the way."""

from __future__ import annotations

import hashlib
import importlib.util
import os

import pytest

from afresh.errors import UserError
from curate.dedup import run_dedup
from curate.index import TrainingIndex
from tests.curate.faulty_store import s3_server
from tests.curate.made_mess import promised, settings

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        not all(map(importlib.util.find_spec, ("s3fs", "moto", "flask"))), reason="moto's server and s3fs are needed"
    ),
]


@pytest.fixture
def store(monkeypatch, tmp_path):
    """An S3 file system of a server on loopback, and the proxy before it."""
    import s3fs

    with s3_server() as (url, proxy):
        monkeypatch.setenv("FSSPEC_S3_ENDPOINT_URL", url)
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "testing")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        s3fs.S3FileSystem.clear_instance_cache()
        proxy.faulty = False
        files = s3fs.S3FileSystem()
        if files.exists("set"):  # moto's, which has one memory for all servers of a process
            files.rm("set", recursive=True)
        files.mkdir("set")
        yield files, proxy
        s3fs.S3FileSystem.clear_instance_cache()


def written(files, root: str) -> dict[str, str]:
    """Hashes of what lies at a URL and is promised to be alike."""
    found = {path.removeprefix(f"{root}/"): files.cat_file(path) for path in files.find(root)}
    return {name: hashlib.sha256(data).hexdigest() for name, data in found.items() if not name.startswith("work/")}


def test_from_and_to_s3_by_a_store_that_throttles_drops_and_cuts(store, curated, mess, tmp_path):
    files, proxy = store
    for shard in mess.glob("*.tar"):
        files.put_file(str(shard), f"set/raw/{shard.name}")
    proxy.faulty = True
    config = settings(mess, "s3://set/out", work_dir=str(tmp_path / "work"))
    config.shards = ["s3://set/raw/*.tar"]
    for _ in range(20):  # what a store fails at again and again ends the job, and the same command goes on
        try:
            run_dedup(config)
            break
        except UserError as error:
            assert "s3://" in str(error)
    proxy.faulty = False
    assert {"throttled", "dropped", "upload cut", "download cut"} <= proxy.faults.keys(), proxy.faults
    files.invalidate_cache()
    assert written(files, "set/out") == promised(curated[0])
    index, local = TrainingIndex.load("s3://set/out"), TrainingIndex.load(curated[0])
    assert index.digest == local.digest and index.captions == local.captions


def test_another_machine_goes_on_at_the_url(store, curated, mess, tmp_path):
    files, _ = store
    run_dedup(settings(mess, "s3://set/out", work_dir=str(tmp_path / "one")))
    files.rm_file("set/out/shards/000000.tar")
    files.invalidate_cache()
    run_dedup(settings(mess, "s3://set/out", work_dir=str(tmp_path / "other"), workers=2))
    files.invalidate_cache()
    assert written(files, "set/out") == promised(curated[0]) and os.listdir(tmp_path / "other")
