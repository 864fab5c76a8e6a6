"""Our reader among webdataset's stages: each sample once, damage by the handler, and nothing unpickled."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import webdataset
from torch.utils.data import DataLoader

from afresh.errors import UsageError, UserError
from curate.reading.images import decode_image
from curate.reading.pipeline import (
    BadSampleError,
    ReadShards,
    SafeShards,
    Skipped,
    as_dictionary,
    image_and_caption,
    shard_list,
)
from curate.reading.samples import Sample, read_samples
from curate.reading.writing import write_shard
from tests.documents import run_page


@pytest.fixture(scope="module")
def originals(sample_shards) -> list[Sample]:
    return list(read_samples(sample_shards[0]))[:24]


@pytest.fixture
def shards(originals, tmp_path) -> Path:
    """Four shards of six samples."""
    (tmp_path / "out" / "shards").mkdir(parents=True)
    for number in range(4):
        some = originals[6 * number : 6 * number + 6]
        write_shard(tmp_path / "out" / "shards" / f"{number:06d}.tar", ((one.key, one.members) for one in some))
    return tmp_path / "out" / "shards"


def cut(path: Path) -> Path:
    """The shard, cut inside the image of its last sample."""
    *_, last = read_samples(str(path))
    damaged = path.with_name("damaged.tar")
    damaged.write_bytes(path.read_bytes()[: last.offsets["webp"] + 100])
    return damaged


def keys(samples) -> list[str]:
    return [sample["__key__"] for sample in samples]


def test_samples_are_what_webdataset_makes_of_the_same_shards(shards):
    ours = list(SafeShards(shards))
    theirs = list(webdataset.WebDataset(sorted(map(str, shards.glob("*.tar"))), shardshuffle=False))
    assert len(ours) == 24
    assert [{name: one[name] for name in one if name != "__local_path__"} for one in theirs] == ours


def test_webdatasets_stages_and_ones_own_follow(shards, originals):
    def shout(sample):
        return {**sample, "txt": sample["txt"].upper()}

    tuples = list(SafeShards(shards).decode("pil").map(shout).to_tuple("__key__", "webp", "txt"))
    assert [(key, text) for key, _, text in tuples] == [(one.key, one.caption.upper()) for one in originals]
    assert tuples[0][1].size == decode_image(originals[0].image).size


def test_images_and_captions_come_by_the_rules_of_curation(shards, originals):
    for sample, original in zip(SafeShards(shards).map(image_and_caption), originals, strict=True):
        assert sample["image"].tobytes() == decode_image(original.image).tobytes()
        assert sample["caption"] == original.caption


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_of_a_loader_see_each_sample_once(shards, originals, start):
    loader = DataLoader(SafeShards(shards), batch_size=None, num_workers=2, multiprocessing_context=start)
    assert sorted(keys(loader)) == sorted(one.key for one in originals)


def test_a_stage_takes_captions_from_the_field_that_is_named(tmp_path, originals):
    write_shard(tmp_path / "a.tar", [("a", {"webp": originals[0].image, "txt": b"one", "json": b'{"alt": "two"}'})])
    (sample,) = ReadShards(caption_field="alt")([{"url": str(tmp_path / "a.tar")}])
    assert sample.caption == "two"


def test_nodes_see_each_sample_once(shards, originals, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    of_node = []
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        of_node.append(keys(SafeShards(shards)))
    assert [len(one) for one in of_node] == [12, 12]
    assert sorted(sum(of_node, [])) == sorted(one.key for one in originals)
    assert len(keys(SafeShards(shards, nodesplitter=None))) == 24


def test_shards_are_shuffled_anew_in_each_epoch_and_alike_with_one_seed(shards, originals):
    def epochs(seed):
        samples = SafeShards(shards, shardshuffle=4, seed=seed)
        return [keys(samples) for _ in range(3)]

    first = epochs(0)
    assert epochs(0) == first != epochs(1)
    assert len({tuple(one) for one in first}) > 1
    assert all(sorted(one) == sorted(sample.key for sample in originals) for one in first)


def test_damage_is_raised_with_its_shard_and_sample_or_handled(shards):
    damaged = cut(shards / "000001.tar")
    with pytest.raises(BadSampleError, match=r"damaged\.tar: '\w+': .*truncated") as caught:
        list(SafeShards([damaged, shards / "000002.tar"]))
    assert caught.value.bad.kind == "truncated"

    skipped = Skipped()
    read = keys(SafeShards([damaged, shards / "000002.tar"], handler=skipped))
    assert len(read) == 5 + 6 and dict(skipped.kinds) == {"truncated": 1}
    assert keys(SafeShards([damaged, shards / "000002.tar"], handler=webdataset.ignore_and_continue)) == read
    assert keys(SafeShards([damaged, shards / "000002.tar"], handler=webdataset.ignore_and_stop)) == read[:5]


def test_damage_in_a_worker_reaches_the_loop(shards):
    loader = DataLoader(SafeShards(cut(shards / "000001.tar")), batch_size=None, num_workers=1)
    with pytest.raises(BadSampleError, match="truncated"):
        list(loader)


def test_what_is_skipped_is_named_ten_times_and_counted_always(tmp_path, capsys):
    write_shard(tmp_path / "s.tar", [(f"k{number}", {"txt": b"no image"}) for number in range(12)])
    skipped = Skipped()
    assert list(SafeShards(tmp_path / "s.tar", handler=skipped)) == []
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10 and "s.tar: 'k0': no image" in lines[0]
    assert skipped.kinds == {"no_image": 12}


def test_images_that_cannot_be_decoded_and_missing_captions_go_to_the_handler_of_the_step(tmp_path, originals):
    image = originals[0].image
    members = {"good": {"webp": image, "txt": b"a"}, "bad": {"webp": image[:90], "txt": b"b"}, "bare": {"webp": image}}
    write_shard(tmp_path / "s.tar", members.items())
    skipped = Skipped()
    assert keys(SafeShards(tmp_path / "s.tar").map(image_and_caption, handler=skipped)) == ["good"]
    assert dict(skipped.kinds) == {"unreadable_image": 1, "no_caption": 1}
    bare = image_and_caption({"__key__": "k", "__url__": "u", "webp": image}, missing_caption="empty")
    assert bare["caption"] == ""
    with pytest.raises(BadSampleError, match="more than 10 pixels"):
        image_and_caption({"__key__": "k", "__url__": "u", "webp": image}, max_pixels=10)


def test_a_shard_that_cannot_be_opened_is_no_sample_to_skip(shards):
    pipeline = SafeShards(shards, handler=Skipped())
    (shards / "000002.tar").unlink()
    with pytest.raises(UserError, match=r"cannot open shard .*000002\.tar"):
        list(pipeline)
    assert len(keys(SafeShards(shards, handler=webdataset.ignore_and_continue))) == 18


def test_commands_in_the_place_of_shards_are_refused(tmp_path):
    with pytest.raises(UsageError, match="pipe: URLs are refused"):
        SafeShards(f"pipe:touch {tmp_path / 'touched'}")
    with pytest.raises(UsageError, match="pipe: URLs are refused"):
        list(ReadShards()([{"url": f"pipe:touch {tmp_path / 'touched'}"}]))
    assert not (tmp_path / "touched").exists()


class _Touches:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_decoding_unpickles_nothing(tmp_path, originals):
    import gzip

    program = pickle.dumps(_Touches(str(tmp_path / "made")))
    members = {"webp": originals[0].image, "txt": b"a", "json": b'{"n": 1}', "pyd": program, "pth": program}
    write_shard(tmp_path / "s.tar", [("k", {**members, "x.pickle": program, "pkl.gz": gzip.compress(program)})])
    sample = next(iter(SafeShards(tmp_path / "s.tar").decode()))
    assert (sample["txt"], sample["json"]) == ("a", {"n": 1})
    assert sample["pyd"] == sample["pth"] == sample["x.pickle"] == sample["pkl.gz"] == program
    assert not (tmp_path / "made").exists()
    own = next(iter(SafeShards(tmp_path / "s.tar").decode(lambda key, data: len(data) if key == ".pyd" else None)))
    assert own["pyd"] == len(program)


def test_names_that_webdataset_keeps_for_itself_are_refused(tmp_path, originals):
    write_shard(tmp_path / "s.tar", [("k", {"webp": originals[0].image, "__url__": b"file:///etc/passwd"})])
    with pytest.raises(BadSampleError, match="refused member"):
        list(SafeShards(tmp_path / "s.tar"))


def test_the_stages_stand_alone(shards, originals):
    some = shard_list([str(shards / "00000[01].tar"), str(shards / "000003.tar")])
    pipeline = webdataset.DataPipeline(some, webdataset.split_by_worker, ReadShards())
    assert [(one.key, one.caption) for one in pipeline] == [
        (one.key, one.caption) for one in originals[:12] + originals[18:]
    ]
    assert as_dictionary(originals[0])["__key__"] == originals[0].key


def test_webdatasets_writer_gives_our_bytes_one_member_at_a_time(tmp_path):
    """If that changes, or it does not sort the members any more, writing.py's reasons change."""
    sizes = {"a": 0, "folder/b": 1, "k" * 96: 511, "l" * 97: 512, "folder/" + "m" * 150: 513, "é": 9999}
    samples = [(key, {"txt": bytes(size), "jpg": b"x"}) for key, size in sizes.items()]
    write_shard(tmp_path / "ours.tar", samples)
    fixed = {"user": "", "group": "", "mode": 0o644, "mtime": 0, "encoder": False, "keep_meta": True}
    with open(tmp_path / "theirs.tar", "wb") as file, webdataset.TarWriter(file, **fixed) as writer:
        for key, members in samples:
            for ext, data in members.items():
                writer.write({"__key__": key, ext: data})
    assert (tmp_path / "ours.tar").read_bytes() == (tmp_path / "theirs.tar").read_bytes()


def test_the_page_on_webdataset_does_what_it_says(originals, tmp_path, monkeypatch):
    (tmp_path / "out" / "shards").mkdir(parents=True)
    write_shard(tmp_path / "out" / "shards" / "000000.tar", ((one.key, one.members) for one in originals))
    write_shard(tmp_path / "whole.tar", ((one.key, one.members) for one in originals[:6]))
    cut(tmp_path / "whole.tar")
    monkeypatch.chdir(tmp_path)
    assert run_page("webdataset.md") == 4
