"""The fine-tuning loop on real shards and a tiny random model: filter, exact resume, several processes, faults."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from curate.console import UsageError, UserError
from curate.shards import write_shard
from train.components import load_pipeline, tiny_pipeline
from train.finetune.augment import augment, draw
from train.finetune.checkpoint import load_latest, save_checkpoint
from train.finetune.config import Augmentation, FilterConfig, FinetuneConfig
from train.finetune.data import ShardOrder, generator, sample_captions
from train.finetune.filter import VerdictTable, filter_weights, is_judged
from train.finetune.loop import batch_positions, learning_rate, resolve_precision, run_finetune
from train.finetune.loss import min_snr_weights, weighted_loss
from train.sample_set import load_part, parts

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny_pipeline().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("shards")
    samples = load_part("finetune")[:20]
    for number, part in enumerate((samples[:3], samples[3:15], samples[15:])):
        write_shard(str(folder / f"{number:06d}.tar"), [(s.key, dict(s.members)) for s in part])
    return str(folder)


@pytest.fixture(autouse=True)
def _one_thread(_quiet_machine: None) -> None:
    """As the launched processes have: sums are bit for bit the same only with equally many threads."""
    torch.set_num_threads(1)


def settings(model: str, shards: str, out: Path, **changes) -> FinetuneConfig:
    values = {
        "steps": 4,
        "batch_size": 4,
        "learning_rate": 1e-3,
        "workers": 0,
        "log_every": 1,
        "checkpoint_every": 0,
    }
    return FinetuneConfig(model=model, shards=[shards], out=str(out), **values | changes)


def log_lines(out: Path) -> list[dict]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "samples_per_second"} for line in lines]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_pipeline(str(out / "model")).unet.state_dict()


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ------------------------------------------------------------------------------------------------ the filter


def test_filter_drops_exactly_the_judged_samples_at_or_above_the_threshold():
    eps_uncond = torch.zeros(4, 1, 2, 2)
    eps_cond = torch.zeros(4, 1, 2, 2)
    eps_cond[:, 0, 0, 0] = torch.tensor([1.0, 2.0, 3.0, 3.0])
    judged = torch.tensor([True, True, True, False])
    kept, magnitudes = filter_weights(eps_cond, eps_uncond, judged, FilterConfig("every_step", threshold=2.0))
    assert kept.tolist() == [1, 0, 0, 1]
    assert magnitudes[:3].tolist() == [1, 2, 3]
    assert magnitudes[3].isnan()


def test_a_kept_sample_weighs_the_same_whatever_else_is_dropped():
    losses = torch.tensor([1.0, 2.0, 4.0, float("nan")], requires_grad=True)
    weighted_loss(losses, torch.tensor([1.0, 0.0, 1.0, 0.0]), nominal_batch=4).backward()
    assert losses.grad.tolist() == [0.25, 0, 0.25, 0]


def test_min_snr_weights_weigh_the_error_of_x0_alike_whatever_the_model_predicts():
    # An error d of x̂_0 is an error √(ᾱ/(1−ᾱ)) d of ε and d/√(1−ᾱ) of v.
    alpha_bar = torch.tensor([0.999, 0.9, 0.5, 0.01])
    snr = alpha_bar / (1 - alpha_bar)
    for kind, per_x0 in (("epsilon", snr), ("v_prediction", 1 / (1 - alpha_bar))):
        weights = min_snr_weights(alpha_bar, kind, gamma=5.0)
        torch.testing.assert_close(weights * per_x0, snr.clamp(max=5.0))
    assert min_snr_weights(torch.tensor([0.0, 0.5]), "epsilon", 5.0).tolist() == [1.0, 1.0]
    assert min_snr_weights(torch.tensor([0.0, 0.5]), "v_prediction", 5.0).tolist() == [0.0, 0.5]
    assert min_snr_weights(alpha_bar, "epsilon", 0.0).tolist() == [1.0] * 4


def test_samples_without_their_caption_are_not_judged_and_policies_choose_timesteps():
    t = torch.tensor([10, 600, 900])
    conditional = torch.tensor([True, True, False])
    assert is_judged(t, conditional, FilterConfig("every_step"), 0).tolist() == [True, True, False]
    assert is_judged(t, conditional, FilterConfig("noisy_steps", min_timestep=500), 0).tolist() == [False, True, False]
    assert not is_judged(t, conditional, FilterConfig("off"), 0).any()
    assert not is_judged(t, conditional, FilterConfig("every_step", warmup_steps=5), 4).any()


def test_verdict_table_counts_repeated_visits_by_band(tmp_path):
    table = VerdictTable(3)
    rows, t = torch.tensor([1, 1, 2]), torch.tensor([50, 950, 950])
    table.record(rows, t, torch.tensor([1.0, 0.0, 1.0]), torch.tensor([1.0, 3.0, float("nan")]))
    table.write(tmp_path / "v.parquet", [("s", "a"), ("s", "b"), ("s", "c")])
    written = pq.read_table(tmp_path / "v.parquet").to_pylist()
    assert [(row["key"], row["seen"], row["judged"], row["dropped"]) for row in written] == [
        ("b", 2, 2, 1),
        ("c", 1, 0, 0),
    ]
    assert written[0]["magnitude_by_band"] == [1.0] + [None] * 8 + [3.0]


# ------------------------------------------------------------------------------------------- order and draws


def test_every_epoch_visits_every_sample_once_in_another_order():
    order = ShardOrder([3, 12, 5, 4], window=2, seed=0)
    epochs = [[order.row(epoch * 24 + i)[0] for i in range(24)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(24)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [order.row(i)[0] for i in range(24)] == epochs[0]  # whatever was asked for before
    assert order.locate(3) == (1, 0) and order.locate(2) == (0, 2) and order.locate(23) == (3, 3)


def test_a_window_of_shards_is_read_before_the_next_one_begins():
    order = ShardOrder([4] * 6, window=2, seed=1)
    shards = [order.locate(order.row(i)[0])[0] for i in range(24)]
    assert [len(set(shards[start : start + 8])) for start in (0, 8, 16)] == [2, 2, 2]


def test_processes_share_positions_without_gap_or_overlap():
    config = FinetuneConfig(model="", out="", shards=[], batch_size=3, gradient_accumulation=2)
    positions = [
        p for step in range(2) for micro in range(2) for rank in range(2)
        for p in batch_positions(step, micro, rank, 2, config)
    ]  # fmt: skip
    assert positions == list(range(24))


def test_learning_rate_warms_up_and_ends_as_its_schedule_says():
    config = FinetuneConfig(
        model="", out="", shards=[], steps=110, warmup_steps=10, learning_rate=1.0, lr_schedule="cosine"
    )
    assert learning_rate(0, config) == pytest.approx(0.1)
    assert learning_rate(10, config) == pytest.approx(1.0)
    assert learning_rate(60, config) == pytest.approx(0.5)
    assert learning_rate(110, config) == pytest.approx(0.0)


@pytest.mark.parametrize("amx, precision", [(True, "bf16"), (False, "no")])
def test_auto_precision_is_bf16_only_where_it_is_fast(monkeypatch, amx, precision):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": amx}, raising=False)
    assert resolve_precision("auto") == precision
    assert resolve_precision("fp16") == "fp16"


def test_an_image_is_augmented_alike_whatever_batch_it_falls_in():
    pixels = torch.rand(3, 3, 16, 16)
    how = Augmentation(shift=0.2, scale=0.2, flip=0.5, colour=0.3, hue=0.1, rotate=10)
    uniform = draw([generator(0, "augment", i, 0) for i in range(3)])
    together = augment(pixels, uniform, how)
    alone = torch.cat([augment(pixels[i : i + 1], uniform[i : i + 1], how) for i in range(3)])
    assert torch.allclose(together, alone, atol=1e-6)
    assert not torch.allclose(together, pixels)
    assert torch.equal(augment(pixels, uniform, Augmentation()), pixels)


def test_white_paper_stays_white_and_a_flip_mirrors():
    white = torch.ones(2, 3, 8, 8)
    how = Augmentation(shift=0.2, scale=0.3, colour=0.5, hue=0.2, rotate=20)
    assert torch.allclose(augment(white, torch.rand(2, 9), how), white, atol=1e-5)
    pixels = torch.rand(1, 3, 8, 8)
    assert torch.allclose(augment(pixels, torch.zeros(1, 9), Augmentation(flip=1.0)), pixels.flip(3), atol=1e-5)


def test_captions_pooled_by_curation_are_trained_on_too():
    sample = load_part("finetune")[0]
    pooled = {"afresh": {"duplicates": 2, "captions": ["another", sample.caption]}}
    members = {**sample.members, "json": json.dumps(pooled).encode()}
    assert sample_captions(type(sample)(sample.shard, sample.key, members)) == (sample.caption, "another")


def test_the_parts_of_the_sample_set_are_disjoint_and_whole():
    sizes = {name: len(load_part(name)) for name in parts()}
    assert sizes == {"pretrain": 1205, "finetune": 501, "held_out": 200}
    assert not parts()["pretrain"] & parts()["finetune"]
    assert not parts()["held_out"] & (parts()["pretrain"] | parts()["finetune"])


# --------------------------------------------------------------------------------------------------- the run


def test_training_changes_the_unet_alone_and_leaves_a_pipeline_that_diffusers_loads(model, shards, tmp_path):
    from diffusers import StableDiffusionPipeline

    summary = run_finetune(settings(model, shards, tmp_path / "run", cache_latents=True))
    assert summary["samples_seen"] == 16 and summary["dropped"] == 0
    before = load_pipeline(model)
    after = StableDiffusionPipeline.from_pretrained(summary["model"], safety_checker=None)
    assert not same(before.unet.state_dict(), after.unet.state_dict())
    assert same(before.text_encoder.state_dict(), after.text_encoder.state_dict())
    assert [line["step"] for line in log_lines(tmp_path / "run")] == [1, 2, 3, 4]
    assert run_finetune(settings(model, shards, tmp_path / "run", cache_latents=True)) == summary


def test_steps_on_which_everything_is_dropped_change_nothing_and_are_counted(model, shards, tmp_path):
    dropped_all = FilterConfig("every_step", threshold=1e-9)
    summary = run_finetune(
        settings(model, shards, tmp_path / "run", filter=dropped_all, caption_dropout=0.0, ema_decay=0.9)
    )
    assert summary["dropped"] == summary["judged"] == 16
    assert summary["skipped_steps"] == 4
    assert same(load_pipeline(model).unet.state_dict(), weights(tmp_path / "run"))


def test_a_filter_that_drops_nothing_gives_the_same_weights_as_none(model, shards, tmp_path):
    run_finetune(settings(model, shards, tmp_path / "off"))
    run_finetune(settings(model, shards, tmp_path / "on", filter=FilterConfig("every_step", threshold=1e9)))
    assert same(weights(tmp_path / "off"), weights(tmp_path / "on"))


def test_accumulated_batches_give_the_gradient_of_the_whole_batch(model, shards, tmp_path):
    run_finetune(settings(model, shards, tmp_path / "whole", steps=1, batch_size=8))
    run_finetune(settings(model, shards, tmp_path / "parts", steps=1, batch_size=4, gradient_accumulation=2))
    (whole,), (parts_,) = log_lines(tmp_path / "whole"), log_lines(tmp_path / "parts")
    assert parts_["loss"] == pytest.approx(whole["loss"], rel=1e-4)
    assert parts_["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-3)


def test_cached_and_streamed_latents_train_alike(model, shards, tmp_path):
    how = Augmentation(shift=0.1, flip=0.5, variants=2)
    for name, cached in (("cached", True), ("streamed", False)):
        run_finetune(settings(model, shards, tmp_path / name, augmentation=how, cache_latents=cached, steps=2))
    losses = [[line["loss"] for line in log_lines(tmp_path / name)] for name in ("cached", "streamed")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)  # the cache holds half precision


def test_an_unreadable_image_weighs_nothing_and_stops_nothing(model, tmp_path):
    samples = [(s.key, dict(s.members)) for s in load_part("finetune")[:4]]
    samples[1][1]["webp"] = b"not an image"
    write_shard(str(tmp_path / "bad" / "000000.tar"), samples)
    summary = run_finetune(settings(model, str(tmp_path / "bad"), tmp_path / "run", steps=1))
    assert summary["samples_seen"] == 4
    assert log_lines(tmp_path / "run")[0]["kept"] == 3


# --------------------------------------------------------------------------------------- killed and continued


def launch(config: FinetuneConfig, *, processes: int = 1) -> subprocess.Popen:
    """The command as users start it, with one process or two."""
    arguments = ["-m", "train", "finetune", f"--model={config.model}", f"--out={config.out}"]
    arguments += [f"--shards={config.shards[0]}", f"--steps={config.steps}", f"--batch_size={config.batch_size}"]
    arguments += [f"--learning_rate={config.learning_rate}", f"--workers={config.workers}", "--log_every=1"]
    arguments += [f"--checkpoint_every={config.checkpoint_every}", f"--filter.policy={config.filter.policy}"]
    arguments += [f"--filter.threshold={config.filter.threshold}", f"--ema_decay={config.ema_decay}"]
    arguments += [f"--caption_dropout={config.caption_dropout}"]
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    env = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen(start + arguments, env=env, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def wait_for_step(out: Path, step: int, process: subprocess.Popen) -> None:
    while process.poll() is None:
        path = out / "log.jsonl"
        if path.is_file() and path.read_text().count("\n") >= step:
            return
        time.sleep(0.02)
    pytest.fail(f"the run ended before step {step}: {process.communicate()[1]}")


@pytest.mark.timeout(300)
def test_a_killed_run_goes_on_bit_for_bit(model, shards, tmp_path):
    changes = {"steps": 8, "ema_decay": 0.9, "checkpoint_every": 2, "workers": 1}
    run_finetune(settings(model, shards, tmp_path / "whole", **changes))
    config = settings(model, shards, tmp_path / "cut", **changes)
    process = launch(config)
    wait_for_step(tmp_path / "cut", 5, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    run_finetune(config)
    assert log_lines(tmp_path / "cut") == log_lines(tmp_path / "whole")
    assert same(weights(tmp_path / "cut"), weights(tmp_path / "whole"))


@pytest.mark.timeout(300)
def test_sigterm_saves_and_exits_cleanly_and_the_run_goes_on(model, shards, tmp_path):
    run_finetune(settings(model, shards, tmp_path / "whole", steps=60, batch_size=1))
    config = settings(model, shards, tmp_path / "cut", steps=60, batch_size=1)
    process = launch(config)
    wait_for_step(tmp_path / "cut", 3, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0
    assert "the same command goes on" in process.communicate()[1]
    assert not (tmp_path / "cut" / "summary.json").exists()
    run_finetune(config)
    assert same(weights(tmp_path / "cut"), weights(tmp_path / "whole"))


@pytest.mark.timeout(300)
def test_two_processes_train_as_one_with_the_doubled_batch_though_one_rank_drops_all(model, shards, tmp_path):
    # The first position is judged and dropped or kept by a threshold between the two ranks' magnitudes.
    whole = settings(
        model, shards, tmp_path / "one", steps=3, batch_size=2, caption_dropout=0.0,
        filter=FilterConfig("every_step", threshold=1e9),
    )  # fmt: skip
    run_finetune(whole)
    rows = pq.read_table(tmp_path / "one" / "verdicts.parquet").to_pylist()
    magnitudes = sorted(m for row in rows for m in row["magnitude_by_band"] if m is not None)
    threshold = (magnitudes[len(magnitudes) // 2 - 1] + magnitudes[len(magnitudes) // 2]) / 2
    some = FilterConfig("every_step", threshold=threshold)
    changes = {"steps": 3, "caption_dropout": 0.0, "filter": some}
    one = run_finetune(settings(model, shards, tmp_path / "single", batch_size=2, **changes))
    two = settings(model, shards, tmp_path / "double", batch_size=1, **changes)
    process = launch(two, processes=2)
    assert process.wait(timeout=240) == 0, process.communicate()[1]
    summary = json.loads((tmp_path / "double" / "summary.json").read_text())
    assert summary["processes"] == 2
    assert 0 < one["dropped"] == summary["dropped"] < 6  # with one sample a rank, a dropped one empties the rank
    for a, b in zip(log_lines(tmp_path / "single"), log_lines(tmp_path / "double"), strict=True):
        assert (a["kept"], a["dropped"]) == (b["kept"], b["dropped"])
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-3, abs=1e-6)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-2, abs=1e-6)


def test_a_checkpoint_cut_short_is_never_picked_up(tmp_path):
    save_checkpoint(tmp_path, 2, {"x": torch.ones(3)}, keep=2)
    save_checkpoint(tmp_path, 4, {"x": torch.zeros(3)}, keep=2)
    path = tmp_path / "step-000004.pt"
    path.write_bytes(path.read_bytes()[:200])
    (tmp_path / ".tmp-1-step-000006.pt").write_bytes(b"half")
    step, state = load_latest(tmp_path)
    assert step == 2 and state["x"].tolist() == [1, 1, 1]
    save_checkpoint(tmp_path, 6, {"x": torch.ones(1)}, keep=1)
    assert [p.name for p in sorted(tmp_path.glob("step-*"))] == ["step-000006.pt"]


# -------------------------------------------------------------------------------------------------- bad input


def test_a_folder_begun_with_other_settings_is_refused_by_name(model, shards, tmp_path):
    run_finetune(settings(model, shards, tmp_path / "run", steps=1))
    with pytest.raises(UsageError, match="learning_rate"):
        run_finetune(settings(model, shards, tmp_path / "run", steps=1, learning_rate=2e-3))


def test_a_model_with_a_part_missing_is_named(model, shards, tmp_path):
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    shutil.rmtree(broken / "vae")
    with pytest.raises(UserError, match="lacks vae"):
        run_finetune(settings(str(broken), shards, tmp_path / "run"))


@pytest.mark.parametrize(
    ("change", "word"),
    [({"steps": 0}, "steps"), ({"caption_dropout": 1.0}, "caption_dropout"), ({"learning_rate": -1.0}, "learning_")],
)
def test_settings_out_of_range_are_named(model, shards, tmp_path, change, word):
    with pytest.raises(UsageError, match=word):
        run_finetune(settings(model, shards, tmp_path / "run", **change))
