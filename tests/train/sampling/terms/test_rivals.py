"""The rivals of AMG against their equations, with a denoiser of closed form; then in the pipeline and by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from PIL import Image
from torch import Tensor

from afresh.errors import UsageError, UserError
from train.denoising.coefficients import Coefficients
from train.denoising.conditioning import Conditioning
from train.memorization.signals.magnitude import magnitude
from train.sampling import AttractionBasin, GuidedStableDiffusion, NoiseAdjustment, PromptMinimisation, RandomTokens
from train.sampling.config import SampleConfig, TokensConfig
from train.sampling.guidance import Run, Start, State, guide
from train.sampling.job.job import run_sample
from train.sampling.terms import registry as named
from train.sampling.terms.basin import local_minimum
from train.sampling.terms.random_tokens import with_random_words

PROMPTS = ["red apple", "grinning face"]
MIX = torch.randn(5 * 6, 4 * 4 * 4, generator=torch.Generator().manual_seed(2)) / 8


def denoise(x: Tensor, cond: Conditioning, rows: Tensor | None = None) -> Tensor:
    """``ε(x, e) = 0.9 x + (1 + 0.1 x) · M e``: linear in e, and the direction depends on x."""
    return 0.9 * x + (1 + 0.1 * x) * (cond.embeds.flatten(1) @ MIX).view(-1, 4, 4, 4)


def text(embeds: Tensor) -> Conditioning:
    return Conditioning({"embeds": embeds})


def make_start(n: int = 3, weak: int | None = None) -> Start:
    """Prompts of weight 1, one of them nearly the empty prompt."""
    g = torch.Generator().manual_seed(5)
    x, uncond = torch.randn(n, 4, 4, 4, generator=g), torch.randn(1, 5, 6, generator=g).expand(n, -1, -1)
    cond = torch.randn(n, 5, 6, generator=g)
    if weak is not None:
        cond[weak] = uncond[weak] + 0.01
    run = Run(n, 1000, lambda z: z, lambda texts: text(torch.zeros(len(texts), 5, 6)))
    at = Coefficients.of_alpha_bar(0.01)
    return Start(run, 981.0, at, x, x, text(uncond), text(cond), None, denoise)


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(n) for n in numbers]


def m_of(start: Start, embeds: Tensor | None = None, x: Tensor | None = None) -> Tensor:
    x = start.x_t if x is None else x
    return magnitude(denoise(x, start.cond if embeds is None else text(embeds)), denoise(x, start.uncond))


# ---------------------------------------------------------------------------------------- prompt minimisation


def test_prompt_minimisation_is_adamw_on_each_images_own_magnitude():
    start = make_start()
    change = PromptMinimisation(target=0.0, steps=3, slice=2).prepare(start)
    for i in range(3):
        rest = start.cond.embeds[i : i + 1, 1:].clone().requires_grad_()
        optimizer = torch.optim.AdamW([rest], lr=0.05)
        for _ in range(3):
            embeds = text(torch.cat([start.cond.embeds[i : i + 1, :1], rest], 1))
            m = magnitude(denoise(start.x_t[i : i + 1], embeds), denoise(start.x_t[i : i + 1], start.uncond[:1]))
            optimizer.zero_grad()
            m.sum().backward()
            optimizer.step()
        torch.testing.assert_close(change.cond.embeds[i, 1:], rest.detach()[0], rtol=1e-4, atol=1e-5)
    assert torch.equal(change.cond.embeds[:, 0], start.cond.embeds[:, 0])  # BOS
    torch.testing.assert_close(change.columns["prompt_magnitude"], m_of(start))
    torch.testing.assert_close(change.columns["prompt_magnitude_after"], m_of(start, change.cond.embeds))


def test_each_image_stops_at_the_target_on_its_own():
    start = make_start(weak=1)
    before = m_of(start)
    target = float(before[0]) - 0.2
    change = PromptMinimisation(target=target, steps=10).prepare(start)
    after, steps = change.columns["prompt_magnitude_after"], change.columns["prompt_steps"]
    assert float(before[1]) < target and steps[1] == 0 and 1 not in change.rows.tolist()
    assert 0 < steps[0] < 10 and float(after[0]) <= target
    one_less = PromptMinimisation(target=target, steps=int(steps[0]) - 1).prepare(start)
    assert float(one_less.columns["prompt_magnitude_after"][0]) > target


# -------------------------------------------------------------------------------------------- attraction basin


def state_of(step: int, size: Tensor, scale: float = 7.5) -> State:
    """A step at which the images' magnitudes are ``size``."""
    n = len(size)
    uncond = torch.randn(n, 4, 4, 4, generator=torch.Generator().manual_seed(step))
    direction = torch.ones(n, 4, 4, 4) / 8 * size.view(-1, 1, 1, 1)
    run = Run(n, 1000, lambda z: z, lambda texts: text(torch.zeros(len(texts), 1, 1)))
    eps_hat = uncond + scale * direction
    t = 900.0 - 100 * step
    at = Coefficients.of_alpha_bar(0.5)
    return State(run, step, t, at, scale, uncond, uncond, uncond + direction, eps_hat, None, None, denoise)


def run_basin(term: AttractionBasin, sizes: list[list[float]]) -> tuple[list[list[bool]], list[float]]:
    states = [state_of(i, torch.tensor(size)) for i, size in enumerate(sizes)]
    steps = [("basin", term.start(states[0].run))]
    inside, scales = [], []
    for state in states:
        eps_hat, _, columns = guide(steps, state)
        inside.append(columns["inside"].tolist())
        direction = (state.eps_cond - state.eps_uncond)[0]
        scales.append(float(((eps_hat - state.eps_uncond)[0] / direction).mean()))
    return inside, scales


@pytest.mark.parametrize("before", [0.0, 1.0, -7.5])
def test_guidance_begins_at_each_images_first_local_minimum(before):
    falls_then_rises, falls = [9.0, 6.0, 4.0, 5.0, 3.0], [9.0, 8.0, 7.0, 6.0, 5.0]
    sizes = [list(pair) for pair in zip(falls_then_rises, falls, strict=True)]
    inside, scales = run_basin(AttractionBasin(before=before), sizes)
    assert inside == [[True, True], [True, True], [True, True], [False, True], [False, True]]
    assert scales == pytest.approx([before] * 3 + [7.5] * 2, abs=1e-4)


def test_a_static_transition_point_is_a_timestep():
    inside, _ = run_basin(AttractionBasin(until=650), [[1.0]] * 5)
    assert inside == [[True], [True], [True], [False], [False]]  # t = 900, 800, 700, 600, 500


def test_prompts_of_little_weight_are_left_alone():
    inside, _ = run_basin(AttractionBasin(least=2.0), [[3.0, 1.0]] * 4)
    assert inside == [[True, False]] * 4


def test_a_minimum_has_greater_neighbours_on_both_sides():
    values = [torch.tensor([3.0, 1.0, 2.0]), torch.tensor([2.0, 2.0, 2.0]), torch.tensor([3.0, 3.0, 2.0])]
    assert local_minimum(values).tolist() == [True, False, False]
    assert local_minimum(values[:2]).tolist() == [False, False, False]


# ----------------------------------------------------------------------------------------------- initial noise


def test_the_batch_form_is_the_sharpness_aware_step_of_the_paper():
    start = make_start()
    rho, gamma = 3.0, 0.7
    change = NoiseAdjustment(method="batch", rho=rho, gamma=gamma, iterations=2, slice=2).prepare(start)
    x = start.x_t
    for _ in range(2):
        tilde = denoise(x, start.cond) - denoise(x, start.uncond)
        there = x + rho * tilde / tilde.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        x = x - gamma * (denoise(there, start.cond) - denoise(there, start.uncond) - tilde)
    torch.testing.assert_close(change.x_t, x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(change.columns["noise_magnitude"], m_of(start))
    torch.testing.assert_close(change.columns["noise_magnitude_after"], m_of(start, x=x))


def test_after_the_batch_form_the_first_steps_go_without_the_prompt():
    term = NoiseAdjustment(method="batch", delay=2)
    states = [state_of(i, torch.tensor([2.0])) for i in range(3)]
    steps = [("noise", term.start(states[0].run))]
    results = [guide(steps, state)[0] for state in states]
    torch.testing.assert_close(results[0], states[0].eps_uncond)
    torch.testing.assert_close(results[1], states[1].eps_uncond)
    assert torch.equal(results[2], states[2].eps_hat)


def test_the_per_sample_form_is_adamw_on_the_noise_and_stops_at_the_target():
    start = make_start(weak=2)
    target = float(m_of(start)[0]) - 0.02
    change = NoiseAdjustment(target=target, steps=10).prepare(start)
    assert 2 not in change.rows.tolist()
    after = change.columns["noise_magnitude_after"]
    assert float(after[0]) <= target
    x = start.x_t[:1].clone().requires_grad_()
    optimizer = torch.optim.AdamW([x], lr=0.01)
    while float(m_of_one(x, start)) > target:
        optimizer.zero_grad()
        m_of_one(x, start).backward()
        optimizer.step()
    torch.testing.assert_close(change.x_t[0], x.detach()[0], rtol=1e-4, atol=1e-5)


def m_of_one(x: Tensor, start: Start) -> Tensor:
    return magnitude(denoise(x, start.cond[:1]), denoise(x, start.uncond[:1])).sum()


# ----------------------------------------------------------------------------------------------- random tokens


@pytest.mark.parametrize("kind", ["word", "number", "repeat"])
def test_random_words_stand_between_the_prompts_own_which_keep_their_order(tiny_pipe, kind):
    text = "a small red apple"
    config = TokensConfig(kind=kind, number=4)
    drawn = [with_random_words(text, config, tiny_pipe.tokenizer, torch.Generator().manual_seed(s)) for s in range(6)]
    assert len(set(drawn)) > 3
    for one in drawn:
        words = iter(one.split())
        assert all(word in words for word in text.split())
        if kind == "number":
            assert sum(word.isdigit() for word in one.split()) == 4
        if kind == "repeat":
            assert len(one.split()) == 8 and set(one.split()) == set(text.split())


def test_each_image_has_words_of_its_own_that_do_not_depend_on_the_batch(tiny_pipe):
    guided = GuidedStableDiffusion.from_pipe(tiny_pipe)
    call = {"num_inference_steps": 1, "guidance": [RandomTokens()], "output_type": "np"}
    both = guided(["red apple", "red apple"], generator=seeds(1, 2), **call)
    alone = guided("red apple", generator=seeds(2), **call)
    words = [row["prompt_drawn"] for row in both.trace]
    assert words[0] != words[1] == alone.trace[0]["prompt_drawn"]
    said = guided(words[:1], generator=seeds(1), num_inference_steps=1, output_type="np")
    np.testing.assert_allclose(both.images[0], said.images[0], atol=2e-3)


# ------------------------------------------------------------------------------------------------ in the pipeline


def with_prediction(pipe, prediction_type: str, kind: type = DDIMScheduler) -> GuidedStableDiffusion:
    scheduler = kind.from_config(pipe.scheduler.config, prediction_type=prediction_type)
    guided = GuidedStableDiffusion.from_pipe(pipe, scheduler=scheduler)
    guided.set_progress_bar_config(disable=True)
    return guided


@pytest.mark.parametrize(
    ("scheduler", "prediction_type"),
    [(DDIMScheduler, "epsilon"), (DDIMScheduler, "v_prediction"), (EulerDiscreteScheduler, "epsilon")],
)
@pytest.mark.parametrize("kind", ["prompt", "noise"])
def test_the_magnitude_of_the_first_step_is_what_the_term_left_and_others_keep_every_bit(
    tiny_pipe, kind, scheduler, prediction_type
):
    guided = with_prediction(tiny_pipe, prediction_type, scheduler)
    call = {"num_inference_steps": 2, "output_type": "np"}
    plain = guided(PROMPTS, generator=seeds(1, 2), **call)
    m = [plain.trace[i]["magnitude"] for i in (0, 1)]
    weak, strong = int(np.argmin(m)), int(np.argmax(m))
    target = (m[weak] + m[strong]) / 2
    term = PromptMinimisation(target=target) if kind == "prompt" else NoiseAdjustment(target=target, lr=0.05)
    output = guided(PROMPTS, generator=seeds(1, 2), guidance=[term], **call)
    np.testing.assert_array_equal(output.images[weak], plain.images[weak])
    assert np.abs(output.images[strong] - plain.images[strong]).max() > 1e-3
    first = output.trace[strong]
    assert first[f"{kind}_magnitude"] == pytest.approx(m[strong], rel=1e-3)
    assert first["magnitude"] == pytest.approx(first[f"{kind}_magnitude_after"], rel=1e-3)
    assert first["magnitude"] < m[strong] - 1e-4


def test_before_its_transition_point_the_basin_term_draws_without_the_prompt(tiny_pipe):
    guided = with_prediction(tiny_pipe, "v_prediction")
    call = {"num_inference_steps": 3, "output_type": "latent"}
    always = guided(PROMPTS, generator=seeds(1, 2), guidance=[AttractionBasin(until=0)], **call).images
    empty = guided(["", ""], generator=seeds(1, 2), guidance_scale=1.0, **call).images
    torch.testing.assert_close(always, empty, rtol=1e-3, atol=1e-3)
    never = guided(PROMPTS, generator=seeds(1, 2), guidance=[AttractionBasin(until=1000)], **call).images
    assert torch.equal(never, guided(PROMPTS, generator=seeds(1, 2), **call).images)


def test_terms_prepare_in_order_and_combine(tiny_pipe):
    guided = with_prediction(tiny_pipe, "epsilon")
    guidance = [RandomTokens(number=2), PromptMinimisation(target=0.0, steps=2), AttractionBasin()]
    with torch.inference_mode():  # gradients are taken all the same
        output = guided(PROMPTS, generator=seeds(1, 2), num_inference_steps=2, guidance=guidance)
    first = output.trace[0]
    alone = guided([first["prompt_drawn"]], generator=seeds(1), num_inference_steps=2).trace[0]
    assert first["prompt_magnitude"] == pytest.approx(alone["magnitude"], rel=1e-3)  # of the changed prompt
    assert first["prompt_steps"] == 2 and first["fired"] == ["basin"]


def test_terms_that_need_a_prompt_say_so(tiny_pipe):
    guided = with_prediction(tiny_pipe, "epsilon")
    embeds = tiny_pipe.encode_prompt("red apple", torch.device("cpu"), 1, False)[0]
    with pytest.raises(ValueError, match="prompts as text"):
        guided(prompt_embeds=embeds, guidance_scale=1.0, num_inference_steps=1, guidance=[RandomTokens()])
    for term in (PromptMinimisation(), NoiseAdjustment(), AttractionBasin()):
        with pytest.raises(ValueError, match="classifier-free guidance"):
            guided("red apple", guidance_scale=1.0, num_inference_steps=1, guidance=[term])


# ----------------------------------------------------------------------------------------------------- by name


def test_names_stand_for_settings_and_several_combine():
    config = SampleConfig("m", "p", "o", guidance="tokens+opposite", scale=6.0)
    assert named.names("none") == [] and named.names(config.guidance) == ["tokens", "opposite"]
    made, rejection = named.make(config, None, None)
    assert [term.name for term in made] == ["tokens", "basin"] and rejection is None
    assert made[1].config.before == -6.0
    assert named.settings(config)["opposite"]["before"] == -6.0
    assert named.needs_index("tokens+rejection") and not named.needs_index("tokens")
    for name in named.SETTINGS:
        assert named.names(name) == [name]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"guidance": "tokens+magic"}, "'magic' is not known; choose of none, amg"),
        ({"guidance": "tokens+tokens"}, "stands twice"),
        ({"guidance": "rejection"}, "needs --index"),
    ],
)
def test_unknown_names_and_missing_indexes_are_named(options, words, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red apple")
    config = SampleConfig("nowhere", str(tmp_path / "prompts.txt"), str(tmp_path / "out"), **options)
    with pytest.raises(UserError, match=words):
        run_sample(config)


@pytest.mark.parametrize(
    ("term", "options", "words"),
    [
        (PromptMinimisation, {"slice": 0}, "prompt.slice is 0: it is at least 1"),
        (PromptMinimisation, {"form": "l1"}, "form is 'l1': choose one of l2, rms"),
        (NoiseAdjustment, {"method": "all"}, "noise.method is 'all'"),
        (RandomTokens, {"kind": "emoji"}, "tokens.kind is 'emoji'"),
        (AttractionBasin, {"least": -1.0}, "basin.least is -1"),
        (RandomTokens, {"many": 3}, "many"),
    ],
)
def test_settings_that_make_no_sense_are_named(term, options, words):
    with pytest.raises(UsageError, match=words):
        term(**options)


@pytest.fixture(scope="module")
def job(tiny_pipe, tmp_path_factory) -> SampleConfig:
    """A model, prompts, and an index of what the model draws for the first prompt and seed."""
    from curate.embed.registry import load_embedder
    from curate.index.calibration import Calibration
    from curate.index.training_index import TrainingIndex

    folder = tmp_path_factory.mktemp("rivals")
    tiny_pipe.save_pretrained(folder / "model")
    (folder / "prompts.txt").write_text("red apple\ngrinning face\n")
    config = SampleConfig(
        str(folder / "model"), str(folder / "prompts.txt"), str(folder / "plain"), seeds=1, steps=2, device="cpu"
    )
    run_sample(config)
    images = [Image.open(path) for path in sorted((folder / "plain").glob("0*.png"))]
    layout = load_embedder("layout")
    rows = layout.embed([images[0], Image.new("RGB", (64, 64), "white")])
    index = TrainingIndex.build(rows, ["x", "y"], ["s"] * 2, ["a", "b"], np.ones(2, bool), np.arange(2), "layout")
    # The two images' layouts must be told apart, whatever a random model draws.
    cosine = float(rows[0] @ layout.embed(images[1:2])[0])
    near = (1 + cosine) / 2
    index = replace(index, calibration=Calibration((-1.0, near, 1.0), (-1.0, 0.5, 1.0)))
    index.save(folder / "index")
    return replace(config, index=str(folder / "index"))


def test_rejection_is_recorded_and_leaves_what_it_keeps(job, tmp_path):
    out = tmp_path / "rejected"
    run_sample(replace(job, guidance="rejection", out=str(out)))
    rows = parquet.read_table(out / "samples.parquet").to_pylist()
    assert rows[0]["tries"] > 1 and rows[0]["seed"] == 0 and rows[0]["drawn_seed"] != 0
    assert (rows[1]["tries"], rows[1]["drawn_seed"]) == (1, 0)
    plain = Path(job.out)
    first, second = (Path(row["file"]).name for row in rows)
    assert np.array_equal(np.asarray(Image.open(out / second)), np.asarray(Image.open(plain / second)))
    again = replace(job, guidance="none", out=str(tmp_path / "again"), first_seed=rows[0]["drawn_seed"])
    run_sample(again)
    drawn = np.asarray(Image.open(tmp_path / "again" / first.replace("s0", f"s{rows[0]['drawn_seed']}")), int)
    assert np.abs(drawn - np.asarray(Image.open(out / first), int)).max() <= 1


@pytest.mark.parametrize("guidance", ["prompt", "opposite", "noise", "noise-batch", "tokens+basin", "numbers+amg"])
def test_every_name_draws_and_is_recorded(job, tmp_path, guidance):
    out = tmp_path / "out"
    run_sample(replace(job, guidance=guidance, out=str(out)))
    rows = parquet.read_table(out / "samples.parquet").to_pylist()
    assert [row["guidance"] for row in rows] == [guidance] * 2
    trace = parquet.read_table(out / "trace.parquet")
    expected = {"prompt": "prompt_steps", "noise": "noise_magnitude", "noise-batch": "noise_magnitude"}
    assert expected.get(guidance, "inside" if "amg" not in guidance else "prompt_drawn") in trace.column_names


def test_the_command_takes_a_terms_settings(job, tmp_path, run_cli):
    out = tmp_path / "cli"
    command = ["train", "sample", "--model", job.model, "--prompts", job.prompts, "--out", out, "--seeds", 1]
    done = run_cli(*command, "--steps", 1, "--guidance", "tokens", "--tokens.kind", "number", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["images"] == 2
    drawn = parquet.read_table(out / "trace.parquet")["prompt_drawn"].to_pylist()
    assert all(sum(word.isdigit() for word in text.split()) == 4 for text in drawn)
    refused = run_cli(*command, "--guidance", "noise", "--noise.slice", 0)
    assert refused.returncode == 2 and "noise.slice" in refused.stderr
