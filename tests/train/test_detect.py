"""Detection: the trajectory's magnitudes against denoisers that are known in closed form, and the job."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pyarrow
import pyarrow.parquet as parquet
import pytest
import torch
from diffusers import DDIMScheduler

from curate.console import UsageError, UserError
from train.components import encode_captions, tokenize
from train.memorization import score
from train.memorization.config import DetectConfig
from train.memorization.detect import run_detect

PROMPTS = ["red apple, food fruit", "grinning face", "flag"]
SHAPE = (4, 16, 16)


class KnownDenoiser(torch.nn.Module):
    """The exact denoiser of N(μ, s²) data, where the prompt says μ and s.

    ``ε(x_t, e) = √(1−ᾱ_t) (x_t − √ᾱ_t μ_e) / (ᾱ_t s_e² + 1 − ᾱ_t)``; with s = 0 the data is the one image μ.
    The empty prompt stands for N(0, 1).
    """

    def __init__(self, pipe, means: dict[str, torch.Tensor], s: float, prediction_type: str = "epsilon"):
        super().__init__()
        self.config = SimpleNamespace(sample_size=SHAPE[1], in_channels=SHAPE[0])
        self.dtype, self.device = torch.float32, torch.device("cpu")
        self.known = [(encode_captions(pipe, [""])[0], torch.zeros(SHAPE), 1.0)]
        self.known += [(encode_captions(pipe, [caption])[0], mean, s) for caption, mean in means.items()]
        self.alphas_cumprod = pipe.scheduler.alphas_cumprod.double()
        self.prediction_type = prediction_type

    def forward(self, x, t, encoder_hidden_states, return_dict):
        rows = []
        a = self.alphas_cumprod[int(t)]
        for x_t, embeds in zip(x.double(), encoder_hidden_states, strict=True):
            _, mean, s = min(self.known, key=lambda known: (known[0] - embeds).abs().max().item())
            eps = (1 - a).sqrt() * (x_t - a.sqrt() * mean) / (a * s**2 + 1 - a)
            v = (eps - (1 - a).sqrt() * x_t) / a.sqrt()
            rows.append(v if self.prediction_type == "v_prediction" else eps)
        return (torch.stack(rows).float(),)


def with_denoiser(pipe, unet: torch.nn.Module, prediction_type: str = "epsilon"):
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config, prediction_type=prediction_type)
    return SimpleNamespace(unet=unet, scheduler=scheduler, tokenizer=pipe.tokenizer, text_encoder=pipe.text_encoder)


@pytest.fixture(scope="module")
def means() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {caption: torch.randn(SHAPE, generator=generator) for caption in PROMPTS}


def test_magnitude_of_gaussians_of_one_width_is_the_closed_form(tiny_pipe, means):
    # s = 1 as for the empty prompt: m_t = √(1−ᾱ_t) √ᾱ_t ‖μ‖, whatever the noise.
    scores = score(with_denoiser(tiny_pipe, KnownDenoiser(tiny_pipe, means, s=1.0)), PROMPTS, steps=5)
    a = tiny_pipe.scheduler.alphas_cumprod[scores.timesteps].double()
    for row, caption in enumerate(PROMPTS):
        expected = ((1 - a) * a).sqrt() * means[caption].double().norm()
        assert scores.magnitudes[row] == pytest.approx(np.tile(expected, (4, 1)), rel=1e-5)


def test_magnitude_along_the_trajectory_to_one_image_is_the_closed_form(tiny_pipe, means):
    # s = 0 and scale 1: DDIM keeps ε, so x_t = √ᾱ_t μ + √(1−ᾱ_t) ε with ε fixed by x_T.
    unet = KnownDenoiser(tiny_pipe, means, s=0.0)
    scores = score(with_denoiser(tiny_pipe, unet), PROMPTS, steps=50, seeds=[3, 11], guidance_scale=1.0)
    a = tiny_pipe.scheduler.alphas_cumprod[scores.timesteps].double().reshape(-1, 1, 1, 1)
    for row, caption in enumerate(PROMPTS):
        mean = means[caption].double()
        for column, seed in enumerate((3, 11)):
            x_T = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)).double()
            eps = (x_T - a[0].sqrt() * mean) / (1 - a[0]).sqrt()
            x_t = a.sqrt() * mean + (1 - a).sqrt() * eps
            expected = (eps - (1 - a).sqrt() * x_t).flatten(1).norm(dim=1)
            # The first steps' float32 latents carry an error of 1e-6 of their own.
            assert scores.magnitudes[row, column] == pytest.approx(expected.numpy(), rel=2e-5, abs=1e-4)


def test_models_that_predict_noise_and_velocity_score_the_same(tiny_pipe, means):
    noise, velocity = (
        score(
            with_denoiser(tiny_pipe, KnownDenoiser(tiny_pipe, means, 0.3, kind), kind),
            PROMPTS,
            steps=10,
            seeds=2,
        )
        for kind in ("epsilon", "v_prediction")
    )
    assert velocity.magnitudes == pytest.approx(noise.magnitudes, rel=1e-4)


def test_a_batch_gives_what_single_items_give(tiny_pipe):
    options = {"steps": 3, "num_inference_steps": 10, "seeds": 3}
    single = score(tiny_pipe, PROMPTS, batch_size=1, **options)
    batch = score(tiny_pipe, PROMPTS, batch_size=7, **options)
    assert single.magnitudes.shape == (3, 3, 3)
    assert (single.magnitudes > 0).all()
    assert batch.magnitudes == pytest.approx(single.magnitudes, rel=1e-3)


def test_the_first_step_is_the_pipelines_own(tiny_pipe):
    scores = score(tiny_pipe, PROMPTS[:1], steps=2, num_inference_steps=20, seeds=[5], guidance_scale=3.0)
    seen = []

    def watch(pipe, step, t, tensors):
        seen.append(tensors["latents"])
        return {}

    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(5))[None]
    tiny_pipe(
        PROMPTS[0],
        num_inference_steps=20,
        guidance_scale=3.0,
        latents=noise,
        output_type="latent",
        callback_on_step_end=watch,
    )
    tokens = tiny_pipe.text_encoder(tokenize(tiny_pipe, [PROMPTS[0], ""]))[0]
    with torch.no_grad():
        for step, x_t in enumerate((noise, seen[0])):
            t = int(scores.timesteps[step])
            cond, uncond = tiny_pipe.unet(torch.cat([x_t, x_t]), t, tokens).sample
            assert scores.magnitudes[0, 0, step] == pytest.approx((cond - uncond).norm().item(), rel=1e-4)


def test_nothing_of_the_pipeline_is_changed(tiny_pipe):
    scheduler, before = tiny_pipe.scheduler, tiny_pipe.scheduler.timesteps.clone()
    score(tiny_pipe, PROMPTS[:1], num_inference_steps=7, seeds=1)
    assert tiny_pipe.scheduler is scheduler
    assert torch.equal(scheduler.timesteps, before)


def test_wrong_requests_are_refused(tiny_pipe):
    for options, complaint in (
        ({"steps": 0}, "steps is 0"),
        ({"steps": 51}, "steps is 51"),
        ({"signals": ["magnitud"]}, "magnitud.*choose from magnitude"),
        ({"seeds": 0}, "nothing to score"),
        ({"batch_size": 0}, "batch_size"),
    ):
        with pytest.raises(UsageError, match=complaint):
            score(tiny_pipe, PROMPTS, **options)


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


def test_the_job_names_what_is_wrong(model, tmp_path):
    (tmp_path / "p.txt").write_text("a")
    with pytest.raises(UsageError, match="ends in .parquet"):
        run_detect(DetectConfig(model, str(tmp_path / "p.txt"), str(tmp_path / "s.csv")))
    with pytest.raises(UsageError, match="steps is 51"):  # before anything is read
        run_detect(DetectConfig("no-model", "no-prompts", str(tmp_path / "s.parquet"), steps=51))
    with pytest.raises(UserError, match="nowhere.txt"):
        run_detect(DetectConfig(model, str(tmp_path / "nowhere.txt"), str(tmp_path / "s.parquet")))
