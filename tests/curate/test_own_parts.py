"""Parts of one's own in a curation: by file from the command line, and as an installed package's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import afresh
from afresh.errors import UserError
from curate.config import DedupConfig
from curate.decisions.rules import decide, sweep
from curate.dedup import run_dedup
from curate.neighbors.verify import Pairs
from curate.reading.samples import Sample, read_samples
from curate.reading.writing import write_shard
from curate.results.ledger import read_ledger
from tests.curate.own_parts import install_parts, write_parts

ROOT = Path(__file__).resolve().parent.parent.parent
BY_FILE = {
    "image_embedder": "my_parts:Corners",
    "caption_embedder": "my_parts:Letters",
    "rule": "my_parts:exact_only",
    "steps": "my_parts:has_no_e",
    "engine": "my_parts:InTurn",
}
BY_ENTRY_POINT = {
    "image_embedder": "corners",
    "caption_embedder": "letters",
    "rule": "exact-only",
    "steps": "no-e",
    "engine": "in-turn",
}


@pytest.fixture
def shards(sample_shards, tmp_path) -> Path:
    """Twelve samples, three of them twice."""
    samples = [item for url in sample_shards for item in read_samples(url) if isinstance(item, Sample)][::150][:12]
    named = [(f"{'e' if number % 4 == 3 else 'k'}{number}", one.members) for number, one in enumerate(samples)]
    copies = [(f"copy{number}", samples[number].members) for number in (0, 4, 8)]
    (tmp_path / "in").mkdir()
    write_shard(tmp_path / "in" / "a.tar", named[:6])
    write_shard(tmp_path / "in" / "b.tar", named[6:] + copies)
    return tmp_path / "in"


def options(parts: dict[str, str]) -> list[str]:
    return [word for name, value in parts.items() for word in (f"--{name}", value)]


def check_outcome(tmp_path: Path, parts: dict[str, str]) -> None:
    ledger = {row["key"]: row for row in read_ledger(tmp_path / "out").to_pylist()}
    assert len(ledger) == 15
    dropped = {key: row["reason"] for key, row in ledger.items() if row["status"] == "dropped"}
    of_filter = dict.fromkeys(("e3", "e7", "e11"), f"filter:{parts['steps']}")
    assert dropped == of_filter | dict.fromkeys(("copy0", "copy4", "copy8"), "exact_image")
    assert [ledger[f"copy{number}"]["kept_key"] for number in (0, 4, 8)] == ["k0", "k4", "k8"]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["reasons"] == {"exact_image": 3, f"filter:{parts['steps']}": 3}
    assert summary["settings"]["rule"].startswith(f"{parts['rule']} (")
    assert summary["kept"] + summary["dropped"] + summary["unreadable"] == summary["samples"] == 15
    assert "Filters" in (tmp_path / "out" / "report.html").read_text()
    assert (tmp_path / "engine.log").read_text().splitlines()[:2] == ["reading 2", "writing 1"]
    written = [item.key for item in read_samples(str(tmp_path / "out" / "shards" / "000000.tar"))]
    assert written == [key for key, row in ledger.items() if row["status"] == "kept"]


def test_parts_in_a_file_of_the_working_folder(shards, tmp_path, run_cli):
    write_parts(tmp_path)
    done = run_cli("curate", "dedup", shards, "out", *options(BY_FILE))
    assert done.returncode == 0, done.stderr
    check_outcome(tmp_path, BY_FILE)
    image = shards.parent / "asked.webp"
    image.write_bytes(next(iter(read_samples(str(shards / "a.tar")))).image)
    found = run_cli("curate", "search", "out", "--image", image, "--k", "1", "--json")  # by the index's own embedder
    assert found.returncode == 0, found.stderr
    assert '"k0"' in found.stdout or '"copy0"' in found.stdout


def test_parts_of_an_installed_package(shards, tmp_path, run_cli):
    site = install_parts(tmp_path)
    done = run_cli("curate", "dedup", shards, "out", *options(BY_ENTRY_POINT), PYTHONPATH=f"{ROOT}:{site}")
    assert done.returncode == 0, done.stderr
    check_outcome(tmp_path, BY_ENTRY_POINT)
    known = run_cli("curate", "dedup", shards, "other", "--rule", "none", PYTHONPATH=f"{ROOT}:{site}")
    assert known.returncode == 2
    assert known.stderr == (
        "error: rule: unknown 'none': choose greedy, components, exact-only, or your own as module:name\n"
    )


def test_without_the_working_folder_on_pythons_path_they_are_found_too_also_by_worker_processes(shards, tmp_path):
    """As the console scripts are started."""
    write_parts(tmp_path)
    script = "import sys; assert '' not in sys.path; from curate.cli import main; sys.exit(main())"
    parts = options({name: value for name, value in BY_FILE.items() if name != "engine"})
    words = [sys.executable, "-P", "-c", script, "dedup", str(shards), "out", "--workers", "2", *parts]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, timeout=240, env=env)
    assert done.returncode == 0, done.stderr
    assert len(read_ledger(tmp_path / "out")) == 15


@pytest.mark.parametrize(
    ("option", "value", "needle"),
    [
        ("image_embedder", "my_parts:Letters", "embedder 'my_parts:Letters' lacks size: see curate.embed.protocol.Emb"),
        ("image_embedder", "keras:resnet", "unknown embedder 'keras:resnet' (there is no module 'keras'): choose"),
        ("caption_embedder", "my_parts:exact_only", "caption embedder 'my_parts:exact_only' cannot be made"),
        ("rule", "my_parts:nothing", "rule 'my_parts:nothing': there is no 'nothing' in"),
        ("rule", "gready", "rule: unknown 'gready': choose greedy, components, or your own as module:name"),
        ("steps", "has_no_e", "steps: unknown 'has_no_e'"),
        ("steps", "my_parts:Corners.size", "steps: unknown"),
        ("engine", "rya", "engine: unknown 'rya': choose local, ray, ray:ADDRESS, or your own"),
        ("engine", "my_parts:Letters", "engine 'my_parts:Letters' cannot be made"),
    ],
)
def test_parts_that_cannot_be_used_are_named_before_any_work(shards, tmp_path, run_cli, option, value, needle):
    write_parts(tmp_path)
    done = run_cli("curate", "dedup", shards, "out", f"--{option}", value)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert needle in done.stderr


def test_ones_own_rule_and_options_of_our_rules_do_not_go_together(shards, tmp_path, run_cli):
    write_parts(tmp_path)
    done = run_cli("curate", "dedup", shards, "out", "--rule", "my_parts:exact_only", "--keep_copies", "2")
    assert done.returncode == 2
    assert done.stderr == (
        "error: keep_copies is for the rules greedy and components: my_parts:exact_only decides that itself\n"
    )


def test_find_duplicates_takes_them_too(shards, tmp_path, monkeypatch):
    write_parts(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    table = afresh.find_duplicates(str(shards), embedder="my_parts:Corners", rule="my_parts:exact_only")
    assert table["source"].to_pylist()[1::2] == ["b.tar/copy0", "b.tar/copy4", "b.tar/copy8"]
    del sys.modules["my_parts"]


# ----------------------------------------------------------------------------------------------------- filters


def write_filter(tmp_path: Path, name: str, body: str) -> None:
    (tmp_path / f"{name}.py").write_text(f"def keep(sample):\n    {body}\n")


@pytest.fixture
def curate(shards, tmp_path, monkeypatch):
    """Curate with these filters, each time as a process of its own would; the ledger's reasons by key."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def run(*steps: str) -> dict[str, str | None]:
        from afresh import plugins
        from curate.stages.filters import load_filter

        for name in [name for name in sys.modules if name.startswith("own_filter")]:
            del sys.modules[name]
        load_filter.cache_clear()
        plugins._code.cache_clear()
        run_dedup(DedupConfig(shards=[str(shards)], out=str(tmp_path / "out"), workers=1, steps=list(steps)))
        return {row["key"]: row["reason"] for row in read_ledger(tmp_path / "out").to_pylist()}

    return run


def test_what_a_filter_leaves_out_depends_on_its_code_and_nothing_stale_is_taken(curate, tmp_path):
    write_filter(tmp_path, "own_filter_a", "return sample.key != 'k1'")
    assert curate("own_filter_a:keep")["k1"] == "filter:own_filter_a:keep"
    write_filter(tmp_path, "own_filter_a", "return sample.key != 'k22'")
    assert curate("own_filter_a:keep")["k1"] is None
    assert curate()["k1"] is None


def test_the_first_filter_that_says_no_is_the_reason(curate, tmp_path):
    write_filter(tmp_path, "own_filter_a", "return sample.key not in ('k1', 'k2')")
    write_filter(tmp_path, "own_filter_b", "return sample.key not in ('k2', 'k4')")
    reasons = curate("own_filter_a:keep", "own_filter_b:keep")
    assert [reasons[key] for key in ("k1", "k2", "k4")] == [
        "filter:own_filter_a:keep", "filter:own_filter_a:keep", "filter:own_filter_b:keep",
    ]  # fmt: skip
    assert reasons["copy4"] is None  # what was left out stands for nothing


def test_without_filters_nothing_is_as_if_there_were_none(curate, tmp_path, shards):
    curate()
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert "steps" not in summary["settings"] and summary["settings"]["rule"] == "greedy"


@pytest.mark.parametrize(
    ("body", "needle"),
    [
        ("sample.key", "sample 'k0' of a.tar: a filter gives True to keep it or False to leave it out, not None"),
        ("return sample.size > 3", "sample 'k0' of a.tar: AttributeError"),
    ],
)
def test_a_filter_that_fails_stops_the_run_and_is_named_with_the_sample(curate, tmp_path, body, needle):
    write_filter(tmp_path, "own_filter_c", body)
    with pytest.raises(UserError) as caught:
        curate("own_filter_c:keep")
    assert needle in str(caught.value) and str(caught.value).startswith("steps 'own_filter_c:keep'")


# ------------------------------------------------------------------------------------------------------- rules


class Near:
    """Rows 0 and 1 show one image; 2 is near it; 3 has row 0's caption; 4 is alone, its caption near that."""

    image_of = np.array([0, 0, 1, 2, 3])
    image_pairs = Pairs(np.array([0]), np.array([1]), np.array([0.95], np.float32))
    caption_of = np.array([0, 1, 2, 0, 3])
    caption_pairs = Pairs(np.array([0]), np.array([3]), np.array([0.92], np.float32))


CAPTIONS = ["zero", "one", "two", "zero", "nearly zero"]


def stands(*rows):
    return lambda near, captions, order: np.array(rows)


def test_reasons_similarities_and_groups_follow_from_who_stands_for_whom():
    verdicts = decide(Near(), CAPTIONS, rule=stands(-1, 0, 0, 0, 0))
    assert list(verdicts.reason) == [None, "exact_image", "near_image", "caption_quota", "near_caption"]
    assert verdicts.kept_by.tolist() == [-1, 0, 0, 0, 0]
    assert verdicts.group_size.tolist() == [3, 3, 3, 1, 1]
    np.testing.assert_allclose(verdicts.image_similarity, [np.nan, 1, 0.95, np.nan, np.nan], rtol=1e-6)
    assert verdicts.pooled == {0: ["one", "two"]}
    far = decide(Near(), CAPTIONS, rule=stands(-1, -1, -1, 2, -1))
    assert far.reason[3] == "own_rule" and far.group_size.tolist() == [1] * 5


def test_a_rule_sees_the_pairs_above_the_threshold_and_the_rows_to_judge_in_order():
    seen = []

    def rule(near, captions, order):
        seen.append((len(near.image_pairs.i), order.tolist(), list(captions)))
        return np.full(5, -1)

    prefer = np.array([4, 3, 2, 1, 0])
    decide(Near(), CAPTIONS, prefer, rule=rule, excluded=np.array([0, 1, 0, 0, 0], bool), threshold=0.96)
    assert seen == [(0, [4, 3, 2, 0], CAPTIONS)]
    table = sweep(Near(), CAPTIONS, prefer, [0.9, 0.96], rule=rule)
    assert [row["kept"] for row in table] == [5, 5] and [one[0] for one in seen[1:]] == [1, 0]


def test_rows_that_a_list_excludes_are_not_the_rules_to_judge():
    verdicts = decide(Near(), CAPTIONS, rule=stands(-1, 0, 0, -1, -1), excluded=np.array([0, 1, 0, 0, 0], bool))
    assert list(verdicts.reason[:3]) == [None, "excluded", "near_image"]


@pytest.mark.parametrize(
    ("given", "needle"),
    [
        ([0, 1], r"gave int64 \[2\] where a row or -1 for each of the 5 rows belongs"),
        ([0.5] * 5, "gave float64"),
        ([-1, 0, 1, -1, -1], "row 2 cannot be dropped for 1, which is no row that is kept"),
        ([0, -1, -1, -1, -1], "row 0 cannot be dropped for 0"),
        ([9, -1, -1, -1, -1], "row 0 cannot be dropped for 9"),
    ],
)
def test_a_rule_that_gives_something_else_is_refused(given, needle):
    with pytest.raises(UserError, match=needle):
        decide(Near(), CAPTIONS, rule=stands(*given))


def test_a_rule_is_shown_the_pairs_of_large_groups_too():
    """Which our own rules ask for one by one."""
    seen = []

    def rule(near, captions, order):
        seen.append(near.image_pairs)
        return np.full(len(order), -1)

    rng = np.random.default_rng(0)
    crowd = np.tile(rng.standard_normal((1, 8)), (150, 1)) + 1e-3 * rng.standard_normal((150, 8))
    module = type(sys)("own_rule_of_a_test")
    module.rule = rule
    sys.modules["own_rule_of_a_test"] = module
    try:
        afresh.find_duplicates(crowd, rule="own_rule_of_a_test:rule")
    finally:
        del sys.modules["own_rule_of_a_test"]
    assert len(seen[0].i) == 150 * 149 // 2 and seen[0].crowd is None
