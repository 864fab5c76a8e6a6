"""What users of other trainers look for: each option changes what it should, and nothing else."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler

from afresh.errors import UsageError
from curate.sample_set import load_part
from tests.train.finetune.runs import log_lines, same, settings, weights
from train.denoising.opening.loading import load_pipeline
from train.denoising.schedules import NoiseSchedule
from train.finetune.batches.captions import with_tags
from train.finetune.checks import check_finetune
from train.finetune.config import Calibration, FilterConfig, FinetuneConfig, ShardGroup, Tags, Timesteps
from train.finetune.data.scan import ShardSet
from train.finetune.loop import run_finetune
from train.finetune.model.diffusion import draw_randomness, timesteps_of
from train.finetune.model.loss import sample_errors
from train.finetune.preparation import with_numbers


def photographs(folder: Path, count: int = 5) -> str:
    """A folder as kohya's scripts have it: images and captions beside them, repeats in its name."""
    inner = folder / "10_emoji"
    inner.mkdir(parents=True)
    for number, sample in enumerate(load_part("finetune")[:count]):
        members = dict(sample.members)
        kind = next(kind for kind in ("png", "jpg", "webp") if kind in members)
        (inner / f"{number}.{kind}").write_bytes(members[kind])
        (inner / f"{number}.txt").write_bytes(members["txt"])
    return str(folder)


# -------------------------------------------------------------------------------------------- a folder, epochs


def test_a_plain_folder_trains_as_the_shards_that_it_becomes_for_as_many_epochs_as_asked(model, tmp_path):
    photos = photographs(tmp_path / "photos")
    changes = {"batch_size": 2, "epochs": 2}
    assert run_finetune(settings(model, photos, tmp_path / "run", **changes))["steps"] == 5  # of 10 visits
    imported = str(tmp_path / "run" / "imported" / "0")
    assert len(ShardSet(tmp_path / "run" / "samples.arrow")) == 5
    assert run_finetune(settings(model, photos, tmp_path / "run", **changes))["steps"] == 5  # finished, and stays so
    run_finetune(settings(model, imported, tmp_path / "shards", batch_size=2, steps=5))
    assert same(weights(tmp_path / "run"), weights(tmp_path / "shards"))


def test_the_folder_of_a_curation_is_no_folder_of_images_but_leads_to_its_shards(model, tmp_path):
    (tmp_path / "curated" / "shards").mkdir(parents=True)
    (tmp_path / "curated" / "shards" / "000000.tar").touch()
    (tmp_path / "curated" / "ledger.parquet").touch()
    with pytest.raises(UsageError, match="did you mean .*curated/shards"):
        check_finetune(settings(model, str(tmp_path / "curated"), tmp_path / "run"))


def test_a_folder_without_captions_trains_to_its_end_with_the_filter_off(model, tmp_path, capsys):
    photographs(tmp_path / "kohya")
    photos = (tmp_path / "kohya" / "10_emoji").rename(tmp_path / "photos")  # a name that is no caption
    for number in range(5):
        (photos / f"{number}.txt").unlink()
    by_default = FilterConfig(calibrate=Calibration(steps=2))
    summary = run_finetune(settings(model, str(photos), tmp_path / "run", batch_size=2, steps=4, filter=by_default))
    assert (summary["steps"], summary["judged"], summary["dropped"]) == (4, 0, 0)
    assert "the filter is off: it goes by captions, and no sample has one" in capsys.readouterr().err


def test_epochs_and_the_learning_rate_follow_from_the_samples_of_a_step(model, shards, tmp_path):
    run_finetune(settings(model, shards, tmp_path / "run", steps=1))
    shard_set = ShardSet(tmp_path / "run" / "samples.arrow")
    config = settings(model, shards, tmp_path, batch_size=2, gradient_accumulation=3, learning_rate=1e-4)
    assert with_numbers(config, shard_set, 2) == config
    config = settings(model, shards, tmp_path, batch_size=2, gradient_accumulation=3, epochs=1.5, scale_lr=True)
    found = with_numbers(config, shard_set, 2)
    assert found.steps == math.ceil(1.5 * 20 / 12) and found.learning_rate == pytest.approx(1e-3 * 12)


# ------------------------------------------------------------------------------------------------------ captions


def test_tags_are_shuffled_left_out_and_triggered_as_asked():
    text = "cat, red hat, grass, sky, sun"

    def visits(tags: Tags) -> list[str]:
        return [with_tags(text, tags, torch.Generator().manual_seed(n)) for n in range(200)]

    assert set(visits(Tags())) == {text}
    assert set(visits(Tags(trigger="sks"))) == {f"sks, {text}"}
    shuffled = visits(Tags(shuffle=True, keep=1))
    assert len(set(shuffled)) > 15 and all(one.startswith("cat, ") for one in shuffled)
    assert {tuple(sorted(one.split(", "))) for one in shuffled} == {tuple(sorted(text.split(", ")))}
    dropped = visits(Tags(dropout=0.5, keep=1))
    counts = Counter(tag for one in dropped for tag in one.split(", "))
    assert counts["cat"] == 200 and all(70 < counts[tag] < 130 for tag in ("red hat", "grass", "sky", "sun"))
    assert visits(Tags(shuffle=True, dropout=0.5)) != visits(Tags(dropout=0.5))
    assert with_tags("", Tags(trigger="sks", shuffle=True), torch.Generator()) == ""
    assert all(with_tags("cat", Tags(dropout=0.9), torch.Generator().manual_seed(n)) == "cat" for n in range(20))


def test_changed_captions_leave_the_order_and_the_draws_as_they_are(model, shards, tmp_path):
    run_finetune(settings(model, shards, tmp_path / "plain", steps=1))
    run_finetune(settings(model, shards, tmp_path / "tags", steps=1, tags=Tags(trigger="sks")))
    plain, tagged = log_lines(tmp_path / "plain")[0], log_lines(tmp_path / "tags")[0]
    assert plain["loss"] != tagged["loss"] and plain["loss"] == pytest.approx(tagged["loss"], rel=0.05)
    with pytest.raises(UsageError, match="tags: .*cache_text"):
        run_finetune(settings(model, shards, tmp_path / "no", tags=Tags(shuffle=True), cache_text=True))


def test_a_text_encoder_without_its_last_layers_is_trained_with_and_saved(model, shards, tmp_path):
    with pytest.raises(UsageError, match="clip_skip 1: the text encoder has 1 layers"):
        run_finetune(settings(model, shards, tmp_path / "no", clip_skip=1))
    pipe = load_pipeline(model)
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    config = CLIPTextConfig.from_dict(pipe.text_encoder.config.to_dict() | {"num_hidden_layers": 3})
    pipe.text_encoder = CLIPTextModel(config)
    pipe.save_pretrained(tmp_path / "deeper")
    run_finetune(settings(str(tmp_path / "deeper"), shards, tmp_path / "run", steps=1, clip_skip=1))
    saved = load_pipeline(str(tmp_path / "run" / "model"))
    assert saved.text_encoder.config.num_hidden_layers == 2
    ids = pipe.tokenizer(["a red apple"], return_tensors="pt", padding="max_length").input_ids
    whole = load_pipeline(str(tmp_path / "deeper")).text_encoder
    last_but_one = whole(ids, output_hidden_states=True).hidden_states[-2]  # as diffusers' clip_skip=1 takes it
    expected = getattr(whole, "text_model", whole).final_layer_norm(last_but_one)
    torch.testing.assert_close(saved.text_encoder(ids)[0], expected)
    assert not torch.equal(whole(ids)[0], expected)


# ------------------------------------------------------------------------------------------- loss and timesteps


def test_pseudo_huber_is_the_square_of_small_differences_and_linear_in_large_ones():
    output, target = torch.tensor([[0.001], [100.0]]), torch.zeros(2, 1)
    assert torch.equal(sample_errors(output, target), output[:, 0] ** 2)
    small, large = sample_errors(output.double(), target.double(), 0.1).tolist()
    assert small == pytest.approx(0.001**2, rel=1e-3) and large == pytest.approx(2 * 0.1 * 100, rel=1e-2)


def test_timesteps_are_drawn_as_asked_and_nothing_else_changes():
    def draw(how: Timesteps | None):
        config = FinetuneConfig(model="", out="", shards=[], timesteps=how or Timesteps())
        timestep = timesteps_of(NoiseSchedule(DDIMScheduler()), config)
        return draw_randomness(range(500), (1, 2, 2), 1000, 3, timestep=timestep)

    plain, same_again = draw(None), draw(Timesteps())
    assert torch.equal(plain.t, same_again.t)
    noisy = draw(Timesteps(lowest=600, highest=900))
    assert noisy.t.min() >= 600 and noisy.t.max() < 900 and noisy.t.float().mean() == pytest.approx(750, abs=15)
    middle = draw(Timesteps("logit_normal"))
    assert middle.t.float().std() < 230 < plain.t.float().std()
    assert draw(Timesteps("logit_normal", mean=1.0)).t.float().mean() > middle.t.float().mean() + 100
    for other in (noisy, middle):
        for name in ("posterior", "noise", "uniform"):
            assert torch.equal(getattr(other, name), getattr(plain, name))


# ------------------------------------------------------------------------------------------- rates and weights


def test_the_text_encoder_learns_at_a_rate_of_its_own_and_the_unet_as_before(model, shards, tmp_path):
    sgd = {"optimizer": "torch.optim.SGD", "learning_rate": 0.1, "train_text_encoder": True, "steps": 1}
    for name, rate in (("plain", None), ("same", 0.1), ("half", 0.05), ("none", 0.0)):
        run_finetune(settings(model, shards, tmp_path / name, text_encoder_learning_rate=rate, **sgd))
    before = load_pipeline(model).text_encoder.state_dict()
    after = {name: load_pipeline(str(tmp_path / name / "model")) for name in ("plain", "same", "half", "none")}
    texts = {name: pipe.text_encoder.state_dict() for name, pipe in after.items()}
    assert same(texts["plain"], texts["same"]) and same(texts["none"], before) and not same(texts["plain"], before)
    for name, value in before.items():
        moved, half = (texts[run][name] - value for run in ("plain", "half"))
        torch.testing.assert_close(2 * half, moved, atol=1e-6, rtol=1e-3)
    for name in ("same", "half", "none"):
        assert same(after[name].unet.state_dict(), after["plain"].unet.state_dict())
    with pytest.raises(UsageError, match="text_encoder_learning_rate needs train_text_encoder"):
        run_finetune(settings(model, shards, tmp_path / "no", text_encoder_learning_rate=0.1))


def test_shards_with_a_weight_count_by_it(model, shards, tmp_path):
    first, second, third = (str(path) for path in sorted(Path(shards).glob("*.tar")))
    config = settings(model, shards, tmp_path / "run", steps=5)
    config.shards = [first, ShardGroup(second, weight=0.5), ShardGroup(third, weight=0.0)]
    summary = run_finetune(config)
    shard_set = ShardSet(tmp_path / "run" / "samples.arrow")
    assert [shard_set.weight(row) for row in (0, 3, 15)] == [1.0, 0.5, 0.0]
    kept = sum(line["kept"] for line in log_lines(tmp_path / "run"))
    assert summary["samples_seen"] == 20 and kept == 15  # five samples of the third count nothing
    config.shards = [ShardGroup(first, weight=-1.0)]
    config.out = str(tmp_path / "no")
    with pytest.raises(UsageError, match="weight must be 0 or more"):
        run_finetune(config)
