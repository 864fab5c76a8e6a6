"""Troubles of the machine are no sample's, those of a sample are its row, and what changes meanwhile is noticed."""

from __future__ import annotations

import os
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from afresh.errors import UserError
from curate.check import run_check
from curate.config import CheckConfig
from curate.dedup import run_dedup
from curate.reading.images import ImageError, decode_image
from curate.reading.writing import write_shard
from curate.results.ledger import read_ledger
from curate.sample_set import load_part
from curate.stages import read
from tests.curate.made_mess import settings
from tests.curate.made_sources import encode, picture


@pytest.fixture
def shard(tmp_path) -> Path:
    """Four samples."""
    samples = [(f"s{n}", dict(sample.members)) for n, sample in enumerate(load_part("held_out")[:4])]
    write_shard(tmp_path / "in" / "a.tar", samples)
    return tmp_path / "in" / "a.tar"


TROUBLES = [MemoryError(), OSError("out of memory error when reading image file"), OSError(24, "Too many open files")]


@pytest.mark.parametrize("trouble", TROUBLES, ids=repr)
@pytest.mark.parametrize("where", ["load", "open"])
def test_memory_that_runs_out_ends_the_job_and_is_no_verdict(shard, tmp_path, monkeypatch, trouble, where):
    calls = []

    def fail(*args, **options):
        calls.append(1)
        if len(calls) == 2:
            raise trouble
        return before(*args, **options)

    out, place = tmp_path / "out", (Image, "open") if where == "open" else (ImageFile.ImageFile, "load")
    before = getattr(*place)
    with monkeypatch.context() as patch:
        patch.setattr(*place, fail)
        with pytest.raises(UserError, match=r"sample 's\d' of a.tar: ([Oo]ut of memory|Too many open files)"):
            run_dedup(settings(shard, out))
        calls.clear()
        with pytest.raises(UserError, match=r"sample 's\d' of a.tar: ([Oo]ut of memory|Too many open files)"):
            run_check(CheckConfig(shards=[str(shard)], workers=1))
    assert run_dedup(settings(shard, out))["unreadable"] == 0


def test_what_is_broken_is_still_the_images_own(monkeypatch):
    for broken in (OSError("image file is truncated"), ValueError("?"), SyntaxError("?"), ImageError("?")):
        with monkeypatch.context() as patch, pytest.raises(ImageError):
            patch.setattr(Image, "open", lambda *args, _error=broken, **options: (_ for _ in ()).throw(_error))
            decode_image(b"\xff\xd8\xff")


MY_PARTS = '''
import numpy as np


class Blind:
    """Gives a black image no vector."""

    dim, size, digest = 3, 8, "blind 1"

    def embed(self, images, batch_size=256):
        rows = np.array([np.asarray(image.convert("RGB").resize((8, 8)), np.float32).mean((0, 1)) for image in images])
        rows[rows.sum(1) < 60] = VALUE
        return rows / np.linalg.norm(rows, axis=1, keepdims=True) if VALUE != VALUE else rows


class Speechless:
    dim, digest = 4, "speechless"

    def embed(self, captions):
        return np.array([[np.nan] * 4 if "nan" in text else [1, 0, 0, 0] for text in captions], np.float32)


def change(near, captions, order):
    """A rule that keeps all; somebody writes to the shards while it thinks."""
    import CHANGE
    CHANGE.change()
    return np.full(len(near.image_of), -1)
'''


@pytest.mark.parametrize("value", ["float('nan')", "1e9"])  # which half precision cannot hold
def test_a_vector_that_is_not_finite_is_the_row_of_its_sample(shard, tmp_path, monkeypatch, value):
    (tmp_path / "parts_of_troubles.py").write_text(MY_PARTS.replace("VALUE", value))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "parts_of_troubles", raising=False)
    samples = [(f"s{n}", dict(sample.members)) for n, sample in enumerate(load_part("held_out")[:3])]
    samples.insert(1, ("black", {"png": encode(Image.new("RGB", (8, 8)), "PNG"), "txt": b"nothing to see"}))
    write_shard(tmp_path / "in" / "a.tar", samples)
    config = settings(shard, tmp_path / "out", image_embedder="parts_of_troubles:Blind", threshold=0.999)
    for _ in range(2):
        assert run_dedup(config)["unreadable"] == 1
    (row,) = [row for row in read_ledger(tmp_path / "out").to_pylist() if row["status"] == "unreadable"]
    assert (row["shard"], row["key"]) == ("a.tar", "black")
    assert "parts_of_troubles:Blind" in row["reason"] and "not finite" in row["reason"]


def test_a_caption_without_a_vector_is_near_equal_ones_only(tmp_path, monkeypatch, capsys):
    (tmp_path / "parts_of_speech.py").write_text(MY_PARTS)
    monkeypatch.syspath_prepend(str(tmp_path))
    captions = ["a nan of captions", "another one that is read", "one more that is read as well", "a nan of captions"]
    images = [sample.image for sample in load_part("held_out")[:4]]
    write_shard(tmp_path / "a.tar", [
        (f"s{n}", {"png": image, "txt": text.encode()})
        for n, (image, text) in enumerate(zip(images, captions, strict=True))
    ])  # fmt: skip
    config = {"caption_embedder": "parts_of_speech:Speechless", "max_per_caption": 1, "threshold": 1.0}
    run_dedup(settings(tmp_path / "a.tar", tmp_path / "out", **config))
    assert read_ledger(tmp_path / "out")["reason"].to_pylist() == [None, "near_caption", None, "caption_quota"]
    assert "not finite" in capsys.readouterr().err


def somebody_writes(tmp_path: Path, monkeypatch, change) -> str:
    """A rule during which ``change`` is called."""
    module = types.ModuleType("somebody")
    module.change = change
    monkeypatch.setitem(sys.modules, "somebody", module)
    (tmp_path / "parts_that_wait.py").write_text(MY_PARTS.replace("CHANGE", "somebody"))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "parts_that_wait", raising=False)
    return "parts_that_wait:change"


def test_a_shard_that_changes_between_reading_and_writing_is_not_written(shard, tmp_path, monkeypatch):
    """The same keys under other pictures, in a file of the same size and time: only the pixels tell."""
    others = [sample.image for sample in load_part("held_out")[4:8]]
    before, size = shard.stat(), shard.stat().st_size

    def change() -> None:
        samples = [
            (f"s{n}", {**sample.members, sample.image_ext: image})
            for n, (sample, image) in enumerate(zip(load_part("held_out")[:4], others, strict=True))
        ]
        write_shard(shard, samples)
        os.truncate(shard, size)
        os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))

    rule = somebody_writes(tmp_path, monkeypatch, change)
    with pytest.raises(UserError, match=r"a\.tar changed while it was curated \(sample 's0'\): run again"):
        run_dedup(settings(shard, tmp_path / "out", rule=rule, sweep=0))
    assert not (tmp_path / "out" / "summary.json").exists()
    assert not list((tmp_path / "out" / "shards").iterdir())


def test_a_shard_that_gains_a_sample_meanwhile_is_noticed_too(shard, tmp_path, monkeypatch):
    def change() -> None:
        samples = [(f"s{n}", dict(sample.members)) for n, sample in enumerate(load_part("held_out")[:9])]
        write_shard(shard, samples)

    with pytest.raises(UserError, match=r"a\.tar changed while it was curated"):
        run_dedup(settings(shard, tmp_path / "out", rule=somebody_writes(tmp_path, monkeypatch, change), sweep=0))


def test_a_shard_that_changes_while_it_is_read_leaves_no_cache(shard, tmp_path, monkeypatch):
    before = read.read_into

    def change(*args, **options) -> None:
        before(*args, **options)
        shutil.copy(load_another(tmp_path), shard)

    monkeypatch.setattr(read, "read_into", change)
    with pytest.raises(UserError, match=r"a\.tar changed"):
        run_dedup(settings(shard, tmp_path / "out"))
    assert not list((tmp_path / "out" / "work" / "read").iterdir())


def load_another(tmp_path: Path) -> Path:
    write_shard(tmp_path / "other.tar", [("x", dict(load_part("held_out")[9].members))])
    return tmp_path / "other.tar"


def test_more_pixels_than_pillow_allows_are_decoded_where_they_are_asked_for(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    data = encode(picture(0, 16), "PNG")
    assert decode_image(data).size == (16, 16) and Image.MAX_IMAGE_PIXELS == 100
    assert decode_image(data, max_pixels=256).size == (16, 16)
    with pytest.raises(ImageError, match="16x16, more than 255 pixels"):
        decode_image(data, max_pixels=255)
    assert Image.MAX_IMAGE_PIXELS == 100
    assert np.asarray(decode_image(encode(picture(0, 16), "GIF"), max_pixels=256)).shape == (16, 16, 3)
