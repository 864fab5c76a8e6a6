"""``train localize`` on the carried sample model, small: its file, its report, going on, and what reads the file."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as parquet
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from afresh.errors import UsageError, UserError
from curate.sample_set import load_part
from train.denoising.opening.loading import load_pipeline
from train.evaluation.config import LocalizeConfig
from train.evaluation.localize import REMOVED, run_localize
from train.memorization.neurons.blocking import blocked
from train.memorization.neurons.files import read_neurons
from train.memorization.neurons.first_step import FirstStep
from train.memorization.neurons.value_neurons import count
from train.memorization.neurons.weights import load_rows, restore_rows
from train.sampling.config import SampleConfig
from train.sampling.job.job import run_sample


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """Two captions with originals, and three clean ones."""
    folder = tmp_path_factory.mktemp("prompts")
    lines = []
    for number, sample in enumerate(load_part("pretrain")[:5]):
        row = {"caption": sample.caption, "label": int(number < 2)}
        if number < 2:
            name = f"{number}.{sample.image_ext}"
            (folder / name).write_bytes(sample.image)
            row["image"] = name
        lines.append(json.dumps(row))
    path = folder / "prompts.jsonl"
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def settings(prompts, sample_model):
    return {
        "model": str(sample_model), "prompts": str(prompts), "seeds": 2, "criterion": "magnitude", "threshold": 0.4,
        "number": 30, "up_blocks": True, "image_seeds": 2, "others": 1, "steps": 2, "columns": 2,
    }  # fmt: skip


@pytest.fixture(scope="module")
def done(settings, tmp_path_factory):
    """A finished job: its folder, config and summary."""
    folder = tmp_path_factory.mktemp("job")
    config = LocalizeConfig(out=str(folder / "neurons.json"), edited_model=str(folder / "edited"), **settings)
    return folder, config, run_localize(config)


def test_the_summary_tells_of_neurons_cost_and_every_setting(done):
    folder, config, summary = done
    together, own = read_neurons(config.out)
    assert summary["prompts"] == summary["memorized"] == len(own) == 2
    assert [count(neurons) for neurons in own.values()] == [30, 30] and summary["neurons_per_prompt"] == 30
    assert summary["neurons"] == count(together) >= 30
    assert summary["evaluations_per_prompt"] > 0
    rows = {(row["prompts"], row["blocked"]): row for row in summary["rows"]}
    assert len(rows) == 9 and rows["others", "one localized prompt's"]["neurons"] == 30
    nothing, ours = rows["localized", "none"], rows["localized", "each prompt's own"]
    assert nothing["to_unblocked"] == pytest.approx(1, abs=1e-5) and ours["to_unblocked"] < 0.999
    assert all(row["to_original"] is not None for row in rows.values() if row["prompts"] == "localized")
    assert rows["others", "none"]["memorized_share"] is None  # no original, no index: nobody can tell
    control = read_neurons(folder / "neurons" / "random.json")[1]
    for caption, neurons in own.items():
        assert {n: len(u) for n, u in neurons.items()} == {n: len(u) for n, u in control[caption].items()}
    with Image.open(summary["figure"]) as picture:
        assert picture.height > 5 * 112  # the originals and five settings
    assert json.loads((folder / "neurons" / "report.json").read_text())["rows"] == summary["rows"]


def test_a_stopped_run_goes_on_and_ends_the_same(done, settings, tmp_path):
    _, config, _ = done
    content = json.loads(Path(config.out).read_text())
    out = tmp_path / "neurons.json"
    first = content["prompts"][0]
    out.write_text(json.dumps(content | {"prompts": [first], "neurons": first["neurons"], "unfinished": True}))
    with pytest.raises(UserError, match="was stopped; run it again"):
        read_neurons(out)
    run_localize(LocalizeConfig(out=str(out), report=False, **settings))
    again = json.loads(out.read_text())
    assert [content.pop("seconds") > 0, again.pop("seconds") > 0] == [True, True]
    assert again == content
    with pytest.raises(UsageError, match="other settings .threshold."):
        run_localize(LocalizeConfig(out=str(out), report=False, **settings | {"threshold": 0.5}))


def test_the_edited_model_is_an_ordinary_pipeline_that_draws_what_blocking_draws(done, sample_model):
    folder, config, _ = done
    original, edited = load_pipeline(str(sample_model)), load_pipeline(str(folder / "edited"))
    caption = next(iter(read_neurons(config.out)[1]))
    with blocked(original, read_neurons(config.out)[0]), torch.no_grad():
        expected = FirstStep(original, caption, [0, 1]).difference([0, 1])
    with torch.no_grad():
        assert FirstStep(edited, caption, [0, 1]).difference([0, 1]) == pytest.approx(expected, abs=1e-4)
    restore_rows(edited, load_rows(folder / "edited" / REMOVED))
    weights = original.unet.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in edited.unet.state_dict().items())
    names = load_file(folder / "edited" / "text_encoder" / "model.safetensors")
    assert all(name.startswith("text_model.") for name in names)  # as every release reads them


def test_sample_blocks_all_neurons_or_each_prompts_own(done, settings, tmp_path):
    _, config, _ = done
    captions = list(read_neurons(config.out)[1])
    (tmp_path / "p.txt").write_text("\n".join(captions))

    def drawn(name: str, **options: str) -> list[bytes]:
        common = {"model": config.model, "prompts": str(tmp_path / "p.txt"), "seeds": 1, "steps": 2}
        run_sample(SampleConfig(out=str(tmp_path / name), **common, **options))
        files = parquet.read_table(tmp_path / name / "samples.parquet")["file"].to_pylist()
        return [Image.open(tmp_path / name / file).tobytes() for file in files]

    free, together = drawn("free"), drawn("all", neurons=config.out)
    own = drawn("own", neurons=config.out, neurons_of="own")
    for images in zip(free, together, own, strict=True):
        assert len(set(images)) == 3
    with pytest.raises(UserError, match="drawn with other settings"):
        drawn("free", neurons=config.out)
    (tmp_path / "p.txt").write_text("another caption")
    with pytest.raises(UserError, match="no neurons of 'another caption'"):
        drawn("other", neurons=config.out, neurons_of="own")


def test_bad_options_and_files_are_named(settings, tmp_path):
    config = {"out": str(tmp_path / "n.json"), **settings}
    for options, message in (
        ({"out": "n.txt"}, "ends in .json"),
        ({"seeds": 1}, "--seeds is 1"),
        ({"criterion": "similarity", "threshold": 1.5}, "--threshold is 1.5"),
        ({"criterion": "similarity"}, "set criterion to magnitude"),
        ({"number": 10_000}, "number is 10000: expected 0 to 672"),
    ):
        with pytest.raises(UsageError, match=message):
            run_localize(LocalizeConfig(**config | options))
    with pytest.raises(UserError, match="holds something else"):
        run_localize(LocalizeConfig(**config | {"edited_model": str(settings["model"])}))
    (tmp_path / "p.txt").write_text("red apple")
    with pytest.raises(UsageError, match="--clean is needed"):
        run_localize(LocalizeConfig(**config | {"prompts": str(tmp_path / "p.txt")}))
    (tmp_path / "n.json").write_text("{}")
    with pytest.raises(UserError, match="not a file of train localize"):
        run_localize(LocalizeConfig(**config))
    for text in ("{}", "[]", '{"neurons": [1]}', '{"neurons": {"a": ["b"]}}', "{"):
        (tmp_path / "n.json").write_text(text)
        with pytest.raises(UserError, match="n.json: (not a file of neurons|cannot be read)"):
            read_neurons(tmp_path / "n.json")
    (tmp_path / "n.json").write_text('{"neurons": {"a.attn2.to_v": [1]}}')
    assert read_neurons(tmp_path / "n.json") == ({"a.attn2.to_v": [1]}, {})
    with pytest.raises(UserError, match="no such file"):
        read_neurons(tmp_path / "none.json")


def test_the_verb_prints_its_summary(run_cli, prompts, sample_model, tmp_path):
    result = run_cli(
        "train", "localize", "--model", sample_model, "--prompts", prompts, "--out", "n.json", "--seeds", 2,
        "--threshold", 0.99, "--report", "false", "--json",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout)
    assert (summary["prompts"], summary["memorized"], summary["threshold"]) == (2, 0, 0.99)
    assert json.loads((tmp_path / "n.json").read_text())["layers"]
