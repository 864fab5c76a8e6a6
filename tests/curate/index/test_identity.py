"""An index knows its embedder by weights and preparation, under whatever name they lie, wherever the two meet."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from afresh.errors import UsageError, UserError
from curate.config import DedupConfig, SearchConfig
from curate.dedup import run_dedup
from curate.embed.registry import load_embedder
from curate.index.training_index import TrainingIndex, refuse_other
from curate.reading.writing import write_shard
from curate.results.ledger import read_ledger
from curate.sample_set import load_part
from curate.search import run_search
from train.sampling.pipelines.session import open_index
from train.sampling.terms.amg import AMG

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")


class Projected(torch.nn.Module):
    """Pixels, projected at random."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        weight = torch.randn(3 * 16 * 16, 32, generator=torch.Generator().manual_seed(seed))
        self.weight = torch.nn.Parameter(weight)

    def forward(self, x):
        return x.reshape(-1, 3 * 16 * 16) @ self.weight


def save(seed: int, path: Path) -> None:
    torch.jit.script(Projected(seed)).save(str(path))


@pytest.fixture
def curated(tmp_path) -> DedupConfig:
    """Twelve samples, curated by the file ``weights.pt``."""
    save(0, tmp_path / "weights.pt")
    samples = [(f"s{n}", dict(sample.members)) for n, sample in enumerate(load_part("held_out")[:12])]
    write_shard(tmp_path / "in" / "a.tar", samples)
    config = DedupConfig(
        shards=[str(tmp_path / "in")], out=str(tmp_path / "out"), image_embedder=f"{tmp_path}/weights.pt@16", workers=1,
        threshold=0.9999,
    )  # fmt: skip
    run_dedup(config)
    return config


def test_other_weights_under_the_same_name_are_refused_wherever_they_meet(curated, tmp_path):
    (tmp_path / "query.webp").write_bytes(load_part("held_out")[0].image)
    batch = dataclasses.replace(curated, out=str(tmp_path / "batch"), against=[curated.out])
    index = TrainingIndex.load(curated.out)
    save(1, tmp_path / "weights.pt")
    embedder = load_embedder(curated.image_embedder)
    for meet in (
        lambda: run_dedup(batch),
        lambda: run_search(SearchConfig(out=curated.out, image=str(tmp_path / "query.webp"))),
        lambda: open_index(curated.out),
        lambda: open_index(curated.out, curated.image_embedder),
        lambda: AMG(index, embedder),
    ):
        with pytest.raises(UserError, match=r"other weights or settings of '.*weights\.pt@16' \(digest \w{12}, now"):
            meet()
    assert not (tmp_path / "batch").exists()


def test_the_same_weights_under_another_name_are_the_same(curated, tmp_path, monkeypatch):
    shutil.copy(tmp_path / "weights.pt", tmp_path / "renamed.pt")
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("weights.pt@16", "renamed.pt@16")):
        batch = dataclasses.replace(
            curated, out=str(tmp_path / f"{number}"), against=[curated.out], image_embedder=name
        )
        assert run_dedup(batch)["reasons"] == {"other_set": 12}
        assert open_index(curated.out, name)[1].name == name
    with pytest.raises(UsageError, match="other weights or settings|not 'weights.pt@17'"):
        refuse_other(TrainingIndex.load(curated.out), SimpleNamespace(name="weights.pt@17", digest="x"))


def test_an_index_that_did_not_note_its_embedders_digest_goes_by_the_name(curated, tmp_path):
    about = json.loads((tmp_path / "out" / "index" / "index.json").read_text())
    assert about.pop("embedder_digest") == load_embedder(curated.image_embedder).digest
    (tmp_path / "out" / "index" / "index.json").write_text(json.dumps(about))
    index = TrainingIndex.load(curated.out)
    refuse_other(index, load_embedder(curated.image_embedder))
    with pytest.raises(UserError, match=r"'.*weights.pt@16', not 'layout'"):
        refuse_other(index, load_embedder("layout"))


def test_a_summary_does_not_outlive_what_it_speaks_of(curated, tmp_path, monkeypatch):
    """The set to keep apart from has changed, and the run is stopped: nothing says that it is finished."""
    known = dataclasses.replace(curated, shards=[], out=str(tmp_path / "known"))
    samples = [(f"k{n}", dict(sample.members)) for n, sample in enumerate(load_part("held_out")[:12])]
    batch = dataclasses.replace(curated, out=str(tmp_path / "batch"), against=[known.out])

    def curate_known(count: int) -> None:
        write_shard(tmp_path / "known-in" / "a.tar", samples[:count])
        run_dedup(dataclasses.replace(known, shards=[str(tmp_path / "known-in")]))

    def stop(*args, **options):
        raise KeyboardInterrupt

    curate_known(2)
    assert run_dedup(batch)["kept"] == 10
    curate_known(5)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("curate.dedup.write_stage", stop)
        run_dedup(batch)
    assert not (tmp_path / "batch" / "summary.json").exists()
    assert run_dedup(batch)["kept"] == 7
    assert read_ledger(batch.out)["status"].to_pylist().count("kept") == 7


def test_a_shard_that_is_written_again_takes_the_summary_with_it_first(curated, tmp_path, monkeypatch):
    def stop(task):
        raise KeyboardInterrupt

    (tmp_path / "out" / "shards" / "000000.tar").unlink()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("curate.stages.write._write_shards", stop)
        run_dedup(curated)
    assert not (tmp_path / "out" / "summary.json").exists()
