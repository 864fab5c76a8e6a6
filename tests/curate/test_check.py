"""``curate check`` reads everything, lists what is broken by kind, and changes nothing."""

from __future__ import annotations

import io
import json
import re
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from afresh.errors import UsageError
from curate.check import KINDS, USABLE, run_check
from curate.config import CheckConfig
from curate.reading.writing import write_shard


def png(colour: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), colour).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def shards(tmp_path):
    good = {"png": png(), "txt": b"red"}
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


def test_a_name_does_not_steer_the_terminal(tmp_path, run_cli):
    write_shard(tmp_path / "s.tar", [("\x1b[2Ja\nb", {"txt": b"words, and no image"})])
    as_text = run_cli("curate", "check", tmp_path / "s.tar")
    assert "\x1b" not in as_text.stdout and r"\x1b[2Ja\nb" in as_text.stdout
    as_json = run_cli("curate", "check", tmp_path / "s.tar", "--json")
    assert json.loads(as_json.stdout)["listed"][0]["key"] == "\x1b[2Ja\nb"


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


@pytest.fixture
def every_kind(tmp_path) -> Path:
    """A folder of shards with each kind of problem once, and one sample without any in each shard."""
    good = [("good.png", png()), ("good.txt", b"red")]

    def write(name: str, *members: tuple[str, bytes], cut: int = 0, behind: bytes = b"") -> None:
        with tarfile.open(tmp_path / name, "w") as tar:
            for member, data in [*good, *members]:
                info = tarfile.TarInfo(member)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[: len(data) - cut] + behind)

    write("truncated.tar", cut=10240 - 4 * 512)
    write("corrupt_archive.tar", cut=10240 - 4 * 512, behind=b"?" * 2048)
    write("trailing_data.tar", behind=(tmp_path / "truncated.tar").read_bytes())
    write("refused_member.tar", ("../a.png", png()))
    write("repeated_key.tar", ("a.png", png()), ("a.txt", b"w"), ("good.txt", b"late"))
    write("stray_member.tar", ("README", b"?"))
    write("no_image.tar", ("a.txt", b"words"))
    write("several_images.tar", ("a.png", png()), ("a.webp", png("blue")), ("a.txt", b"words"))
    write("unreadable_image.tar", ("a.png", png()[:40]), ("a.txt", b"words"))
    write("no_caption.tar", ("a.png", png()), ("a.txt", b"\xff"))
    write("empty_caption.tar", ("a.png", png()), ("a.txt", b"\n"))
    return tmp_path


def test_every_kind_has_its_word_and_spoils_nothing_else(every_kind):
    summary = run_check(CheckConfig(shards=[str(every_kind)], workers=1))
    assert {(row["shard"], row["kind"]) for row in summary["listed"]} == {(f"{kind}.tar", kind) for kind in KINDS}
    assert summary["kinds"] == dict.fromkeys(sorted(KINDS), 1)
    good_of_each_and_three_more = len(KINDS) + 3  # beside the repeated key, with two images, with an empty caption
    assert summary["readable"] == good_of_each_and_three_more


def test_curation_has_a_row_with_its_reason_for_each_problem(every_kind, tmp_path_factory):
    from curate.config import DedupConfig
    from curate.dedup import run_dedup
    from curate.results.ledger import read_ledger

    out = tmp_path_factory.mktemp("curated") / "out"
    checked = run_check(CheckConfig(shards=[str(every_kind)], workers=1))
    summary = run_dedup(DedupConfig(shards=[str(every_kind)], out=str(out), workers=1))
    assert (summary["samples"], summary["samples"] - summary["unreadable"]) == (checked["samples"], checked["readable"])
    unreadable = {
        (row["shard"], row["key"], row["reason"])
        for row in read_ledger(out).to_pylist()
        if row["status"] == "unreadable"
    }
    listed = {(row["shard"], row["key"], row["reason"]) for row in checked["listed"]}
    usable = {(row["shard"], row["key"], row["reason"]) for row in checked["listed"] if row["kind"] in USABLE}
    assert len(usable) == 2 and unreadable == listed - usable


def test_the_kinds_are_those_of_the_documentation():
    text = (Path(__file__).parents[2] / "docs" / "design.md").read_text(encoding="utf-8")
    table = text.partition("| kind | what it means |")[2].partition("\n\n")[0]
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == list(KINDS)


def test_all_are_counted_when_few_are_listed(shards):
    summary = run_check(CheckConfig(shards=[str(shards)], workers=1, list_at_most=2))
    assert (len(summary["listed"]), summary["problems"]) == (2, 6)


@pytest.fixture
def repeated(tmp_path) -> Path:
    """Two shards, each of one sample and 300 more under its key."""
    for name in ("a", "b"):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            for ext in ["png", *["png", "txt"] * 300]:
                info = tarfile.TarInfo(f"k.{ext}")
                tar.addfile(info)
    return tmp_path


def test_a_terminal_sees_a_few_of_each_kind_and_how_many_more_there_are(repeated, run_cli):
    done = run_cli("curate", "check", repeated)
    problems = run_check(CheckConfig(shards=[str(repeated)], workers=1))["problems"]
    rows = [line for line in done.stdout.splitlines() if ".tar" in line]
    assert problems > 600 and 6 <= len(rows) <= 12
    assert f"{problems - len(rows):,} more problems are counted, and not shown here" in done.stdout
    assert len(json.loads(run_cli("curate", "check", repeated, "--json").stdout)["listed"]) == problems


@pytest.mark.parametrize(("at_most", "listed"), [(2, 2), (0, 0), (None, 602)])
def test_no_shard_holds_more_than_is_to_be_listed(repeated, monkeypatch, at_most, listed):
    from curate import check

    before, most = check._check_shard, []

    def watched(task):
        found = before(task)
        most.append(len(found["listed"]))
        return found

    monkeypatch.setattr(check, "_check_shard", watched)
    monkeypatch.setattr(check, "ROWS_HELD", 0)
    summary = run_check(CheckConfig(shards=[str(repeated)], workers=1, list_at_most=at_most))
    assert len(summary["listed"]) == (summary["problems"] if at_most is None else listed)
    assert at_most is None or max(most) <= at_most


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
