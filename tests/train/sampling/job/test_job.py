"""``train sample`` beyond one guidance and one process: comparisons, the guarantee, shares, calibrated thresholds."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch
from PIL import Image

from afresh.errors import UsageError, UserError
from afresh.files import write_json
from tests.conftest import ROOT
from train.memorization.thresholds import FILE
from train.sampling import (
    AttractionBasin,
    GuidedStableDiffusion,
    NeverAbove,
    NoiseAdjustment,
    PromptMinimisation,
    Rejection,
)
from train.sampling.config import AMGConfig, PromptConfig, RejectionConfig, SampleConfig
from train.sampling.job import shares
from train.sampling.job.job import run_sample

PROMPTS = ["red apple", "grinning face"]


@pytest.fixture(scope="module")
def job(tiny_pipe, tmp_path_factory) -> SampleConfig:
    """A model, prompts, and an index of what the model draws for the first prompt from seed 0, which is a copy then."""
    from curate.embed.registry import load_embedder
    from curate.index.calibration import Calibration
    from curate.index.training_index import TrainingIndex

    folder = tmp_path_factory.mktemp("job")
    tiny_pipe.save_pretrained(folder / "model")
    Image.new("RGB", (64, 64), "red").save(folder / "original.png")
    rows = [{"caption": "red apple", "image": "original.png"}, {"caption": "grinning face"}]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = SampleConfig(
        str(folder / "model"), str(folder / "prompts.jsonl"), str(folder / "plain"), seeds=2, steps=2, device="cpu"
    )
    run_sample(config)
    layout = load_embedder("layout")
    drawn = layout.embed([Image.open(path) for path in sorted((folder / "plain").glob("0*.png"))])
    rows = np.stack([drawn[0], layout.embed([Image.new("RGB", (64, 64), "white")])[0]])
    index = TrainingIndex.build(rows, ["x", "y"], ["s"] * 2, ["a", "b"], np.ones(2, bool), np.arange(2), "layout")
    # Layouts of a random model's images are near each other: the middle between itself and the nearest counts as 0.5.
    near = (1 + float((drawn[1:] @ drawn[0]).max())) / 2
    index = replace(index, calibration=Calibration((-1.0, near, 1.0), (-1.0, 0.5, 1.0)))
    index.save(folder / "index")
    return replace(config, index=str(folder / "index"))


def rows_of(folder: str | Path, name: str = "samples.parquet") -> list[dict]:
    return parquet.read_table(Path(folder) / name).to_pylist()


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def same_images(one: str | Path, two: str | Path) -> bool:
    """Whether two folders hold the same images, to the last bit."""
    names = [path.name for path in sorted(Path(one).glob("0*.png"))]
    return names == [path.name for path in sorted(Path(two).glob("0*.png"))] and all(
        np.array_equal(pixels(Path(one) / name), pixels(Path(two) / name)) for name in names
    )


def opened(job: SampleConfig):
    from train.sampling.pipelines.session import open_index

    return open_index(job.index)


# ---------------------------------------------------------------------------------------------- the guarantee


def test_an_image_above_the_limit_is_drawn_again_with_another_seed_and_stronger_guidance(job, tmp_path):
    plain, out = Path(job.out), tmp_path / "never"
    summary = run_sample(replace(job, out=str(out), never_above=0.5))
    rows = rows_of(out)
    first = rows[0]
    assert first["tries"] == 2 and first["strength"] == 1 and first["drawn_seed"] != first["seed"] == 0
    assert not first["withheld"] and all(row["similarity"] <= 0.5 for row in rows)
    assert not np.array_equal(pixels(out / first["file"]), pixels(plain / first["file"]))
    assert {"similarity", "threshold"} <= set(rows_of(out, "trace.parquet")[0])  # AMG watched it, though asked for none
    for row in rows[1:]:
        assert (row["tries"], row["strength"], row["drawn_seed"]) == (1, 0, row["seed"])
        assert np.array_equal(pixels(out / row["file"]), pixels(plain / row["file"]))
    assert (summary["images"], summary["redrawn"], summary["withheld"]) == (4, 1, 0)
    assert summary["drawings_per_image"] == 5 / 4 and summary["copies"] == 0


def test_what_no_try_brings_below_the_limit_is_withheld_and_not_drawn_again(job, tmp_path):
    config = replace(job, out=str(tmp_path / "never"), never_above=0.5, tries=1)
    summary = run_sample(config)
    out, first = tmp_path / "never", rows_of(tmp_path / "never")[0]
    assert first["withheld"] and first["similarity"] > 0.9 and first["tries"] == 1
    assert not (out / first["file"]).exists() and len(list(out.glob("0*.png"))) == 3
    assert (summary["images"], summary["made"], summary["withheld"], summary["copies"]) == (3, 4, 1, 0)
    assert summary["max_similarity"] <= 0.5 and summary["drawings_per_image"] == 4 / 3
    tile = pixels(out / "grid.png")[:128, 200:328]
    assert np.array_equal(tile[0, 0], [236] * 3) and len(np.unique(tile)) > 1  # grey, with a word on it
    assert run_sample(config)["made"] == 0
    assert rows_of(out)[0] == first
    (out / "00000-red-apple-s1.png").unlink()
    assert run_sample(config)["made"] == 1
    with pytest.raises(UserError, match="other settings"):
        run_sample(replace(config, never_above=0.6))


def test_the_evaluation_reads_past_what_is_withheld(job, tmp_path):
    from train.evaluation.judging.drawn import read_drawn

    run_sample(replace(job, out=str(tmp_path), never_above=0.5, tries=1))
    drawn = read_drawn(tmp_path, "model", "none", "all")
    assert len(drawn.images) == 3 and list(drawn.captions) == ["red apple", "grinning face", "grinning face"]


def test_a_second_index_judges_too(job, tmp_path):
    """The second holds the image of another prompt, which the first knows nothing of."""
    from curate.embed.registry import load_embedder
    from curate.index.training_index import TrainingIndex

    path = Path(job.out) / "00001-grinning-face-s1.png"
    vector = load_embedder("layout").embed([Image.open(path)])
    index, _ = opened(job)
    judge = TrainingIndex.build(vector, ["z"], ["s"], ["c"], np.ones(1, bool), np.arange(1), "layout")
    replace(judge, calibration=index.calibration).save(tmp_path / "judge")
    config = replace(job, out=str(tmp_path / "out"), never_above=0.98, tries=1, judge_index=str(tmp_path / "judge"))
    run_sample(config)
    rows = rows_of(tmp_path / "out")
    assert [row["withheld"] for row in rows] == [True, False, False, True]
    assert rows[3]["judge_similarity"] > 0.98 > rows[3]["similarity"]


def test_views_of_the_index_judge_too_and_are_named(job, tmp_path):
    """The shards hold, as a kept image, what the model draws for another prompt, which the index's rows do not know."""
    from curate.index.training_index import TrainingIndex
    from curate.reading.writing import write_shard

    index, _ = opened(job)
    index.save(tmp_path / "out" / "index")
    copied = Path(job.out) / "00001-grinning-face-s1.png"
    samples = [("a", {"png": (Path(job.out).parent / "original.png").read_bytes()})]
    samples.append(("b", {"png": copied.read_bytes()}))
    write_shard(str(tmp_path / "out" / "shards" / "000000.tar"), samples)
    config = replace(job, index=str(tmp_path / "out"), never_above=0.98, tries=1)
    run_sample(replace(config, out=str(tmp_path / "seen")))
    first, *_, last = rows_of(tmp_path / "seen")
    assert last["withheld"] and last["highest"] > 0.98 > last["similarity"]
    assert last["judged_by"] in ("copy-detector", "luminance", "edges", "chroma") and first["judged_by"] == "layout"
    assert (tmp_path / "out" / "views").is_dir() and TrainingIndex.load(next((tmp_path / "out" / "views").iterdir()))
    run_sample(replace(config, views=False, out=str(tmp_path / "blind")))
    assert [row["withheld"] for row in rows_of(tmp_path / "blind")] == [True, False, False, False]


def test_amg_draws_again_what_is_a_copy_in_the_end_and_withholds_nothing(job, tmp_path):
    nothing = AMGConfig(preset="views", t_range=(0.0, 0.0))  # it never fires, so copies reach the end
    amg = replace(job, guidance="amg", amg=nothing)
    run_sample(replace(amg, out=str(tmp_path / "again")))
    first, *others = rows_of(tmp_path / "again")
    assert first["tries"] > 1 and first["highest"] <= 0.5 and not first["withheld"]
    assert all(row["tries"] == 1 for row in others)
    run_sample(replace(amg, amg=replace(nothing, restarts=0), out=str(tmp_path / "once")))
    assert same_images(tmp_path / "once", job.out)


def test_amg_draws_again_what_it_guided_and_left_above_a_lower_limit(job, tmp_path):
    always = AMGConfig(preset="views", lambda_a=-0.9, lambda_b=-0.9, dissimilarity=False, restarts=1)
    for number, (limit, never, tries) in enumerate([(-0.9, None, {2}), (-0.9, 0.99, {2}), (0.5, None, {1})]):
        amg, out = replace(always, guided_limit=limit), tmp_path / str(number)
        run_sample(replace(job, guidance="amg", amg=amg, never_above=never, tries=2, out=str(out)))
        assert {row["tries"] for row in rows_of(out) if row["highest"] <= 0.5} == tries


def test_rejection_comes_first_and_its_drawings_count(job, tmp_path):
    rejection = RejectionConfig(limit=-0.99, tries=2)  # rejects everything
    never = replace(job, out=str(tmp_path), guidance="rejection", rejection=rejection, never_above=-0.99, tries=2)
    summary = run_sample(replace(never, seeds=1))
    assert [row["tries"] for row in rows_of(tmp_path)] == [4, 4] and summary["withheld"] == 2
    assert summary["images"] == 0 and summary["drawings_per_image"] is summary["similarity"] is None


def test_the_guarantee_stands_around_a_pipeline(job, tiny_pipe):
    import torch

    pipe = GuidedStableDiffusion.from_pipe(tiny_pipe)
    calls = []

    def draw(rows, seeds, guidance):
        calls.append((rows, seeds, [getattr(term.config, "floor", term.name) for term in guidance]))
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        prompts = [PROMPTS[row] for row in rows]
        return pipe(prompts, generator=generators, num_inference_steps=2, guidance=guidance, output_type="pt")

    index, embedder = opened(job)
    drawn = NeverAbove(index, embedder, limit=-0.99, tries=3)(draw, [0, 1])
    assert [(one.withheld, one.image, one.tries) for one in drawn] == [(True, None, 3)] * 2
    assert calls[0] == ([0, 1], [0, 1], []) and [floors for _, _, floors in calls] == [[], [1.0], ["tokens", 0.0]]
    kept = NeverAbove(index, embedder, tries=3)(draw, [0, 1])
    assert not any(one.withheld for one in kept) and all(one.similarity <= 0.5 for one in kept)
    assert kept[1].image.shape == (3, 64, 64) and {step["image"] for step in kept[1].trace} == {1}
    with pytest.raises(UsageError, match="judges with the embedder"):
        NeverAbove(index)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"never_above": 0.5, "index": ""}, "--never_above needs --index"),
        ({"never_above": 5.0}, "between -1 and 1"),
        ({"tries": 0}, "--tries is 0"),
        ({"judge_index": "x"}, "--judge_index is of --never_above"),
        ({"compare": ["none", "amg"], "guidance": "amg"}, "leave --guidance out"),
        ({"compare": ["none", "none"]}, "stands twice"),
        ({"compare": ["none", "amgg"]}, "'amgg' is not known"),
        ({"compare": ["none", "amg"], "index": ""}, "--guidance amg needs --index"),
    ],
)
def test_options_that_cannot_work_are_named_before_anything_is_written(job, tmp_path, options, words):
    with pytest.raises(UsageError, match=words):
        run_sample(replace(job, out=str(tmp_path / "out"), **options))
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------- comparisons


def test_a_comparison_draws_what_each_guidance_alone_would_and_shows_all(job, tmp_path):
    out = tmp_path / "compared"
    always = AMGConfig(lambda_b=-1.0, schedule="constant")
    config = replace(job, out=str(out), compare=["none", "tokens+amg"], amg=always)
    summary = run_sample(config)
    assert [row["guidance"] for row in summary["guidances"]] == ["none", "tokens+amg"]
    assert [row["fired"] for row in summary["guidances"]] == [0, 4] and summary["made"] == 8
    assert summary["guidances"][0]["copies"] == 1 and summary["guidances"][0]["withheld"] == 0
    alone = replace(config, compare=[], guidance="tokens+amg", out=str(tmp_path / "alone"))
    run_sample(alone)
    assert same_images(alone.out, out / "tokens+amg") and same_images(job.out, out / "none")
    assert run_sample(replace(alone, out=str(out / "tokens+amg")))["made"] == 0  # it goes on from there
    table = rows_of(out, "compare.parquet")
    assert [row["file"].split("/")[0] for row in table] == ["none"] * 4 + ["tokens+amg"] * 4
    assert all((out / row["file"]).is_file() for row in table)
    assert len({(row["prompt"], row["seed"], row["guidance"]) for row in table}) == 8
    sheet = pixels(out / "compare.png")
    red = (sheet == [255, 0, 0]).all(2).sum()
    assert red > 150 * 150  # the first prompt's training image
    frames = (sheet == [0xC2, 0x29, 0x3F]).all(2).sum()
    assert frames > 4 * 4 * 150  # the copy is framed
    assert run_sample(config)["made"] == 0


def test_a_comparison_under_the_guarantee_shows_what_is_withheld(job, tmp_path, run_cli):
    command = ["train", "sample", "--model", job.model, "--prompts", job.prompts, "--index", job.index, "--json"]
    options = ["--out", tmp_path / "o", "--seeds", 1, "--steps", 2, "--compare", "none,rejection", "--device", "cpu"]
    done = run_cli(*command, *options, "--never_above", 0.5, "--tries", 1)
    assert done.returncode == 0, done.stderr
    none, rejection = json.loads(done.stdout)["guidances"]
    assert (none["withheld"], none["images"]) == (1, 1) and (rejection["withheld"], rejection["redrawn"]) == (0, 1)
    sheet = pixels(tmp_path / "o" / "compare.png")
    assert (sheet == [0xEC] * 3).all(2).sum() > 150 * 150


# ---------------------------------------------------------------------------------------------- several processes


def launch(config: SampleConfig, *options: object) -> subprocess.Popen:
    """``train sample`` as two processes, as ``launch.sh`` starts them on a machine without accelerators."""
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "train", "sample", "--json"]
    named = {"model": config.model, "prompts": config.prompts, "out": config.out, "index": config.index}
    named |= {"steps": config.steps, "seeds": config.seeds, "batch_size": config.batch_size, "device": "cpu"}
    words += [word for name, value in named.items() for word in (f"--{name}", str(value))]
    env = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *words, *map(str, options)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def without_seconds(rows: list[dict]) -> list[dict]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_write_what_one_does_and_go_on_when_one_is_killed(job, tmp_path):
    torch.set_num_threads(1)  # as launch() gives each process: another number sums in another order
    config = replace(job, seeds=3, batch_size=2, never_above=0.5, tries=1, out=str(tmp_path / "one"))
    run_sample(config)
    two = replace(config, out=str(tmp_path / "two"))
    process = launch(two, "--never_above", 0.5, "--tries", 1)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    summary = json.loads(out)
    assert (summary["images"], summary["withheld"], summary["made"]) == (5, 1, 6)
    assert same_images(config.out, two.out)
    for name in ("samples.parquet", "trace.parquet"):
        assert without_seconds(rows_of(config.out, name)) == without_seconds(rows_of(two.out, name))
    assert (tmp_path / "one" / "grid.png").read_bytes() == (tmp_path / "two" / "grid.png").read_bytes()

    many = replace(job, seeds=20, batch_size=1, steps=10, out=str(tmp_path / "many"))
    process = launch(many)
    while len(list(Path(many.out).glob("0*.png"))) < 3 and process.poll() is None:
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 1 and not (Path(many.out) / "samples.parquet").exists()
    there = len(list(Path(many.out).glob("0*.png")))
    assert 0 < there < 40 and run_sample(many)["made"] == 40 - there
    assert len(rows_of(many.out)) == 40


def test_a_process_draws_its_share_and_the_first_gives_up_waiting(job, tmp_path, monkeypatch):
    config = replace(job, batch_size=1, out=str(tmp_path / "shared"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(shares, "PATIENCE", 0.5)
    with pytest.raises(UserError, match="written nothing for .* s, 2 images are missing"):
        run_sample(config)
    assert [path.name[-6:] for path in sorted(Path(config.out).glob("0*.png"))] == ["s0.png"] * 2
    assert not (tmp_path / "shared" / "samples.parquet").exists()
    monkeypatch.setenv("RANK", "1")
    assert run_sample(config) == {} and not (tmp_path / "shared" / "samples.parquet").exists()
    monkeypatch.setenv("RANK", "0")
    assert run_sample(config)["images"] == 4
    assert [row["file"] for row in rows_of(config.out)] == [row["file"] for row in rows_of(job.out)]


def test_processes_that_are_asked_to_stop_do_so_and_go_on(job, tmp_path, monkeypatch):
    config = replace(job, out=str(tmp_path / "out"))
    monkeypatch.setenv("AFRESH_STOP_FILE", str(tmp_path / "stop"))
    (tmp_path / "stop").touch()
    assert run_sample(config) == {"made": 0, "stopped": True, "out": config.out}
    (tmp_path / "stop").unlink()
    assert run_sample(config)["made"] == 4


# ---------------------------------------------------------------------------------------------- the calibrated model


@pytest.fixture
def calibrated(job, tiny_pipe, tmp_path) -> SampleConfig:
    """The same model, with a threshold between the first magnitudes of the two prompts' images."""
    tiny_pipe.save_pretrained(tmp_path / "model")
    first = rows_of(job.out, "trace.parquet")[0]
    assert first["t"] == 501.0
    magnitudes = sorted(row["magnitude"] for row in rows_of(job.out))
    write_json(tmp_path / "model" / FILE, by_band((magnitudes[1] + magnitudes[2]) / 2))
    return replace(job, model=str(tmp_path / "model"), out=str(tmp_path / "out"))


def by_band(value: float, form: str = "l2", band: int = 5) -> dict:
    return {"form": form, "by_band": [None] * band + [value] + [None] * (9 - band)}


def limit_of(config: SampleConfig) -> float:
    return json.loads((Path(config.model) / FILE).read_text())["by_band"][5]


def test_images_are_flagged_by_the_models_calibrated_threshold(job, calibrated, tmp_path):
    summary = run_sample(calibrated)
    rows, limit = rows_of(calibrated.out), limit_of(calibrated)
    assert summary["flagged"] == sum(row["magnitude"] >= limit for row in rows) == 2
    assert [row["memorized"] for row in rows] == [row["magnitude"] >= limit for row in rows]
    steps = rows_of(calibrated.out, "trace.parquet")
    assert [step["memorized"] is None for step in steps] == [step["t"] < 500 for step in steps]
    assert {row["memorized"] for row in rows_of(job.out)} == {None}
    # The other form says the same: m/√(4·16·16 numbers).
    write_json(tmp_path / "model" / FILE, by_band(limit / 32, "rms"))
    assert run_sample(replace(calibrated, out=str(tmp_path / "rms")))["flagged"] == 2
    assert [row["memorized"] for row in rows_of(tmp_path / "rms")] == [row["memorized"] for row in rows]


@pytest.mark.parametrize("guidance", ["prompt", "noise", "basin"])
def test_a_target_may_be_the_models_threshold(calibrated, tmp_path, guidance):
    setting = {"prompt": "target", "noise": "target", "basin": "least"}[guidance]
    limit = limit_of(calibrated)

    def with_setting(value, name):
        term = replace(getattr(calibrated, guidance), **{setting: value})
        return replace(calibrated, guidance=guidance, out=str(tmp_path / name), **{guidance: term})

    run_sample(with_setting("auto", "auto"))
    run_sample(with_setting(limit, "number"))
    assert same_images(tmp_path / "auto", tmp_path / "number")
    below, numbers = with_setting(limit / 2, "half"), rows_of(tmp_path / "auto", "trace.parquet")
    run_sample(below)
    assert numbers != rows_of(below.out, "trace.parquet")


def test_auto_needs_a_calibrated_model_of_the_same_form_and_band(job, calibrated, tmp_path):
    def refused(config: SampleConfig, words: str, **settings) -> None:
        chosen = PromptConfig(target="auto", **settings)
        with pytest.raises(UsageError, match=words):
            run_sample(replace(config, guidance="prompt", prompt=chosen, out=str(tmp_path / "refused")))

    refused(job, "has no memorization.json; `train detect --calibrate")
    refused(calibrated, "thresholds of the form l2, but prompt.form is rms", form="rms")
    write_json(tmp_path / "model" / FILE, by_band(1.0, band=9))
    refused(calibrated, "nothing in .* is for timestep 501, the first here")


def test_from_python_auto_is_a_number_still_to_be_given(tiny_pipe):
    pipe = GuidedStableDiffusion.from_pipe(tiny_pipe)
    for term in (PromptMinimisation(target="auto"), NoiseAdjustment(target="auto"), AttractionBasin(least="auto")):
        with pytest.raises(UsageError, match=r"is auto, .* give a number"):
            pipe("red apple", num_inference_steps=1, guidance=[term])


# ---------------------------------------------------------------------------------------------- long prompts


def test_prompts_beyond_the_tokenizers_limit_are_named_once_and_cut(job, tiny_pipe, tmp_path, capsys):
    limit = tiny_pipe.tokenizer.model_max_length
    long = " ".join(["red apple"] * limit)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"red apple\n{long}\n{long} and more\n")
    run_sample(replace(job, prompts=str(prompts), out=str(tmp_path / "out"), batch_size=1, seeds=1, index=""))
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(said) == 1 and f"2 of 3 prompts are longer than the {limit} tokens" in said[0]
    assert repr(long) in said[0]
    rows = rows_of(tmp_path / "out")
    assert [row["prompt"] for row in rows] == ["red apple", long, f"{long} and more"]
    cut = [pixels(tmp_path / "out" / row["file"]) for row in rows]
    assert np.array_equal(cut[1], cut[2]) and not np.array_equal(cut[0], cut[1])


def test_rejection_still_takes_a_draw_of_rows_and_seeds(job):
    index, embedder = opened(job)
    images = [Image.open(path).convert("RGB") for path in sorted(Path(job.out).glob("0*.png"))]

    class Output:
        def __init__(self, images):
            self.images, self.trace = images, [{"image": i, "step": 0} for i in range(len(images))]

    drawn = Rejection(index, embedder, tries=2)(lambda rows, seeds: Output([images[row] for row in rows]), [0, 1])
    assert [(one.tries, one.seed, one.similarity > 0.5) for one in drawn] == [(2, 0, True), (1, 1, False)]
