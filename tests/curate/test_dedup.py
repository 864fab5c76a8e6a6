"""Curation loses nothing, drops what is a copy, and refuses bad settings before it writes."""

from __future__ import annotations

import dataclasses
import hashlib
import json

import numpy as np
import pytest

from afresh.errors import UsageError, UserError
from curate.config import DedupConfig
from curate.dedup import run_dedup
from curate.embed.registry import load_embedder
from curate.index.training_index import TrainingIndex
from curate.reading.images import decode_image
from curate.reading.samples import Sample, read_samples
from curate.reading.writing import write_shard
from curate.results.ledger import SCHEMA, read_ledger
from curate.sample_set import load_part
from tests.curate.made_mess import everything, settings
from tests.curate.made_sources import encode


def test_the_output_is_as_the_contract_lists_it(curated):
    out, summary = curated
    assert {path.name for path in out.iterdir()} == {
        "shards", "ledger.parquet", "index", "report.html", "summary.json", "work"
    }  # fmt: skip
    assert {path.name for path in (out / "shards").iterdir()} >= {"000000.tar"}
    assert {"samples", "kept", "dropped", "unreadable", "groups", "recall", "seconds"} <= set(summary)
    stored = json.loads((out / "summary.json").read_text())
    assert stored.pop("settings")["threshold"] == 0.9
    assert "seconds" not in stored and stored == {key: summary[key] for key in stored}


def test_the_sweep_says_what_other_thresholds_would_keep(curated, mess, tmp_path):
    _, summary = curated
    thresholds = [row["threshold"] for row in summary["sweep"]]
    assert thresholds == [0.85, 0.86, 0.87, 0.88, 0.89, 0.9, 0.91, 0.92, 0.93, 0.94, 0.95]
    here = summary["sweep"][5]
    assert (here["kept"], here["groups"]) == (summary["kept"], summary["groups"])
    other = run_dedup(settings(mess, tmp_path / "other", threshold=0.93, sweep=0))
    assert summary["sweep"][8] | {"threshold": 0} == {
        "threshold": 0, "kept": other["kept"], "dropped": other["dropped"], "groups": other["groups"]
    }  # fmt: skip
    assert other["sweep"] == []


def test_a_number_in_the_json_decides_which_copy_stays(tmp_path):
    original = load_part("held_out")[0]
    scores = [0.5, 7, None, "9", 2.5, True]
    alike = {"png": original.image, "txt": original.members["txt"]}
    samples = [(f"s{n}", alike | {"json": json.dumps({"score": score}).encode()}) for n, score in enumerate(scores)]
    write_shard(tmp_path / "in" / "000000.tar", samples)
    for prefer, expected in (("+score", "s1"), ("-score", "s0"), ("+missing", "s0")):
        out = tmp_path / prefer
        run_dedup(settings(tmp_path / "in", out, prefer=[prefer, "resolution"]))
        assert [row["key"] for row in read_ledger(out).to_pylist() if row["status"] == "kept"] == [expected]
    with pytest.raises(UsageError, match="unknown criterion 'score'"):
        run_dedup(settings(tmp_path / "in", tmp_path / "other", prefer=["score"]))


def test_what_another_curation_holds_is_dropped(curated, mess, tmp_path):
    out, _ = curated
    samples = [s for s in everything(mess).values() if s.image_ext is not None][:12]
    new = [(f"old{n}", dict(sample.members)) for n, sample in enumerate(samples)]
    fresh = [dict(s.members) for s in load_part("held_out")[:8]]
    new += [(f"new{n}", members) for n, members in enumerate(fresh)]
    write_shard(tmp_path / "batch" / "000000.tar", new)
    batch = DedupConfig(
        shards=[str(tmp_path / "batch")], out=str(tmp_path / "out"), workers=1, threshold=0.98, against=[str(out)]
    )
    summary = run_dedup(batch)
    rows = {row["key"]: row for row in read_ledger(tmp_path / "out").to_pylist()}
    old = [rows[f"old{n}"] for n in range(12)]
    assert all(row["status"] == "dropped" and row["reason"] == "other_set" for row in old)
    assert all(row["image_similarity"] > 0.999 for row in old)
    identities = {(f"{out}:{row['shard']}", row["key"]) for row in read_ledger(out).to_pylist()}
    assert all((row["kept_shard"], row["kept_key"]) in identities for row in old)
    assert summary["reasons"]["other_set"] == 12 + sum(
        rows[f"new{n}"]["reason"] == "other_set" for n in range(8)
    )
    kept = [members[ext] for members in fresh for ext in members if ext in ("png", "jpg", "webp")]
    kept = [image for n, image in enumerate(kept) if rows[f"new{n}"]["status"] == "kept"]
    index = TrainingIndex.load(out)
    nearest, _ = index.search(load_embedder(index.embedder).embed([decode_image(image) for image in kept]), 1)
    assert len(kept) == summary["kept"] > 0 and (nearest < 0.98).all()
    with pytest.raises(UsageError, match="embedder 'layout', not 'copy-detector'"):
        run_dedup(dataclasses.replace(batch, image_embedder="copy-detector", out=str(tmp_path / "other")))
    with pytest.raises(UserError, match="no index in"):
        run_dedup(dataclasses.replace(batch, against=[str(tmp_path)], out=str(tmp_path / "other")))


def test_every_sample_has_exactly_one_row(curated, mess):
    out, summary = curated
    table = read_ledger(out)
    assert table.schema.equals(SCHEMA)
    read = [
        (item.shard, item.key) for shard in sorted(mess.glob("*.tar")) for item in read_samples(str(shard))
    ]
    assert list(zip(table["shard"].to_pylist(), table["key"].to_pylist(), strict=True)) == read
    assert table["row"].to_pylist() == list(range(len(read)))
    status = table["status"].to_pylist()
    counts = {name: status.count(name) for name in ("kept", "dropped", "unreadable")}
    assert counts == {name: summary[name] for name in counts}
    assert sum(counts.values()) == summary["samples"]


def test_every_dropped_sample_has_a_kept_one_that_stands_for_it(curated):
    rows = {(row["shard"], row["key"]): row for row in read_ledger(curated[0]).to_pylist()}
    dropped = [row for row in rows.values() if row["status"] == "dropped"]
    assert dropped
    for row in dropped:
        stand_in = rows[row["kept_shard"], row["kept_key"]]
        assert stand_in["status"] == "kept"
        assert stand_in["group"] == row["group"] and stand_in["group_size"] == row["group_size"] >= 2
        assert row["image_similarity"] >= 0.9 - 1e-3


def test_planted_copies_are_found_for_what_they_are(curated):
    rows = {row["key"]: row for row in read_ledger(curated[0]).to_pylist() if row["shard"] != "a.tar"}
    for number in range(20):
        group = {rows[f"{kind}{number:02d}"]["group"] for kind in ("exact", "png", "jpeg", "other")}
        assert len(group) == 1, number
    exact = [rows[f"{kind}{number:02d}"]["reason"] for kind in ("exact", "png") for number in range(20)]
    assert exact.count("exact_image") >= 30  # some emoji are near one another, and go with their original
    near = [rows[f"jpeg{number:02d}"]["reason"] for number in range(20)]
    assert near.count("near_pair") >= 15
    other = [rows[f"other{number:02d}"]["reason"] for number in range(20)]
    assert other.count("near_image") == 20


def test_most_untouched_images_stay(curated):
    rows = [row for row in read_ledger(curated[0]).to_pylist() if row["shard"] == "a.tar"]
    groups = {row["group"] for row in rows}
    assert len(groups) >= 0.8 * len(rows)


def test_unreadable_samples_are_rows_with_their_reason(curated):
    rows = {row["key"]: row for row in read_ledger(curated[0]).to_pylist() if row["shard"] == "c.tar"}
    assert rows["broken"]["status"] == "unreadable" and "image" in rows["broken"]["reason"]
    assert rows["broken"]["sha256"] == hashlib.sha256(b"no image").hexdigest()
    assert rows["broken"]["group"] is None
    assert rows["captionless"]["status"] == "unreadable" and "no caption" in rows["captionless"]["reason"]


def test_the_index_holds_kept_and_dropped_samples(curated):
    from curate.index.training_index import TrainingIndex

    out, summary = curated
    index = TrainingIndex.load(out / "index")
    assert len(index.captions) == summary["kept"] + summary["dropped"]
    assert int(np.asarray(index.kept).sum()) == summary["kept"]


def test_a_cut_shard_keeps_its_good_samples_and_says_truncated(mess, tmp_path):
    data = (mess / "a.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(data[: len(data) // 2])
    summary = run_dedup(settings(tmp_path / "cut.tar", tmp_path / "out"))
    rows = read_ledger(tmp_path / "out").to_pylist()
    assert summary["kept"] + summary["dropped"] >= 20 and summary["unreadable"] == 1
    assert rows[-1]["status"] == "unreadable" and "truncated" in rows[-1]["reason"]


def test_images_without_caption_are_curated_when_asked(mess, tmp_path):
    run_dedup(settings(mess, tmp_path / "out", missing_caption="empty"))
    rows = {row["key"]: row for row in read_ledger(tmp_path / "out").to_pylist()}
    assert rows["captionless"]["status"] in ("kept", "dropped")
    assert rows["broken"]["status"] == "unreadable"


@pytest.mark.parametrize(
    "prefer, kept", [(["resolution"], "big"), (["lossless", "resolution"], "stored"), ([], "first")]
)
def test_the_preferred_copy_is_kept(sample_shards, tmp_path, prefer, kept):
    sample = next(s for s in read_samples(sample_shards[0]) if isinstance(s, Sample))
    image = decode_image(sample.image)
    caption = {"txt": b"one caption of them all"}
    copies = [
        ("first", {"jpg": encode(image, "JPEG", quality=90), **caption}),
        ("stored", {"png": encode(image, "PNG"), **caption}),
        ("big", {"jpg": encode(image.resize((2 * image.width, 2 * image.height)), "JPEG", quality=90), **caption}),
    ]
    write_shard(str(tmp_path / "in" / "000000.tar"), copies)
    run_dedup(settings(tmp_path / "in", tmp_path / "out", prefer=prefer))
    assert [key for _, key in everything(tmp_path / "out" / "shards")] == [kept]


def test_a_set_without_readable_samples_fails_with_a_ledger(tmp_path):
    write_shard(tmp_path / "s.tar", [("a", {"jpg": b"?", "txt": b"words"})])
    with pytest.raises(UserError, match="none of the 1 samples"):
        run_dedup(settings(tmp_path / "s.tar", tmp_path / "out"))
    assert read_ledger(tmp_path / "out")["status"].to_pylist() == ["unreadable"]


def test_one_sample_is_a_set(mess, tmp_path):
    sample = next(iter(read_samples(str(mess / "a.tar"))))
    write_shard(tmp_path / "s.tar", [(sample.key, sample.members)])
    summary = run_dedup(settings(tmp_path / "s.tar", tmp_path / "out"))
    assert (summary["kept"], summary["dropped"], summary["groups"]) == (1, 0, 0)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"threshold": 0.0}, "threshold"),
        ({"threshold": 1.5}, "threshold"),
        ({"caption_threshold": -1.0}, "caption_threshold"),
        ({"max_per_caption": 0}, "max_per_caption"),
        ({"samples_per_shard": 0}, "samples_per_shard"),
        ({"workers": -1}, "workers"),
        ({"join_memory": 0}, "join_memory"),
        ({"gpu_share": 0}, "gpu_share"),
        ({"image_embedder": "no-such-embedder"}, "no-such-embedder"),
        ({"shards": ["nowhere"]}, "nowhere"),
        ({"shards": ["pipe:cat x"]}, "pipe"),
    ],
)
def test_bad_settings_are_bad_usage_before_anything_is_written(mess, tmp_path, changes, named):
    with pytest.raises(UsageError, match=named):
        run_dedup(settings(mess, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_foreign_or_holds_the_input_or_cannot_be_written_is_refused(mess, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="not empty"):
        run_dedup(settings(mess, tmp_path / "mine"))
    with pytest.raises(UsageError, match="holds the input"):
        run_dedup(settings(mess, mess))
    with pytest.raises(UsageError, match="is a file"):
        run_dedup(settings(mess, tmp_path / "mine" / "thesis.txt"))
    with pytest.raises(UsageError, match="cannot write"):
        run_dedup(settings(mess, tmp_path / "mine" / "thesis.txt" / "out"))
    with pytest.raises(UsageError, match="work_dir goes with an out at a URL"):
        run_dedup(settings(mess, tmp_path / "out", work_dir=str(tmp_path)))
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_the_command_line_prints_one_summary(mess, tmp_path, run_cli):
    done = run_cli("curate", "dedup", mess, tmp_path / "out", "--workers", "1", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["samples"] == 144
    found = run_cli("curate", "search", tmp_path / "out", "--caption", "smiling face", "--k", "3")
    assert found.returncode == 0 and "smiling" in found.stdout
    refused = run_cli("curate", "dedup", tmp_path / "nothing", tmp_path / "out2")
    assert refused.returncode == 2 and "nothing" in refused.stderr and "Traceback" not in refused.stderr
