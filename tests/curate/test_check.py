"""``curate check`` reads everything, lists what is broken by kind, and changes nothing."""

from __future__ import annotations

import io
import json

import pytest
from PIL import Image

from curate.check import run_check
from curate.config import CheckConfig
from curate.console import UsageError
from curate.shards import write_shard


@pytest.fixture
def shards(tmp_path):
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(buffer, "PNG")
    good = {"png": buffer.getvalue(), "txt": b"red"}
    write_shard(tmp_path / "good.tar", [("a", good), ("b", good)])
    broken = [
        ("a", good),
        ("image", {**good, "png": b"no"}),
        ("caption", {"png": good["png"]}),
        ("both", {"png": b""}),
        ("noimage", {"txt": b"words"}),
    ]
    write_shard(tmp_path / "broken.tar", broken)
    data = (tmp_path / "good.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(data[: 4 * 512])
    return tmp_path


def test_a_good_set_has_no_problems(sample_shards):
    summary = run_check(CheckConfig(shards=sample_shards[:1], workers=1))
    assert summary["samples"] == summary["readable"] == 477
    assert (summary["problems"], summary["listed"], summary.exit_code) == (0, [], 0)


@pytest.mark.parametrize("workers", [1, 2])
def test_every_problem_is_listed_with_its_place_and_kind(shards, workers):
    summary = run_check(CheckConfig(shards=[str(shards)], workers=workers))
    listed = {(row["shard"], row["key"], row["kind"]) for row in summary["listed"]}
    assert listed == {
        ("broken.tar", "image", "unreadable_image"),
        ("broken.tar", "caption", "no_caption"),
        ("broken.tar", "both", "unreadable_image"),
        ("broken.tar", "both", "no_caption"),
        ("broken.tar", "noimage", "no_image"),
        ("cut.tar", "", "truncated"),
    }
    assert summary["kinds"] == {"no_caption": 2, "no_image": 1, "truncated": 1, "unreadable_image": 2}
    assert (summary["problems"], summary["readable"], summary.exit_code) == (6, 4, 1)


def test_all_are_counted_when_few_are_listed(shards):
    summary = run_check(CheckConfig(shards=[str(shards)], workers=1, list_at_most=2))
    assert (len(summary["listed"]), summary["problems"]) == (2, 6)


def test_bad_settings_are_bad_usage(shards):
    for changes in ({"shards": [str(shards / "nowhere")]}, {"max_pixels": 0}, {"workers": -1}):
        with pytest.raises(UsageError):
            run_check(CheckConfig(**{"shards": [str(shards)], **changes}))


def test_the_command_lists_problems_as_json_and_as_a_table(shards, run_cli):
    as_json = run_cli("curate", "check", shards, "--json")
    assert json.loads(as_json.stdout)["problems"] == 6
    as_text = run_cli("curate", "check", shards / "cut.tar")
    assert "truncated" in as_text.stdout
    assert as_json.returncode == as_text.returncode == 1
    assert run_cli("curate", "check", shards / "good.tar").returncode == 0
