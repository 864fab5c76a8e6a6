"""The detection job: rows and judgement, prompts from other places, and runs that are killed."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet as parquet
import pytest

from afresh.errors import UsageError, UserError
from curate.index.training_index import TrainingIndex
from tests.afresh.test_pages import Parts
from train.memorization.config import DetectConfig
from train.memorization.detection.job import run_detect

PROMPTS = ["red apple, food fruit", "grinning face", "flag"]


@pytest.fixture(scope="module")
def model(tiny_pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_pipe.save_pretrained(folder)
    return str(folder)


def test_the_job_writes_rows_and_judges_labels(model, tmp_path):
    file = tmp_path / "prompts.jsonl"
    rows = [{"caption": f"{word} face", "label": i % 2} for i, word in enumerate("abcdef")]
    rows += [{"caption": "unlabelled", "seed": 40}]
    file.write_text("\n".join(map(json.dumps, rows)))
    config = DetectConfig(model, str(file), str(tmp_path / "scores.parquet"), steps=2, seeds=2, bootstrap=50)
    summary = run_detect(config)

    table = parquet.read_table(tmp_path / "scores.parquet").to_pylist()
    assert len(table) == 14
    assert [row["seed"] for row in table[-4:]] == [0, 1, 40, 41]
    assert [row["label"] for row in table[-4:]] == [1, 1, None, None]
    assert table[0]["magnitude"] == pytest.approx(np.mean(table[0]["magnitude_by_step"]))
    assert table[0]["timesteps"] == summary["timesteps"] == [981, 961]

    score_of = {i: np.mean([row["magnitude"] for row in table if row["prompt"] == i]) for i in range(len(rows))}
    pairs = [score_of[i] > score_of[j] for i in (1, 3, 5) for j in (0, 2, 4)]
    assert summary["auc"]["magnitude"] == pytest.approx(np.mean(pairs))
    low, high = summary["auc_interval"]["magnitude"]
    assert low <= summary["auc"]["magnitude"] <= high
    assert 0 <= summary["tpr_at_1pct_fpr"]["magnitude"] <= 1
    assert json.loads((tmp_path / "scores.json").read_text())["auc"] == summary["auc"]
    assert (tmp_path / "scores.png").read_bytes().startswith(b"\x89PNG")
    page = Parts((tmp_path / "scores.html").read_text(encoding="utf-8"))
    assert all(row["caption"] in page.words for row in rows) and "not memorized" in page.words
    assert [link[:11] for link in page.links] == ["data:image/"] * 2

    again = tmp_path / "again.parquet"
    config.out = str(again)
    run_detect(config)
    assert again.read_bytes() == (tmp_path / "scores.parquet").read_bytes()


def test_the_job_without_labels_ranks_only(model, tmp_path):
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS))
    summary = run_detect(DetectConfig(model, str(tmp_path / "p.txt"), str(tmp_path / "s.parquet"), seeds=1))
    assert "auc" not in summary
    assert summary["prompts"] == 3
    values = [row["magnitude"] for row in summary["highest"]]
    assert values == sorted(values, reverse=True)
    assert not (tmp_path / "s.png").exists()


def drawn(folder, rows: list[tuple[str, float | None]]):
    folder.mkdir()
    prompts, similarities = zip(*rows, strict=True)
    table = pyarrow.table({"prompt": prompts, "similarity": pyarrow.array(similarities, pyarrow.float64())})
    parquet.write_table(table, folder / "samples.parquet")
    return folder


def test_the_job_judges_by_outcome_what_the_labels_get_wrong(model, tmp_path):
    captions = [f"{word} face" for word in "abcd"]
    (tmp_path / "p.jsonl").write_text(
        "\n".join(json.dumps({"caption": c, "label": i % 2}) for i, c in enumerate(captions))
    )
    # a (labelled 0) draws a copy with one of two seeds; b (labelled 1) draws none.
    similarities = [("a face", 0.1), ("a face", 0.9), ("b face", 0.5), ("c face", 0.0), ("d face", 0.51)]
    folder = drawn(tmp_path / "drawn", similarities)
    config = DetectConfig(
        model, str(tmp_path / "p.jsonl"), str(tmp_path / "s.parquet"), seeds=1, outcomes=str(folder), bootstrap=10
    )
    summary = run_detect(config)
    table = parquet.read_table(tmp_path / "s.parquet").to_pylist()
    assert [row["outcome"] for row in table] == pytest.approx([0.9, 0.5, 0.0, 0.51])
    a, b, c, d = (row["magnitude"] for row in table)
    by_outcome = summary["by_outcome"]
    assert by_outcome["auc"]["magnitude"] == pytest.approx(np.mean([a > b, a > c, d > b, d > c]))
    assert summary["auc"]["magnitude"] == pytest.approx(np.mean([b > a, b > c, d > a, d > c]))
    assert (by_outcome["memorized"], by_outcome["not_memorized"]) == (2, 2)
    assert summary["less_contradicted"]["auc"]["magnitude"] == pytest.approx(np.mean([b > c, d > c]))
    assert summary["less_contradicted"]["not_memorized"] == 1
    assert (by_outcome["label_0_memorized"], by_outcome["label_1_not_memorized"]) == (1, 1)

    for rows, complaint in (
        (similarities[:3], "no image of 'c face'"),
        ([("a face", None)], "no similarities; draw with train sample --index"),
    ):
        config.outcomes = str(drawn(tmp_path / complaint[:9], rows))
        with pytest.raises(UserError, match=complaint):
            run_detect(config)
    config.outcomes = str(tmp_path / "nowhere")
    with pytest.raises(UserError, match="nowhere: missing; train sample"):
        run_detect(config)


def labelled(path, count: int):
    words = ["red", "blue", "green", "round", "small", "winking", "smiling", "sleepy"]
    rows = [{"caption": f"{words[i % 8]} {words[i // 8]} face", "label": i % 2} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_every_signal_has_its_columns_its_judgement_and_its_curve(model, tmp_path):
    config = DetectConfig(
        model, labelled(tmp_path / "p.jsonl", 6), str(tmp_path / "s.parquet"), steps=2, seeds=2, bootstrap=10,
        signals=["consistency", "magnitude", "agreement", "anisotropy", "attention_entropy"],
    )  # fmt: skip
    summary = run_detect(config)
    assert set(summary["auc"]) == set(summary["tpr_at_1pct_fpr_interval"]) == set(config.signals)
    assert "consistency" in summary["highest"][0]
    row = parquet.read_table(config.out).to_pylist()[0]
    for name in ("magnitude", "attention_entropy"):
        assert len(row[f"{name}_by_step"]) == 2
        assert row[name] == pytest.approx(np.mean(row[f"{name}_by_step"]), rel=1e-6)
    m, cosine = row["anisotropy_parts"]
    assert row["anisotropy"] == pytest.approx(m + 2 * cosine)
    assert m == pytest.approx(row["magnitude_by_step"][0] * 4, rel=1e-4)  # of latents with 16 times the elements
    assert 0 <= row["consistency"] <= 1
    for name in ("s.png", "s.trajectories.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "p.jsonl", "s.html", "s.json", "s.parquet", "s.png", "s.trajectories.png",
    ]  # fmt: skip


def test_a_published_list_is_judged_against_prompts_known_to_be_clean(model, tmp_path):
    # The fields of sdv1_500_memorized.jsonl, released with Wen et al.
    rows = [{"caption": f"<i>{w}</i> face", "index": 10**9 + i, "url": "http://x/y.jpg"} for i, w in enumerate("ab")]
    (tmp_path / "published.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "clean.txt").write_text("c face\nd face\ne face")
    config = DetectConfig(
        model, str(tmp_path / "published.jsonl"), str(tmp_path / "s.parquet"), seeds=1, bootstrap=0,
        negatives=str(tmp_path / "clean.txt"),
    )  # fmt: skip
    summary = run_detect(config)
    assert (summary["memorized"], summary["not_memorized"]) == (2, 3)
    assert parquet.read_table(config.out)["label"].to_pylist() == [1, 1, 0, 0, 0]


def test_prompts_of_a_curation_are_its_most_repeated_captions(model, tmp_path):
    captions = ["once", "Twice", "thrice", "twice", None, "thrice", "also once", "  thrice"]
    rows = np.eye(8, dtype=np.float16)
    index = TrainingIndex.build(rows, captions, ["s"] * 8, list("abcdefgh"), np.arange(8) < 4, np.arange(8), "layout")
    index.save(tmp_path / "curated" / "index")
    config = DetectConfig(model, str(tmp_path / "curated"), str(tmp_path / "s.parquet"), seeds=1, limit=3)
    run_detect(config)
    assert parquet.read_table(config.out)["caption"].to_pylist() == ["thrice", "Twice", "once"]
    config.prompts = str(tmp_path / "curated" / "index")
    run_detect(config)
    assert parquet.read_table(config.out).num_rows == 3
    config.limit = 0
    with pytest.raises(UsageError, match="limit is 0"):
        run_detect(config)
    config.prompts, config.limit = str(tmp_path), 1
    with pytest.raises(UserError, match="no index in .*curate dedup"):
        run_detect(config)


@pytest.mark.timeout(600)
def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(model, tmp_path, capsys):
    config = DetectConfig(
        model, labelled(tmp_path / "p.jsonl", 40), str(tmp_path / "whole.parquet"), steps=3, num_inference_steps=10,
        seeds=3, signals=["magnitude", "consistency", "anisotropy"], batch_size=8, bootstrap=10,
    )  # fmt: skip
    summaries = [run_detect(config)]

    config.out = str(tmp_path / "cut.parquet")
    journal = tmp_path / "cut.rows.jsonl"
    (tmp_path / "detect.yaml").write_text(json.dumps(dataclasses.asdict(config)))
    command = [sys.executable, "-m", "train", "detect", "--config", str(tmp_path / "detect.yaml")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    while not (journal.is_file() and journal.read_bytes().count(b"\n") >= 7):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not (tmp_path / "cut.parquet").exists()
    # What a power cut may leave: a group of two prompts that is not whole, and a line that is not.
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:6]) + lines[6][:50])

    summaries.append(run_detect(config))
    assert "4 of 40 prompts are scored already" in capsys.readouterr().err
    assert (tmp_path / "cut.parquet").read_bytes() == (tmp_path / "whole.parquet").read_bytes()
    for summary in summaries:
        for name in ("seconds_per_prompt", "out", "chart", "page", "trajectories"):
            del summary[name]
    assert summaries[0] == summaries[1]
    assert not journal.exists()


def test_rows_of_other_settings_prompts_or_models_are_not_taken_over(model, tmp_path, monkeypatch):
    config = DetectConfig(model, labelled(tmp_path / "p.jsonl", 4), str(tmp_path / "s.parquet"), seeds=1, batch_size=1)
    with monkeypatch.context() as patch:
        patch.setattr("train.memorization.detection.job.Scores.of", lambda *found: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_detect(config)
    journal = tmp_path / "s.rows.jsonl"
    assert journal.read_text().count("\n") == 5
    config.steps = 2
    with pytest.raises(UsageError, match="other settings .steps.: choose another --out or remove it"):
        run_detect(config)
    config.steps = 1
    labelled(tmp_path / "p.jsonl", 5)
    with pytest.raises(UsageError, match="other settings .prompts."):
        run_detect(config)
    labelled(tmp_path / "p.jsonl", 4)
    weights = next(Path(model).rglob("*.safetensors"))
    before = weights.stat()
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    with pytest.raises(UsageError, match="other settings .model files."):
        run_detect(config)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    journal.write_text("no rows\nat all\n")
    with pytest.raises(UserError, match="s.rows.jsonl: not the rows of a run"):
        run_detect(config)
    journal.unlink()
    run_detect(config)
    assert not journal.exists()


def test_the_job_names_what_is_wrong(model, tmp_path):
    (tmp_path / "p.txt").write_text("a")
    prompts, out = str(tmp_path / "p.txt"), str(tmp_path / "s.parquet")
    with pytest.raises(UsageError, match="ends in .parquet"):
        run_detect(DetectConfig(model, prompts, str(tmp_path / "s.csv")))
    with pytest.raises(UsageError, match="add it to signals"):
        run_detect(DetectConfig(model, prompts, out, calibrate=0.1, signals=["consistency"]))
    with pytest.raises(UsageError, match="at least 2 seeds"):
        run_detect(DetectConfig(model, prompts, out, seeds=1, signals=["consistency"]))
    with pytest.raises(UsageError, match="steps is 51"):  # before anything is read
        run_detect(DetectConfig("no-model", "no-prompts", str(tmp_path / "s.parquet"), steps=51))
    with pytest.raises(UserError, match="no-model"):
        run_detect(DetectConfig("no-model", str(tmp_path / "p.txt"), str(tmp_path / "s.parquet")))
    assert [file.name for file in tmp_path.iterdir()] == ["p.txt"]  # the next run is not bound to the wrong settings
    with pytest.raises(UserError, match="nowhere.txt"):
        run_detect(DetectConfig(model, str(tmp_path / "nowhere.txt"), str(tmp_path / "s.parquet")))
