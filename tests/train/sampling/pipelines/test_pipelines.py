"""The guided pipeline and ``train sample``: stock images without guidance, terms that touch only theirs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch
from PIL import Image

from afresh.errors import UserError
from train.denoising.schedules import coefficients_at
from train.memorization.signals.magnitude import magnitude
from train.sampling.config import AMGConfig, SampleConfig
from train.sampling.guidance import Correction, Part, Run, State
from train.sampling.job.job import run_sample
from train.sampling.pipelines.stable_diffusion import GuidedStableDiffusion

PROMPTS = ["red apple", "grinning face"]


class Scaled:
    """A term that takes ``amount`` of the text direction away from the images ``rows``."""

    name = "scaled"

    def __init__(self, rows: list[int], amount: float = 1.0, look: Callable[[State], None] | None = None) -> None:
        self.rows, self.amount, self.look = rows, amount, look

    def start(self, run: Run):
        rows = torch.tensor(self.rows, dtype=torch.long)

        def step(state: State) -> Correction:
            if self.look is not None:
                self.look(state)
            delta = -self.amount * (state.eps_cond - state.eps_uncond)[rows]
            return Correction({"less": Part(rows, delta)}, {"norm": state.eps_hat.flatten(1).norm(dim=1)})

        return step


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(n) for n in numbers]


def with_scheduler(pipe, name: str, **options):
    """The stock and the guided pipeline, each with its own scheduler of a kind."""
    kind = getattr(diffusers, name)
    stock = diffusers.StableDiffusionPipeline(
        **{**pipe.components, "scheduler": kind.from_config(pipe.scheduler.config, **options)},
        requires_safety_checker=False,
    )
    stock.set_progress_bar_config(disable=True)
    guided = GuidedStableDiffusion.from_pipe(stock, scheduler=kind.from_config(stock.scheduler.config))
    return stock, guided


SCHEDULERS = [
    ("DDIMScheduler", {}),
    ("DDIMScheduler", {"prediction_type": "v_prediction"}),
    ("DDPMScheduler", {}),
    ("DPMSolverMultistepScheduler", {}),
    ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True, "prediction_type": "v_prediction"}),
    ("EulerDiscreteScheduler", {}),
    ("EulerAncestralDiscreteScheduler", {}),
    ("HeunDiscreteScheduler", {}),
    ("KDPM2DiscreteScheduler", {}),
    ("PNDMScheduler", {"skip_prk_steps": True}),
    ("UniPCMultistepScheduler", {}),
]


@pytest.mark.parametrize(("name", "options"), SCHEDULERS)
def test_without_terms_the_images_are_the_stock_pipelines_bit_for_bit(tiny_pipe, name, options):
    stock, guided = with_scheduler(tiny_pipe, name, **options)
    call = {"num_inference_steps": 4, "output_type": "np"}
    expected = stock(PROMPTS, generator=seeds(1, 2), **call).images
    output = guided(PROMPTS, generator=seeds(1, 2), **call)
    np.testing.assert_array_equal(output.images, expected)
    assert {row["step"] for row in output.trace} == set(range(len(guided.scheduler.timesteps)))


@pytest.mark.parametrize(
    "call",
    [
        {"negative_prompt": ["blue", "sad"]},
        {"num_images_per_prompt": 2, "generator": "one"},
        {"guidance_scale": 1.0},
        {"guidance_rescale": 0.7},
        {"eta": 0.6},
        {"height": 32, "width": 48},
        {"timesteps": [901, 501, 101], "scheduler": "DPMSolverMultistepScheduler"},
        {"prompt_embeds": "computed"},
        {"latents": "given"},
        {"output_type": "latent"},
        {"output_type": "pt"},
        {"callback_on_step_end": "halve"},
    ],
    ids=lambda call: next(iter(call)),
)
def test_every_usual_argument_means_what_it_means_in_the_stock_pipeline(tiny_pipe, call):
    call = dict(call)
    stock, guided = with_scheduler(tiny_pipe, call.pop("scheduler", "DDIMScheduler"))
    call = {"prompt": PROMPTS, "num_inference_steps": 3, "generator": "each", "output_type": "np", **call}
    if call.get("prompt_embeds") == "computed":
        embeds = stock.encode_prompt(PROMPTS, torch.device("cpu"), 1, True)
        call.update(prompt=None, prompt_embeds=embeds[0] * 0.9, negative_prompt_embeds=embeds[1])
    if call.get("latents") == "given":
        call["latents"] = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    if call.get("callback_on_step_end") == "halve":
        call["callback_on_step_end"] = lambda pipe, i, t, tensors: {"latents": tensors["latents"] / 2}

    def draw(pipe):
        generator = seeds(1, 2) if call["generator"] == "each" else seeds(5)[0]
        return pipe(**{**call, "generator": generator}, return_dict=False)

    (expected, _), (images, nsfw) = draw(stock), draw(guided)
    assert nsfw is None
    np.testing.assert_array_equal(np.asarray(images), np.asarray(expected))


@pytest.mark.parametrize(("name", "options"), SCHEDULERS[::3])
def test_images_that_no_term_acts_on_keep_every_bit(tiny_pipe, name, options):
    _, guided = with_scheduler(tiny_pipe, name, **options)
    prompts = [*PROMPTS, "blue car"]
    call = {"num_inference_steps": 3, "output_type": "np"}
    plain = guided(prompts, generator=seeds(1, 2, 3), **call).images
    output = guided(prompts, generator=seeds(1, 2, 3), guidance=[Scaled([1])], **call)
    np.testing.assert_array_equal(output.images[[0, 2]], plain[[0, 2]])
    assert np.abs(output.images[1] - plain[1]).max() > 1e-3
    assert all(row["fired"] == (["less"] if row["image"] == 1 else []) for row in output.trace)


@pytest.mark.parametrize(("name", "options"), SCHEDULERS)
def test_a_term_sees_variance_preserving_latents_and_their_alpha_bar(tiny_pipe, name, options):
    """``√ᾱ·x_0 + √(1−ᾱ)·noise`` of known x_0 and noise, whatever space the scheduler keeps latents in."""
    _, guided = with_scheduler(tiny_pipe, name, **options)
    guided.scheduler.set_timesteps(8)
    t = guided.scheduler.timesteps[3]
    x0, noise = torch.randn(2, 1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    x_t = guided.scheduler.scale_model_input(guided.scheduler.add_noise(x0, noise, t[None]), t)
    alpha_bar = coefficients_at(guided.scheduler, t).alpha_bar
    torch.testing.assert_close(x_t, alpha_bar**0.5 * x0 + (1 - alpha_bar) ** 0.5 * noise, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_taking_away_text_equals_sampling_at_a_lower_scale(tiny_pipe, prediction_type):
    """A correction in ε-space is converted to what the model predicts: 7.5 − 2.5 is 5."""
    _, guided = with_scheduler(tiny_pipe, "DDIMScheduler", prediction_type=prediction_type)
    call = {"num_inference_steps": 5, "output_type": "latent"}
    expected = guided(PROMPTS, generator=seeds(1, 2), guidance_scale=5.0, **call).images
    images = guided(PROMPTS, generator=seeds(1, 2), guidance=[Scaled([0, 1], 2.5)], **call).images
    torch.testing.assert_close(images, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_terms_apply_in_order_and_each_sees_what_the_one_before_left(tiny_pipe):
    guided = GuidedStableDiffusion.from_pipe(tiny_pipe)
    terms = [Scaled([0], 2.0), Scaled([0], 3.0)]
    call = {"generator": seeds(1), "num_inference_steps": 2, "trace_tensors": True}
    row = guided("red apple", guidance=terms, **call).trace[0]
    direction = row["eps_cond"] - row["eps_uncond"]
    start = row["eps_uncond"] + 7.5 * direction
    torch.testing.assert_close(row["eps_hat"], start - 5 * direction, rtol=1e-5, atol=1e-5)
    assert row["norm"] == pytest.approx(float(start.norm()), rel=1e-5)
    assert row["scaled.norm"] == pytest.approx(float((start - 2 * direction).norm()), rel=1e-5)
    assert row["fired"] == ["less", "scaled.less"]


def test_the_trace_holds_the_magnitude_of_each_image_and_step(tiny_pipe):
    guided = GuidedStableDiffusion.from_pipe(tiny_pipe)
    trace = guided(PROMPTS, generator=seeds(1, 2), num_inference_steps=2, trace_tensors=True).trace
    assert [(row["step"], row["image"]) for row in trace] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    for row in trace:
        m = magnitude(row["eps_cond"][None], row["eps_uncond"][None])
        assert row["magnitude"] == pytest.approx(float(m), rel=1e-5)
    unguided = guided(PROMPTS, num_inference_steps=1, guidance_scale=1.0).trace
    assert unguided[0]["magnitude"] is None


def test_state_helpers_denoise_decode_and_encode_as_the_pipeline_does(tiny_pipe):
    guided = GuidedStableDiffusion.from_pipe(tiny_pipe)
    seen = []

    def look(state: State) -> None:
        rows = torch.tensor([1])
        again = state.denoise(state.x_t[rows], state.encode_prompts([PROMPTS[1]]), rows)
        torch.testing.assert_close(again, state.eps_cond[rows], rtol=1e-4, atol=1e-4)
        x0 = (state.x_t - (1 - state.alpha_bar) ** 0.5 * state.eps_hat) / state.alpha_bar**0.5
        torch.testing.assert_close(state.x0(), x0)
        pixels = state.decode(state.x0(rows))
        assert pixels.shape == (1, 3, 64, 64) and bool(((pixels >= 0) & (pixels <= 1)).all())
        seen.append(state.step)

    guided(PROMPTS, generator=seeds(1, 2), num_inference_steps=2, guidance=[Scaled([0], look=look)])
    assert seen == [0, 1]


def test_a_half_precision_model_stays_so_and_is_decoded_in_float32():
    from train.sample_model.small import tiny_pipeline

    half = tiny_pipeline().to(torch.bfloat16)
    guided = GuidedStableDiffusion.from_pipe(half)
    assert guided.unet is half.unet and half.unet.dtype == torch.bfloat16
    pixels = []
    look = Scaled([0], look=lambda state: pixels.append(state.decode(state.x0())))
    guided("red apple", generator=seeds(1), num_inference_steps=1, guidance=[look], output_type="latent")
    assert pixels[0].dtype == torch.float32 and pixels[0].isfinite().all()


def test_inference_mode_is_no_obstacle(tiny_pipe):
    guided = GuidedStableDiffusion.from_pipe(tiny_pipe)
    with torch.inference_mode():
        output = guided("red apple", generator=seeds(1), num_inference_steps=1, guidance=[Scaled([0])])
    assert output.trace[0]["fired"] == ["less"]


# --------------------------------------------------------------------------------------------- train sample


@pytest.fixture(scope="module")
def model(tiny_pipe, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def index(emoji, tmp_path_factory) -> Path:
    """A curated set's index: the first emoji, by the weight-free descriptor."""
    from curate.embed.registry import load_embedder
    from curate.index.training_index import TrainingIndex

    out = tmp_path_factory.mktemp("curated")
    images, captions = zip(*emoji, strict=True)
    n = len(images)
    built = TrainingIndex.build(
        load_embedder("layout").embed(images),
        list(captions),
        ["000000.tar"] * n,
        [f"{i:04d}" for i in range(n)],
        np.ones(n, bool),
        np.arange(n),
        "layout",
    )
    built.save(out / "index")
    return out


@pytest.fixture
def config(model, tmp_path) -> SampleConfig:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("red apple\ngrinning face\n")
    return SampleConfig(str(model), str(prompts), str(tmp_path / "out"), seeds=2, steps=2, batch_size=3, device="cpu")


def images_of(config: SampleConfig) -> dict[str, np.ndarray]:
    return {path.name: np.asarray(Image.open(path)) for path in sorted(Path(config.out).glob("0*.png"))}


def test_sample_writes_images_that_say_what_they_are(config):
    summary = run_sample(config)
    assert {key: summary[key] for key in ("images", "made", "fired", "max_similarity")} == {
        "images": 4,
        "made": 4,
        "fired": 0,
        "max_similarity": None,
    }
    assert summary["seconds_per_image"] > 0
    assert list(images_of(config)) == [
        "00000-red-apple-s0.png",
        "00000-red-apple-s1.png",
        "00001-grinning-face-s0.png",
        "00001-grinning-face-s1.png",
    ]
    with Image.open(Path(config.out) / "00001-grinning-face-s1.png") as image:
        assert (image.text["prompt"], image.text["seed"], image.text["guidance"]) == (
            "grinning face",
            "1",
            "none",
        )
    table = parquet.read_table(Path(config.out) / "samples.parquet").to_pylist()
    assert [(row["prompt"], row["seed"]) for row in table] == [(p, s) for p in PROMPTS for s in (0, 1)]
    assert parquet.read_table(Path(config.out) / "trace.parquet").num_rows == 4 * 2
    with Image.open(Path(config.out) / "grid.png") as grid:
        assert grid.height == 2 * 132


def test_an_image_depends_on_its_prompt_and_seed_not_on_its_batch(config, tmp_path):
    run_sample(config)
    alone = replace(config, batch_size=1, out=str(tmp_path / "alone"))
    run_sample(alone)
    drawn, again = images_of(config), images_of(alone)
    assert drawn.keys() == again.keys()
    for name, image in drawn.items():
        assert np.abs(image.astype(int) - again[name].astype(int)).max() <= 1


def test_a_stopped_run_draws_only_what_is_missing_and_ends_the_same(config):
    run_sample(config)
    out = Path(config.out)
    whole, table = images_of(config), parquet.read_table(out / "samples.parquet")
    (out / "00000-red-apple-s1.png").unlink()
    truncated = out / "00001-grinning-face-s0.png"
    truncated.write_bytes(truncated.read_bytes()[:500])
    kept = out / "00000-red-apple-s0.png"
    before = kept.stat().st_mtime_ns
    assert run_sample(config)["made"] == 2
    assert kept.stat().st_mtime_ns == before
    for name, image in images_of(config).items():
        assert np.abs(image.astype(int) - whole[name].astype(int)).max() <= 1
    again = parquet.read_table(out / "samples.parquet")
    assert again.select(["file", "prompt", "seed"]).equals(table.select(["file", "prompt", "seed"]))
    assert run_sample(config)["made"] == 0


def test_images_of_other_settings_or_prompts_are_not_mixed_in(config):
    run_sample(config)
    with pytest.raises(UserError, match="other settings"):
        run_sample(replace(config, steps=3))
    Path(config.prompts).write_text("RED apple\ngrinning face\n")
    with pytest.raises(UserError, match="another prompt"):
        run_sample(config)


def test_a_prompt_may_bring_its_own_seed_and_label(config, tmp_path):
    rows = [{"caption": "red apple", "seed": 7, "label": 1}, {"caption": "grinning face"}]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_sample(replace(config, prompts=str(prompts), first_seed=3))
    table = parquet.read_table(Path(config.out) / "samples.parquet").to_pylist()
    assert [(row["seed"], row["label"]) for row in table] == [(7, 1), (8, 1), (3, None), (4, None)]


def test_guidance_is_recorded_with_the_nearest_training_sample(config, index, emoji):
    amg = AMGConfig(schedule="constant", lambda_b=-1.0, every=2, edits=1)
    guided = replace(config, index=str(index), guidance="amg", amg=amg)
    summary = run_sample(guided)
    assert summary["fired"] == 4 and -1 <= summary["max_similarity"] <= 1
    rows = parquet.read_table(Path(config.out) / "samples.parquet").to_pylist()
    captions = [caption for _, caption in emoji]
    for row in rows:
        assert row["steps_fired"] == 2 and row["nearest_key"] == f"{row['nearest_row']:04d}"
        assert row["nearest_caption"] == captions[row["nearest_row"]]
    trace = parquet.read_table(Path(config.out) / "trace.parquet").to_pylist()
    assert all("dissimilarity" in row["fired"] and row["threshold"] == -1 for row in trace)
    with Image.open(Path(config.out) / rows[0]["file"]) as image:
        assert image.text["nearest"] == f"000000.tar/{rows[0]['nearest_key']}"
        assert float(image.text["similarity"]) == pytest.approx(rows[0]["similarity"], abs=1e-4)


def test_an_index_alone_measures_and_leaves_the_images_as_they_are(config, index, tmp_path):
    run_sample(config)
    measured = replace(config, index=str(index / "index"), out=str(tmp_path / "measured"))
    summary = run_sample(measured)
    assert summary["fired"] == 0 and summary["max_similarity"] is not None
    plain, watched = images_of(config), images_of(measured)
    assert all(np.array_equal(plain[name], watched[name]) for name in plain)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"guidance": "amg"}, "needs --index"),
        ({"seeds": 0}, "--seeds"),
        ({"scheduler": "Karras"}, "--scheduler Karras"),
        ({"index": "nowhere"}, "nowhere"),
    ],
)
def test_options_that_cannot_work_are_named(config, options, words):
    with pytest.raises(UserError, match=words):
        run_sample(replace(config, **options))


def test_an_embedder_that_did_not_build_the_index_is_refused(config, index):
    with pytest.raises(UserError, match="built with the embedder 'layout', not with 'copy-detector'"):
        run_sample(replace(config, index=str(index), embedder="copy-detector"))


def test_the_command_prints_its_summary_as_json(config, run_cli):
    command = ["train", "sample", "--model", config.model, "--prompts", config.prompts, "--out", config.out]
    options = ["--seeds", 1, "--steps", 1, "--scheduler", "EulerAncestralDiscreteScheduler", "--json"]
    done = run_cli(*command, *options)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["images"] == 2
    refused = run_cli(*command, "--guidance", "amg")
    assert refused.returncode == 2 and "needs --index" in refused.stderr
