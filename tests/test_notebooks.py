"""The notebooks run from start to end, at a small size, and are stored small."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.documents import ROOT
from train.denoising.opening.loading import sample_model_dir

NOTEBOOKS = ROOT / "notebooks"
SMALL: dict[str, dict[str, Any]] = {  # in the place of the cell with the tag ``parameters``
    "find-copies": {"FOLDER": "photos", "ORIGINALS": 7},
    "curate-train-sample": {"STEPS": 2, "DRAWING_STEPS": 3, "COPIES": 2},
    "diagnose": {
        "MODEL": str(sample_model_dir()), "CAPTIONS": "asked.txt", "HARMLESS": "harmless.txt", "INDEX": "shards",
        "NUMBER": 3, "STEPS": 6,
    },
}  # fmt: skip


def notebook(name: str) -> dict[str, Any]:
    return json.loads((NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8"))


def lay_out(folder: Path) -> None:
    """What ``diagnose`` asks for: captions of two kinds and shards."""
    from curate.reading.writing import write_shard
    from curate.sample_set import load_part

    samples = load_part("finetune")[:12]
    (folder / "shards").mkdir()
    write_shard(folder / "shards" / "000000.tar", ((sample.key, sample.members) for sample in samples))
    for name, some in (("asked", samples[:4]), ("harmless", samples[4:8])):
        (folder / f"{name}.txt").write_text("".join(f"{sample.caption}\n" for sample in some))


def run(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient = pytest.importorskip("nbclient", reason="nbclient and ipykernel are not installed: pip install '.[docs]'")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed: pip install '.[docs]'")
    import nbformat

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    book = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    (parameters,) = (cell for cell in book.cells if "parameters" in cell.metadata.get("tags", []))
    names = {line.partition(" = ")[0] for line in parameters.source.splitlines()}
    assert names == set(SMALL[name])
    parameters.source = "\n".join(f"{key} = {value!r}" for key, value in SMALL[name].items())
    lay_out(folder)
    client = nbclient.NotebookClient(book, timeout=280, kernel_name="python3", resources={"metadata": {"path": folder}})
    client.execute()


def test_find_copies(tmp_path, monkeypatch):
    run("find-copies", tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["curate-train-sample", "diagnose"])
def test_a_notebook_runs_from_start_to_end(name, tmp_path, monkeypatch):
    run(name, tmp_path, monkeypatch)


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_are_known_small_and_stored_as_they_ran(path):
    assert path.stem in SMALL and path.stat().st_size < 300_000
    cells = [cell for cell in notebook(path.stem)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert not any(output["output_type"] == "error" for cell in cells for output in cell["outputs"])
    assert not re.search(r"[\"' ]/(?:home|root|tmp|Users)/", path.read_text(encoding="utf-8"))
