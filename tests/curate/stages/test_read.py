"""The read stage decodes no more than it needs, on all cores, and writes what it wrote on one."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from curate.config import DedupConfig
from curate.dedup import run_dedup
from curate.embed.registry import load_embedder
from curate.engines.local import LocalEngine
from curate.reading.images import decode_image, decode_scaled, image_array, shrunk
from curate.reading.writing import write_shard
from curate.results.ledger import read_ledger
from curate.stages import read
from curate.stages.read import SCALE_TO_SPARE, read_stage


def encode(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def photographs(emoji, count: int, side: int) -> list[Image.Image]:
    """Sample images enlarged, shaded and given grain at several scales: as hard to code as photographs."""
    rng = np.random.default_rng(0)
    made = []
    for image, _ in emoji[:count]:
        pixels = np.asarray(image.resize((side, side), Image.Resampling.BICUBIC), dtype=np.float32)
        y, x = np.mgrid[:side, :side] / side
        pixels = pixels * 0.7 + 60 * np.sin(5 * x + rng.uniform(0, 6))[..., None] * np.cos(4 * y)[..., None] + 40
        for scale, strength in ((1, 5), (2, 6), (4, 7), (16, 9)):
            grain = rng.standard_normal((side // scale, side // scale)).astype(np.float32)
            grain = np.asarray(Image.fromarray(grain).resize((side, side), Image.Resampling.BICUBIC))
            pixels += strength * grain[..., None]
        made.append(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)))
    return made


@pytest.fixture(scope="module")
def large(emoji) -> list[bytes]:
    """JPEGs of 512 pixels a side, of several qualities, subsamplings and kinds."""
    options = [
        {"quality": 90},
        {"quality": 60},
        {"quality": 95, "subsampling": 0},
        {"quality": 85, "progressive": True},
    ]
    return [encode(image, **options[i % 4]) for i, image in enumerate(photographs(emoji, 24, 512))]


def settings(shards: Path, out: Path, **changes) -> DedupConfig:
    return DedupConfig(**{"shards": [str(shards)], "out": str(out), "workers": 1, "batch_size": 16, **changes})


def read_rows(shard: Path, out: Path, **changes) -> bytes:
    """The cache file of one shard."""
    config = settings(shard, out, **changes)
    (out / "read").mkdir(parents=True)
    engine = LocalEngine(config.workers)
    (cache,) = read_stage(engine, out, [str(shard)], [shard.name], ["cache"], config)
    return cache.read_bytes()


@pytest.fixture(scope="module")
def cuttings() -> list[bytes]:
    """Pieces of a real photograph as JPEGs of many shapes, qualities and subsamplings."""
    import matplotlib

    photograph = Image.open(Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg").convert("RGB")
    rng = np.random.default_rng(0)
    pieces = []
    for _ in range(40):
        side = int(rng.integers(200, min(photograph.size) + 1))
        left, top = (int(rng.integers(0, length - side + 1)) for length in photograph.size)
        width = int(rng.integers(256, 1024))
        piece = photograph.crop((left, top, left + side, top + side)).resize((width, width + int(rng.integers(0, 200))))
        pieces.append(encode(piece, quality=int(rng.integers(50, 96)), subsampling=int(rng.integers(0, 3))))
    return pieces


@pytest.mark.parametrize("name", ["layout", "copy-detector"])
def test_embedders_hardly_see_at_which_scale_an_image_was_decoded(large, cuttings, name):
    embedder = load_embedder(name)
    for images, tolerance in ((large, 5e-4), (cuttings, 2e-3)):
        at_least = SCALE_TO_SPARE * embedder.size
        whole = [decode_image(data) for data in images]
        reduced = [decode_scaled(data, at_least) for data in images]
        assert all(decoded.reduced for decoded in reduced)
        expected = embedder.embed(whole)
        for smaller in ([shrunk(decoded.image, at_least) for decoded in reduced], [shrunk(i, at_least) for i in whole]):
            assert all(at_least <= min(image.size) < 2 * at_least for image in smaller)
            similarity = (expected * embedder.embed(smaller)).sum(axis=1)
            assert similarity.min() > 1 - tolerance and np.median(similarity) > 0.9998


def test_squares_of_sscds_size_hardly_differ_by_the_scale(emoji):
    for image in photographs(emoji, 3, 1280):
        data, at_least = encode(image, quality=90), SCALE_TO_SPARE * 288
        whole, reduced = decode_image(data), decode_scaled(data, at_least)
        assert reduced.reduced and reduced.image.width == 640
        for smaller in (reduced.image, shrunk(whole, at_least)):
            difference = image_array(smaller, 288) - image_array(whole, 288)
            assert np.sqrt((difference**2).mean()) < 1.5 / 255


@pytest.fixture(scope="module")
def shard(large, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("read") / "one.tar"
    samples = [(f"{i:03d}", {"jpg": data, "txt": b"caption %d" % i}) for i, data in enumerate(large)]
    samples.insert(5, ("broken", {"jpg": large[0][:5000], "txt": b"words"}))
    samples.insert(9, ("small", {"png": encode(Image.new("RGB", (9, 5), "red"), "PNG"), "txt": b"words"}))
    write_shard(path, samples)
    path.write_bytes(path.read_bytes()[:-10_000])  # cut: the last sample is a bad one
    return path


def test_one_shard_gives_the_same_bytes_on_any_number_of_threads(shard, tmp_path, monkeypatch):
    expected = read_rows(shard, tmp_path / "1")
    used = set()
    look = read._look

    def noted(*args):
        used.add(threading.get_ident())
        time.sleep(0.005)  # long enough for the other threads to be given something
        return look(*args)

    monkeypatch.setattr(read, "_look", noted)
    for workers in (2, 5):
        used.clear()
        assert read_rows(shard, tmp_path / str(workers), workers=workers) == expected
        assert threading.get_ident() not in used and 1 < len(used) <= workers


class TwoGpus:
    """An engine that has two GPUs and eight cores, and notes its tasks."""

    workers, gpus = 8, 2

    def map(self, function, tasks, *, desc, unit="shards"):
        self.tasks = tasks
        return [function(task) for task in tasks]


@pytest.mark.parametrize(
    ("embedder", "share", "threads", "gpus"),
    [("layout", 1.0, 2, 0), ("copy-detector", 1.0, 4, 1.0), ("copy-detector", 0.5, 2, 0.5)],
)
def test_a_network_has_a_share_of_a_gpu_and_its_task_the_cores_that_go_with_it(
    shard, tmp_path, caplog, embedder, share, threads, gpus
):
    engine, config = TwoGpus(), DedupConfig(image_embedder=embedder, gpu_share=share)
    sources = [(read.Shard(str(shard), "shard.tar", ""), tmp_path / f"{number}.parquet") for number in range(4)]
    with caplog.at_level("INFO"):
        read.read_into(engine, sources, [2] * 4, config)
    assert [(task.threads, task.gpus) for task in engine.tasks] == [(threads, gpus)] * 4
    assert re.search(r"CPU: 96 images by 1 process, [\d,]+ images/s, \d+% of the time embedding", caplog.text)


def test_the_pace_of_a_device_is_that_of_its_processes_together():
    paces = [
        read.Pace("a", "GPU 0 (X)", 1, 100, 2.0, 1.0),
        read.Pace("a", "GPU 0 (X)", 1, 300, 2.0, 1.5),
        read.Pace("a", "GPU 0 (X)", 2, 100, 1.0, 0.5),
        read.Pace("a", "GPU 1 (X)", 3, 1000, 1.0, 0.9),
    ]
    assert read.of_devices(paces) == [
        "GPU 0 (X): 500 images by 2 processes, 200 images/s, 60% of the time embedding",
        "GPU 1 (X): 1,000 images by 1 process, 1,000 images/s, 90% of the time embedding",
    ]
    elsewhere = read.Pace("b", "CPU", 1, 10, 1.0, 0.0)
    assert [line.split(":")[0] for line in read.of_devices([*paces, elsewhere])] == [
        "a, GPU 0 (X)", "a, GPU 1 (X)", "b, CPU",
    ]  # fmt: skip
    assert read.of_devices([]) == []


def test_rows_are_written_as_they_come_and_do_not_depend_on_the_pieces(shard, tmp_path, monkeypatch):
    monkeypatch.setattr(read, "ROWS_HELD", 7)
    read_rows(shard, tmp_path / "a")
    file = pq.ParquetFile(tmp_path / "a" / "read" / "cache.parquet")
    assert [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)] == [7, 7, 7, 5]
    monkeypatch.undo()
    read_rows(shard, tmp_path / "b")
    whole = pq.read_table(tmp_path / "b" / "read" / "cache.parquet")
    pieces = file.read()
    assert pieces.drop(["embedding"]).equals(whole.drop(["embedding"]))
    a, b = (np.stack([np.frombuffer(v, np.float16) for v in t["embedding"].to_pylist()]) for t in (pieces, whole))
    assert np.allclose(a, b, atol=1e-3)


def test_a_cache_in_pieces_is_curated_like_one(shard, tmp_path, monkeypatch):
    run_dedup(settings(shard, tmp_path / "whole", batch_size=1))
    monkeypatch.setattr(read, "ROWS_HELD", 13)  # half of the rows: the last piece is empty
    run_dedup(settings(shard, tmp_path / "pieces", batch_size=1))
    for name in ("ledger.parquet", "index/embeddings.npy", "shards/000000.tar"):
        assert (tmp_path / "pieces" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_an_empty_shard_has_no_rows(tmp_path):
    write_shard(tmp_path / "empty.tar", [])
    read_rows(tmp_path / "empty.tar", tmp_path / "out")
    assert pq.read_table(tmp_path / "out" / "read" / "cache.parquet").num_rows == 0


@pytest.mark.parametrize("workers", [1, 3])
def test_each_byte_is_read_once(shard, tmp_path, monkeypatch, workers):
    taken = 0
    whole = shard.read_bytes()

    class Counting(io.BytesIO):
        def read(self, size=-1, /):
            nonlocal taken
            data = super().read(size)
            taken += len(data)
            return data

    @contextlib.contextmanager
    def opened(url):
        yield Counting(whole)

    monkeypatch.setattr("curate.reading.samples.open_shard", opened)
    read_rows(shard, tmp_path, workers=workers)
    assert taken == len(whole)


def test_an_error_while_reading_leaves_no_file_and_ends_every_thread(shard, tmp_path, monkeypatch):
    before = threading.active_count()

    def failing(task, size, sample):
        raise RuntimeError(f"no memory for {sample.key}")

    monkeypatch.setattr(read, "_look", failing)
    with pytest.raises(RuntimeError, match="no memory for 000"):
        read_rows(shard, tmp_path, workers=3)
    assert list((tmp_path / "read").iterdir()) == []
    assert threading.active_count() == before


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_is_stopped_within_its_only_shard_goes_on_to_the_same_bytes(large, tmp_path, number):
    shard, out = tmp_path / "s.tar", tmp_path / "out"
    samples = ((f"{i:03d}", {"jpg": large[i % 24] + b"%d" % i, "txt": b"caption %d" % i}) for i in range(480))
    write_shard(shard, samples)
    command = [sys.executable, "-m", "curate", "dedup", str(shard), str(out), "--workers", "3"]
    root = Path(__file__).parents[3]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    # What a shell starts in the background ignores SIGINT, and so would its children.
    heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, cwd=root, preexec_fn=heard, **pipes)
    deadline = time.monotonic() + 60
    while not list(out.glob("work/read/.tmp-*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(0.1)
    process.send_signal(number)
    said = process.communicate(timeout=30)[1]
    assert process.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 130), said
    assert not list(out.glob("work/read/[!.]*.parquet"))
    run_dedup(settings(shard, out))
    run_dedup(settings(shard, tmp_path / "fresh"))
    for name in ("ledger.parquet", "summary.json", "report.html", "shards/000000.tar"):
        assert (out / name).read_bytes() == (tmp_path / "fresh" / name).read_bytes()


def test_large_images_do_not_wait_in_memory_for_the_embedder_at_their_own_size(tmp_path, monkeypatch):
    held = []
    embedder = load_embedder("layout")

    class Noting:
        dim, size = embedder.dim, embedder.size

        def embed(self, images, batch_size=256):
            held.append([image.size for image in images])
            return embedder.embed(images, batch_size)

    monkeypatch.setattr(read, "cached_embedder", lambda name: Noting())
    monkeypatch.setattr(read, "BATCH_PIXELS", 3 * 135 * 130)
    large = {"png": encode(Image.new("RGB", (1350, 1300), "red"), "PNG"), "txt": b"words"}
    write_shard(tmp_path / "s.tar", [(f"{i}", large) for i in range(7)])
    read_rows(tmp_path / "s.tar", tmp_path / "out")
    assert [len(batch) for batch in held] == [4, 3] and set(sum(held, [])) == {(135, 130)}


def test_size_and_orientation_are_those_of_the_stored_image(emoji, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    image = photographs(emoji, 1, 512)[0].resize((700, 512))
    write_shard(tmp_path / "s.tar", [("a", {"jpg": encode(image, exif=exif), "txt": b"words"})])
    run_dedup(settings(tmp_path / "s.tar", tmp_path / "out"))
    (row,) = read_ledger(tmp_path / "out").to_pylist()
    assert (row["width"], row["height"]) == (512, 700)


@pytest.fixture(scope="module")
def contained_anew(emoji, tmp_path_factory) -> Path:
    """One photograph in five files: as it was, without metadata, with other tables, as PNG, and turned by EXIF."""
    image = photographs(emoji, 1, 512)[0]
    exif = Image.Exif()
    exif[0x010E] = "a description"
    original = encode(image, quality=90, exif=exif)
    stripped = encode(image, quality=90)
    progressive = encode(image, quality=90, progressive=True)  # the same coefficients
    decoded = Image.open(io.BytesIO(original))
    assert np.array_equal(np.asarray(decoded), np.asarray(Image.open(io.BytesIO(progressive))))
    exif[0x0112] = 3
    files = {
        "original": {"jpg": original},
        "bytes": {"jpg": original},
        "stripped": {"jpg": stripped},
        "progressive": {"jpg": progressive},
        "png": {"png": encode(decoded, "PNG")},
        "turned": {"jpg": encode(image, quality=90, exif=exif)},
    }
    path = tmp_path_factory.mktemp("anew") / "s.tar"
    write_shard(path, [(key, {**members, "txt": b"one caption of them all"}) for key, members in files.items()])
    return path


@pytest.mark.parametrize("pixel_hash", [False, True])
def test_copies_are_exact_by_their_coded_data_and_by_their_pixels_when_asked(contained_anew, tmp_path, pixel_hash):
    run_dedup(settings(contained_anew, tmp_path / "out", pixel_hash=pixel_hash))
    rows = {row["key"]: row for row in read_ledger(tmp_path / "out").to_pylist()}
    coded_anew = "exact_image" if pixel_hash else "near_pair"
    assert {key: row["reason"] for key, row in rows.items()} == {
        "original": None,
        "bytes": "exact_image",
        "stripped": "exact_image",
        "progressive": coded_anew,
        "png": coded_anew,
        "turned": None,
    }
    assert all(row["image_similarity"] > 0.9995 for row in rows.values() if row["reason"])


def test_a_changed_pixel_hash_is_noticed(contained_anew, tmp_path, capsys):
    out = tmp_path / "out"
    run_dedup(settings(contained_anew, out))
    run_dedup(settings(contained_anew, out, pixel_hash=True))
    assert "pixel_hash: False → True" in capsys.readouterr().err
    assert read_ledger(out)["reason"].to_pylist().count("exact_image") == 4


def test_hashes_of_whole_bytes_are_those_of_the_stored_image(shard, tmp_path, large):
    read_rows(shard, tmp_path)
    table = pq.read_table(tmp_path / "read" / "cache.parquet")
    assert table["sha256"][0].as_py() == hashlib.sha256(large[0]).hexdigest()
