"""Shards by their names: folders, globs, braces and URLs; what names none, or a command, is refused."""

from __future__ import annotations

import io

import pytest

from afresh.errors import UsageError, UserError
from curate.reading.samples import read_samples
from curate.reading.urls import expand_shards, shard_names
from tests.curate.reading.made_shards import kinds, three_samples


def test_shards_are_expanded_from_folders_globs_and_braces(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.tar").touch()
    (tmp_path / "notes.txt").touch()
    all_three = [str(tmp_path / f"{number}.tar") for number in range(3)]
    assert expand_shards([str(tmp_path)]) == all_three
    assert expand_shards([f"{tmp_path}/*.tar"]) == all_three
    assert expand_shards(f"{tmp_path}/{{0..2}}.tar") == all_three
    assert expand_shards([all_three[2], str(tmp_path)]) == [all_three[2], *all_three[:2]]
    assert expand_shards([f"memory://x/{{0..1}}.tar"]) == ["memory://x/0.tar", "memory://x/1.tar"]  # noqa: F541


def test_hidden_files_are_no_shards(tmp_path):
    import fsspec

    for name in ("0.tar", "._0.tar", ".tmp-030857faf2866027-1.tar"):  # a Mac's, and one that a killed job left
        (tmp_path / name).write_bytes(three_samples())
        with fsspec.open(f"memory://hidden/{name}", "wb") as stream:
            stream.write(three_samples())
    assert expand_shards([str(tmp_path)]) == [str(tmp_path / "0.tar")]
    assert expand_shards(["memory://hidden/*.tar"]) == ["memory:///hidden/0.tar"]
    assert len(expand_shards([f"{tmp_path}/.*.tar"])) == 2  # asked for by name


def test_a_folder_of_images_is_told_what_makes_shards_of_it_and_a_curation_where_its_shards_are(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").touch()
    with pytest.raises(UsageError, match="photos': the folder holds no .*; curate import makes shards of images"):
        expand_shards([str(tmp_path / "photos")])
    (tmp_path / "curated" / "shards").mkdir(parents=True)
    with pytest.raises(UsageError, match="did you mean .*curated/shards"):
        expand_shards([str(tmp_path / "curated")])


@pytest.mark.parametrize("pattern", ["nowhere/*.tar", "nowhere.tar", "nowhere-{0..2}.tar", "{0..", "."])
def test_a_pattern_that_names_nothing_is_bad_usage_and_named(tmp_path, monkeypatch, pattern):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="shards") as caught:
        expand_shards([pattern])
    assert pattern in str(caught.value)


def test_commands_as_shards_are_refused(tmp_path):
    ran = tmp_path / "ran"
    for refused in (expand_shards, lambda url: list(read_samples(url))):
        with pytest.raises(UsageError, match="pipe"):
            refused(f"pipe:touch {ran}")
    assert not ran.exists()


def test_a_shard_that_cannot_be_read_to_its_end_is_an_error_and_not_taken_for_a_shorter_one(tmp_path, monkeypatch):
    class Flaky(io.BytesIO):
        def read(self, size=-1, /):
            if self.tell() >= 2048:
                raise OSError(5, "Input/output error")
            return super().read(size)

    monkeypatch.setattr("builtins.open", lambda *_: Flaky(three_samples()))
    with pytest.raises(UserError, match="cannot read shard far.tar: .*Input/output error"):
        list(read_samples("far.tar"))


def test_a_shard_that_cannot_be_opened_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere.tar"):
        list(read_samples(str(tmp_path / "nowhere.tar")))


def test_shards_are_read_from_urls(tmp_path):
    import fsspec

    with fsspec.open("memory://set/0.tar", "wb") as stream:
        stream.write(three_samples())
    assert kinds(list(read_samples("memory://set/0.tar"))) == [("a", "ok"), ("b", "ok"), ("c", "ok")]


def test_shard_names_are_file_names_and_longer_only_where_needed():
    assert shard_names(["/x/a/0.tar", "/x/b/1.tar"]) == ["0.tar", "1.tar"]
    assert shard_names(["/x/a/0.tar", "/x/b/0.tar", "s3://set/2.tar"]) == ["a/0.tar", "b/0.tar", "2.tar"]
