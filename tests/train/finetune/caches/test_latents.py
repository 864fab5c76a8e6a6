"""Latents and embeddings that are computed once: the same numbers, found again, shared, and noticed when damaged."""

from __future__ import annotations

import copy
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from afresh.errors import UsageError, UserError
from curate.decisions.sample_lists import write_ids
from tests.train.finetune.made_photos import SIZES, photos
from tests.train.finetune.runs import launch, log_lines, settings, workers_of
from train.denoising.families.stable_diffusion import encode_captions
from train.finetune.caches import parts as cache
from train.finetune.caches.latents import CachedLatents, encode_moments
from train.finetune.caches.parts import Part, on_disk
from train.finetune.caches.texts import CachedTexts
from train.finetune.config import Augmentation
from train.finetune.data.images import ImageLoader, SampleError
from train.finetune.data.scan import scan
from train.finetune.loop import run_finetune


@pytest.fixture(scope="module")
def shard_set(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("photos")
    return scan([photos(folder, shards=3)], folder / "samples.arrow")


def cached(shard_set, vae, where: str, folder: Path, **changes) -> CachedLatents:
    values = {"sizes": SIZES, "crop": "center", "how": Augmentation(), "seed": 0} | changes
    return CachedLatents(ImageLoader(shard_set, **values), vae, where, folder, Accelerator(cpu=True))


def part_files(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_cached_moments_are_those_of_each_image_at_its_own_size_and_variant(tiny_pipe, shard_set, tmp_path, where):
    how = Augmentation(flip=0.5, variants=2)
    latents = cached(shard_set, tiny_pipe.vae, where, tmp_path, crop="random", how=how)
    for row in range(len(shard_set)):
        for visit in (0, 1, 2):
            pixels = latents.loader.load(row, visit)
            expected = encode_moments(tiny_pipe.vae, torch.from_numpy(pixels)[None])[0]
            found = torch.from_numpy(latents.load(row, visit)).float()
            assert found.shape == expected.shape == latents.shape(row)
            torch.testing.assert_close(found, expected, atol=2e-3, rtol=2e-3)


def test_another_run_finds_the_files_and_what_looks_different_has_others(tiny_pipe, shard_set, tmp_path):
    vae = tiny_pipe.vae
    first = cached(shard_set, vae, "disk", tmp_path)
    files = part_files(tmp_path)
    assert len(files) == 2 * 3 and not any(".tmp" in name or ".lock" in name for name in files)
    again = cached(shard_set, vae, "disk", tmp_path, seed=9)  # nothing is random: the seed does not matter
    assert part_files(tmp_path) == files
    assert isinstance(again.stored[0].values, np.memmap)
    assert all(np.array_equal(first.load(row, 0), again.load(row, 0)) for row in range(len(shard_set)))
    others = [{"crop": "none"}, {"sizes": [(64, 64)]}, {"crop": "random", "how": Augmentation(variants=1)}]
    for number, changes in enumerate(others, 2):
        cached(shard_set, vae, "disk", tmp_path, **changes)
        assert len(part_files(tmp_path)) == number * len(files)
    other = copy.deepcopy(vae)
    with torch.no_grad():
        next(other.parameters()).mul_(2)
    cached(shard_set, other, "disk", tmp_path)
    assert len(part_files(tmp_path)) == 5 * len(files)


def test_a_copied_shard_has_the_same_files_and_other_samples_of_a_shard_have_others(tiny_pipe, shard_set, tmp_path):
    cached(shard_set, tiny_pipe.vae, "disk", tmp_path / "cache")
    files = part_files(tmp_path / "cache")
    copy_ = photos(tmp_path / "copy", shards=3)
    cached(scan([copy_], tmp_path / "copy.arrow"), tiny_pipe.vae, "disk", tmp_path / "cache")
    assert part_files(tmp_path / "cache") == files
    latents = []
    for key in ("001", "002"):  # the same shards, and as many samples of them
        write_ids(tmp_path / "ids.txt", [("000001.tar", key)])
        some = scan([copy_], tmp_path / f"{key}.arrow", exclude=str(tmp_path / "ids.txt"))
        latents.append(cached(some, tiny_pipe.vae, "disk", tmp_path / "cache").load(7, 0))
    assert len(part_files(tmp_path / "cache")) == len(files) + 4
    assert latents[0].shape != latents[1].shape or not np.array_equal(*latents)


def test_a_file_cut_short_is_computed_again_and_a_damaged_row_is_a_fault(tiny_pipe, shard_set, tmp_path, capsys):
    latents = cached(shard_set, tiny_pipe.vae, "disk", tmp_path)
    good = [latents.load(row, 0) for row in range(len(shard_set))]
    cut, hurt = latents.stored[0].path, latents.stored[1].path
    del latents
    os.truncate(cut, 500)
    data = bytearray(hurt.read_bytes())
    data[-1] ^= 1  # in the last row
    hurt.write_bytes(data)
    again = cached(shard_set, tiny_pipe.vae, "disk", tmp_path)
    assert f"{cut}: not a whole cache file" in capsys.readouterr().err
    last = int(shard_set.counts[:2].sum()) - 1
    for row in range(len(shard_set)):
        if row == last:
            with pytest.raises(SampleError, match=rf"{hurt}: .*damaged .*delete it"):
                again.load(row, 0)
        else:
            assert np.array_equal(again.load(row, 0), good[row])


def test_an_interrupted_encoding_keeps_the_parts_that_are_whole(tmp_path):
    parts = [Part(f"part{number}", np.arange(4, dtype=np.int64)) for number in range(3)]
    computed = []

    def compute(number, rows, write):
        computed.append(number)
        for row in rows:
            if (number, row) == (1, 2) and len(computed) == 2:
                raise KeyboardInterrupt
            write(row, np.full(1, 10 * number + row, dtype=np.float16))

    with pytest.raises(KeyboardInterrupt):
        on_disk(tmp_path, parts, compute, name="test", unit="rows")
    assert not [name for name in part_files(tmp_path) if name.startswith((".tmp", "part1.npy", "part2"))]
    stored = on_disk(tmp_path, parts, compute, name="test", unit="rows")
    assert computed == [0, 1, 1, 2]
    assert [one.row(2)[0] for one in stored] == [2, 12, 22]


def test_a_part_whose_process_dies_is_taken_over_with_what_it_left(tmp_path):
    (tmp_path / ".tmp-1-part.npy").write_bytes(b"half")
    code = "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print('locked'); " \
        "sys.stdout.flush(); time.sleep(1); import os; os.kill(os.getpid(), 9)"  # fmt: skip
    other = subprocess.Popen([sys.executable, "-c", code, tmp_path / "part.lock"], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "locked\n"

    def compute(number, rows, write):
        assert other.wait() == -signal.SIGKILL  # not before it is dead
        write(0, np.ones(2, dtype=np.float16))

    (stored,) = on_disk(tmp_path, [Part("part", np.array([0, 2, 4]))], compute, name="test", unit="rows")
    assert stored.row(0).tolist() == [1, 1] and stored.row(1) is None
    assert set(part_files(tmp_path)) == {"part.npy", "part.rows.npy"}


def test_a_disk_that_takes_no_more_is_an_error_and_leaves_no_half_file(tmp_path):
    part = Part("part", np.array([0, 100_000]))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))  # a write beyond fails as on a full disk
    try:
        with pytest.raises(UserError, match="part.npy cannot be written: File too large"):
            on_disk(tmp_path, [part], lambda n, rows, write: write(0, np.ones(100_000, np.float16)), name="x", unit="x")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.glob("*.npy")) and not list(tmp_path.glob(".tmp*"))
    huge = Part("huge", np.array([0, 10**15]))
    with pytest.raises(UserError, match="needs 2,000,000.0 GB"):
        on_disk(tmp_path, [huge], lambda *_: None, name="cache_latents", unit="x")


def test_memory_has_a_limit_and_forms_without_end_cannot_be_cached(tiny_pipe, shard_set, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"augmentation\.variants > 0"):
        cached(shard_set, tiny_pipe.vae, "memory", tmp_path, crop="random")
    monkeypatch.setattr(cache, "MEMORY_BYTES", 1000)
    with pytest.raises(UserError, match="set cache_latents to disk"):
        cached(shard_set, tiny_pipe.vae, "memory", tmp_path)


def test_an_image_that_cannot_be_decoded_is_missing_from_the_cache_alone(tiny_pipe, tmp_path, capsys):
    from curate.reading.samples import read_samples
    from curate.reading.writing import write_shard

    photos(tmp_path / "in", shards=1)
    path = tmp_path / "in" / "000000.tar"
    samples = [(s.key, dict(s.members)) for s in read_samples(str(path))]
    samples[2][1]["png"] = samples[2][1]["png"][:80]  # its header is whole
    write_shard(path, samples)
    latents = cached(scan([str(path)], tmp_path / "samples.arrow"), tiny_pipe.vae, "disk", tmp_path / "cache")
    assert "000000.tar/002" in capsys.readouterr().err
    with pytest.raises(SampleError, match="could not be read when latents were cached"):
        latents.load(2, 0)
    assert latents.load(3, 0).shape == latents.shape(3)


# ------------------------------------------------------------------------------------------------- embeddings


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_cached_embeddings_are_the_encoders_and_each_distinct_caption_is_encoded_once(
    tiny_pipe, shard_set, tmp_path, where
):
    encoded = []

    def encode(captions):
        encoded.extend(captions)
        return encode_captions(tiny_pipe, captions)

    texts = CachedTexts(shard_set, encode, "tiny", where, tmp_path, Accelerator(cpu=True))
    captions = [text for row in range(len(shard_set)) for text in shard_set.captions(row)]
    assert sorted(encoded) == sorted({"", *captions})
    asked = [captions[3], "", captions[0], captions[3]]
    torch.testing.assert_close(texts.embed(asked), encode_captions(tiny_pipe, asked), atol=2e-3, rtol=2e-3)
    assert torch.equal(texts.embed([""]), texts.empty)
    if where == "disk":
        encoded.clear()
        again = CachedTexts(shard_set, encode, "tiny", where, tmp_path, Accelerator(cpu=True))
        assert encoded == [""]
        assert torch.equal(again.embed(asked), texts.embed(asked))


def test_a_run_with_cached_embeddings_learns_the_same_and_a_trained_encoder_is_refused(model, shards, tmp_path):
    losses = {}
    for name in (False, True, "disk"):
        config = settings(model, shards, tmp_path / f"run-{name}", steps=2, cache_text=name, cache_latents="disk")
        config.cache = str(tmp_path / "shared")
        config.filter.policy, config.filter.threshold = "every_step", 1e9
        run_finetune(config)
        losses[name] = [line["loss"] for line in log_lines(tmp_path / f"run-{name}")]
    assert losses[True] == losses["disk"] == pytest.approx(losses[False], rel=2e-3)
    with pytest.raises(UsageError, match="cache_text"):
        run_finetune(settings(model, shards, tmp_path / "no", cache_text=True, train_text_encoder=True))


# -------------------------------------------------------------------------------------------------- being stopped


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_a_signal_while_latents_are_cached_stops_the_run_and_it_goes_on(model, shards, tmp_path, monkeypatch, where):
    changes = {"steps": 2, "cache_latents": where}
    run_finetune(settings(model, shards, tmp_path / "whole", **changes))
    config = settings(model, shards, tmp_path / "cut", **changes)
    calls = []

    def signalled(vae, pixels):
        calls.append(len(pixels))
        if len(calls) == 2:
            signal.raise_signal(signal.SIGTERM)
        return encode_moments(vae, pixels)

    with monkeypatch.context() as patch:
        patch.setattr("train.finetune.caches.latents.encode_moments", signalled)
        assert run_finetune(config) == {"steps": 0, "stopped": True, "model": None}
    assert len(calls) == 2 and not (tmp_path / "cut" / "log.jsonl").exists()
    if where == "disk":
        assert len(list((tmp_path / "cut" / "cache").glob("*.rows.npy"))) == 1  # the first shard's stays
    run_finetune(config)
    assert log_lines(tmp_path / "cut") == log_lines(tmp_path / "whole")


SLOWLY = """
import sys, time
from train.cli import main
from train.finetune.caches import latents

encode = latents.encode_moments

def slowly(vae, pixels):
    print("encoding", flush=True)
    time.sleep(2)
    return encode(vae, pixels)

latents.encode_moments = slowly
sys.exit(main())
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("where", ["memory", "disk"])
def test_a_signal_to_one_of_two_processes_that_cache_stops_both(model, shards, tmp_path, where):
    program = tmp_path / "slowly.py"
    program.write_text(SLOWLY)
    config = settings(model, shards, tmp_path / "run", batch_size=1, cache_latents=where)
    process = launch(config, processes=2, program=program)
    assert process.stdout.readline()  # one of them encodes
    os.kill(workers_of(process.pid)[-1], signal.SIGUSR1)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0 and "stopped before the first step" in said, said
    assert not (tmp_path / "run" / "log.jsonl").exists()
