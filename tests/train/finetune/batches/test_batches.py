"""Batches as the loop gets them: the same from any number of workers and from any position on, whatever goes wrong."""

from __future__ import annotations

import dataclasses
import gzip
import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from afresh.errors import UsageError, UserError
from curate.reading.writing import write_shard
from tests.train.finetune.made_photos import SIZES, Pixels, batches, children, photos
from tests.train.finetune.runs import REPOSITORY, launch, log_lines, settings, wait_for_step
from train.finetune.batches.batches import DecodedBatches, StreamedBatches, ahead
from train.finetune.batches.faults import FaultLog
from train.finetune.batches.layout import lay_out
from train.finetune.config import Augmentation
from train.finetune.data.images import Fault, ImageLoader, ImageReader, SampleError
from train.finetune.data.scan import scan
from train.finetune.loop import run_finetune


def drained(stream: StreamedBatches, count: int) -> list:
    return [stream.next() for _ in range(count)]


def assert_same(one: list, other: list) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert list(a.positions) == list(b.positions)
        assert torch.equal(a.rows, b.rows) and torch.equal(a.moments, b.moments) and torch.equal(a.weight, b.weight)


# ---------------------------------------------------------------------------------------------------- reading


def test_an_image_is_read_alike_from_a_file_a_url_and_a_compressed_shard(tmp_path):
    folder = Path(photos(tmp_path / "in", shards=1))
    (tmp_path / "gz").mkdir()
    (tmp_path / "gz" / "a.tar").write_bytes(gzip.compress((folder / "000000.tar").read_bytes()))
    read = []
    for number, pattern in enumerate((str(folder), f"file://{folder}/000000.tar", str(tmp_path / "gz"))):
        reader = ImageReader(scan([pattern], tmp_path / f"{number}.arrow"))
        read.append([reader.read(row) for row in (3, 0, 5)])
    assert read[0] == read[1] == read[2] and len(set(read[0])) == 3


@pytest.mark.parametrize(
    ("harm", "word"),
    [
        (lambda path: path.unlink(), "No such file"),
        (lambda path: path.write_bytes(path.read_bytes()[:3000]), "was cut"),
        (lambda path: path.write_bytes(path.read_bytes().replace(b"IDAT", b"IDAX")), "changed"),
    ],
)
@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_shard_that_is_gone_cut_or_changed_is_noticed_by_each_sample(tmp_path, harm, word, scheme):
    folder = Path(photos(tmp_path / "in", shards=1))
    reader = ImageReader(scan([f"{scheme}{folder}/000000.tar"], tmp_path / "samples.arrow"))
    harm(folder / "000000.tar")
    with pytest.raises(SampleError, match=word):
        reader.read(5)


def test_a_random_crop_differs_by_visit_and_variants_come_back(tmp_path):
    shard_set = scan([photos(tmp_path / "in", shards=1)], tmp_path / "samples.arrow")

    def look(row: int, visit: int, **how: int) -> np.ndarray:
        return ImageLoader(shard_set, [(16, 16)], "random", Augmentation(**how), seed=0).load(row, visit)

    assert not np.array_equal(look(0, 0), look(0, 1)) and np.array_equal(look(0, 1), look(0, 1))
    assert np.array_equal(look(0, 0, variants=2), look(0, 2, variants=2))


# -------------------------------------------------------------------------------------------- order and resume


@pytest.mark.slow
def test_any_number_of_workers_and_any_start_give_the_same_batches_of_one_shape_each(tmp_path):
    shards = photos(tmp_path / "in")
    whole = drained(batches(shards, tmp_path), 12)
    shapes = {tuple(batch.moments.shape) for batch in whole}
    assert len(shapes) > 2 and all((shape[3], shape[2]) in SIZES for shape in shapes)
    assert_same(drained(batches(shards, tmp_path, workers=2), 12), whole)
    start = int(np.random.default_rng(time.time_ns()).integers(1, 12))
    assert_same(drained(batches(shards, tmp_path, workers=1, start=start), 12 - start), whole[start:])


def test_positions_are_asked_for_no_further_ahead_than_is_prefetched(tmp_path):
    asked = []

    def positions():
        for batch in range(10**9):
            asked.append(batch)
            yield range(4 * batch, 4 * batch + 4)

    config = settings("", photos(tmp_path / "in"), tmp_path)
    loader, order = lay_out(scan(config.shards, tmp_path / "samples.arrow"), SIZES, config, 4)
    stream = StreamedBatches(DecodedBatches(order, loader), positions(), 1, Pixels(), torch.device("cpu"))
    drained(stream, 3)
    assert 3 <= len(asked) < 12
    assert stream.waited > 0


def test_ahead_keeps_the_order_runs_a_bounded_number_ahead_and_passes_errors_on():
    def square(x: int) -> int:
        if x == 5:
            raise ValueError("five")
        return x * x

    taken = []
    results = ahead(square, (taken.append(x) or x for x in range(100)), depth=3)
    assert [next(results) for _ in range(5)] == [0, 1, 4, 9, 16]
    assert len(taken) <= 9
    with pytest.raises(ValueError, match="five"):
        next(results)


# ----------------------------------------------------------------------------------------------------- faults


@pytest.mark.slow
def test_a_bad_image_is_replaced_by_another_of_its_bucket_alike_in_every_process_and_recorded(tmp_path):
    shards = photos(tmp_path / "in")
    whole = drained(batches(shards, tmp_path), 12)
    path = Path(shards) / "000002.tar"
    path.write_bytes(path.read_bytes()[:4096])  # after the scan
    hurt = drained(batches(shards, tmp_path), 12)
    assert_same(drained(batches(shards, tmp_path, workers=2), 12), hurt)
    faults = [fault for batch in hurt for fault in batch.faults]
    assert faults and {fault.shard for fault in faults} == {"000002.tar"}
    ids = scan([shards], tmp_path / "samples.arrow").ids
    for before, after in zip(whole, hurt, strict=True):
        assert after.moments.shape == before.moments.shape and (after.weight == 1).all()
        at = {fault.position: fault for fault in after.faults}
        for slot, position in enumerate(after.positions):
            if position in at:
                fault = at[position]
                assert ids[before.rows[slot].item()] == (fault.shard, fault.key)
                assert "/".join(ids[after.rows[slot].item()]) == fault.instead
                assert "was cut" in fault.reason
            else:
                assert after.rows[slot] == before.rows[slot]


def test_a_bucket_of_which_all_samples_are_gone_has_weight_zero_and_everything_gone_is_an_error(tmp_path):
    wide, tall = ((("w", (90, 30)),), (("a", (40, 40)), ("b", (40, 40))))
    for name, samples in (("one", wide), ("two", tall)):
        members = []
        for key, size in samples:
            file = io.BytesIO()
            Image.new("RGB", size).save(file, "PNG")
            members.append((key, {"png": file.getvalue(), "txt": b"x"}))
        write_shard(tmp_path / "in" / f"{name}.tar", members)
    shards = str(tmp_path / "in")
    batches(shards, tmp_path)
    (tmp_path / "in" / "one.tar").unlink()
    got = drained(batches(shards, tmp_path), 9)
    empty = [batch for batch in got if not batch.weight.any()]
    assert empty and all(fault.instead is None and fault.shard == "one.tar" for b in empty for fault in b.faults)
    assert len(empty) < len(got)
    (tmp_path / "in" / "two.tar").unlink()
    with pytest.raises(UserError, match="other samples cannot be read either"):
        batches(shards, tmp_path, workers=1).next()


def test_faults_are_appended_cut_at_the_position_that_a_run_goes_on_from_and_counted(tmp_path, capsys):
    faults = [Fault(position, "s.tar", "k", "gone", "s.tar/other") for position in (3, 8, 20)]
    FaultLog(tmp_path, 0, 0).add(faults)
    assert capsys.readouterr().err.count("s.tar/k") == 1
    again = FaultLog(tmp_path, 0, 10)
    assert again.count == 2
    again.add(faults[2:])
    lines = [json.loads(line) for line in (tmp_path / "faults.jsonl").read_text().splitlines()]
    assert lines == [dataclasses.asdict(fault) for fault in faults] and again.count == 3


# ---------------------------------------------------------------------------------------------------- workers


def test_a_killed_worker_is_an_error_at_once_that_says_what_to_do(tmp_path):
    before = set(multiprocessing.active_children())
    stream = batches(photos(tmp_path / "in"), tmp_path, workers=1, count=10**6)
    stream.next()
    (worker,) = set(multiprocessing.active_children()) - before
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(UserError, match=r"data worker died .*lower workers or batch_size.*/dev/shm"):
        drained(stream, 1000)


class Explosive(ImageLoader):
    def load(self, row: int, visit: int) -> np.ndarray:
        if row == 1:
            raise ZeroDivisionError("boom")
        return super().load(row, visit)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_exception_in_a_worker_names_the_sample_in_one_line(tmp_path, workers):
    config = settings("", photos(tmp_path / "in"), tmp_path)
    shard_set = scan(config.shards, tmp_path / "samples.arrow")
    loader = Explosive(shard_set, [(16, 16)], "none", Augmentation(), seed=0)
    order = lay_out(shard_set, [(16, 16)], config, 4)[1]
    stream = StreamedBatches(
        DecodedBatches(order, loader), [range(40)], workers, Pixels(), torch.device("cpu")
    )
    with pytest.raises(UserError) as raised:
        stream.next()
    assert str(raised.value) == "000000.tar/001: the sample cannot be loaded: ZeroDivisionError: boom"


@pytest.mark.slow
def test_a_process_ends_though_its_workers_ignore_the_signal_that_ends_them(tmp_path):
    shards = photos(tmp_path / "in")
    code = (
        "import sys, pathlib\nfrom tests.train.finetune.made_photos import batches\n"
        "if __name__ == '__main__':\n"
        "    stream = batches(sys.argv[1], pathlib.Path(sys.argv[2]), workers=1, count=10**6)\n"
        "    print(stream.next().rows)\n"  # and the end of the program, at which the stream is still there
    )
    (tmp_path / "program.py").write_text(code)
    command = [sys.executable, str(tmp_path / "program.py"), shards, str(tmp_path)]
    env = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and done.stdout.startswith("tensor"), done.stderr


# -------------------------------------------------------------------------------------------------- whole runs


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_run_whose_shard_is_cut_and_whose_job_is_signalled_as_a_whole_goes_on(model, tmp_path):
    shards = photos(tmp_path / "in")
    config = settings(model, shards, tmp_path / "run", steps=200, batch_size=2, workers=2, resolution=32)
    process = launch(config)
    wait_for_step(tmp_path / "run", 2, process)
    path = Path(shards) / "000001.tar"
    os.truncate(path, 4096)
    wait_for_step(tmp_path / "run", 60, process)
    for pid in [process.pid, *children(process.pid)]:  # as a batch system does
        os.kill(pid, signal.SIGTERM)
    assert process.wait(timeout=60) == 0, process.communicate()[1]
    said = process.communicate()[1]
    assert "the same command goes on" in said and "was cut after it was scanned" in said
    done = log_lines(tmp_path / "run")[-1]["step"]
    summary = run_finetune(dataclasses.replace(config, workers=0))
    lines = (tmp_path / "run" / "faults.jsonl").read_text().splitlines()
    assert done < 200 == summary["steps"] and summary["replaced"] == len(lines) > 0
    positions = [json.loads(line)["position"] for line in lines]
    assert positions == sorted(set(positions))
    assert {line["kept"] for line in log_lines(tmp_path / "run")} == {2}


def test_a_samples_weight_multiplies_its_loss_and_the_batch_stays_nominal(model, tmp_path):
    norms = {}
    for weight in (1, 3, 0):
        samples = []
        for number in range(4):
            file = io.BytesIO()
            Image.new("RGB", (64, 64), (60 * number, 9, 99)).save(file, "PNG")
            fields = json.dumps({"caption": f"colour {number}", "aesthetic": weight}).encode()
            samples.append((str(number), {"png": file.getvalue(), "json": fields}))
        write_shard(tmp_path / f"in{weight}" / "a.tar", samples)
        config = settings(model, str(tmp_path / f"in{weight}"), tmp_path / f"run{weight}", steps=1)
        summary = run_finetune(dataclasses.replace(config, weight_field="aesthetic"))
        norms[weight] = log_lines(tmp_path / f"run{weight}")[0]["grad_norm"]
    assert norms[3] == pytest.approx(3 * norms[1], rel=1e-3) and norms[1] > 0
    assert norms[0] == 0 and summary["skipped_steps"] == 1


def test_settings_that_model_or_shards_do_not_take_leave_the_folder_free_for_others(model, shards, tmp_path):
    for bad, word in (({"resolution": 30}, "resolution"), ({"shards": [str(tmp_path / "no.tar")]}, "no such file")):
        with pytest.raises(UsageError, match=word):
            run_finetune(dataclasses.replace(settings(model, shards, tmp_path / "run"), **bad))
    assert run_finetune(settings(model, shards, tmp_path / "run", steps=1, resolution=32))["steps"] == 1


def test_config_files_name_shard_groups_buckets_and_caches(run_cli, tmp_path):
    (tmp_path / "a.yaml").write_text(
        "model: m\nout: o\nshards: [a.tar, {path: 'b/*.tar', repeats: 3}]\nbuckets: {step: 64}\ncrop: center\n"
        "cache_latents: disk\ncache_text: true\n"
    )
    done = run_cli("train", "finetune", "--config", "a.yaml", "--print_config")
    assert done.returncode == 0, done.stderr
    assert "repeats: 3" in done.stdout and "cache_latents: disk" in done.stdout and "cache_text: true" in done.stdout
    done = run_cli("train", "finetune", "--config", "a.yaml", "--shards", "x.tar,y.tar", "--print_config")
    assert "- x.tar" in done.stdout and "repeats" not in done.stdout
    done = run_cli("train", "finetune", "--config", "a.yaml", "--cache_latents", "ram")
    assert done.returncode == 2 and "cache_latents" in done.stderr
