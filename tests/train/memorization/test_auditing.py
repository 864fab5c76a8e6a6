"""The audit: its search against a denoiser known in closed form, the job with its control."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image

from afresh.errors import UsageError, UserError
from train.cli import main
from train.denoising.families.stable_diffusion import encode_captions, initial_noise
from train.denoising.opening.loading import load_pipeline
from train.evaluation.audit import compared, row_correlation, rows_of, run_audit
from train.evaluation.config import AuditConfig
from train.evaluation.judging.metrics import pixel_correlation
from train.evaluation.reporting.audit_report import conclude
from train.memorization import Audit, audit
from train.memorization.auditing import _draws, draw, encode_images, search_embeds, starting_point
from train.memorization.neurons.value_neurons import value_layers
from train.prompts import Prompt, write_prompts

SHAPE = (4, 16, 16)
TOKENS, WIDTH = 3, 5
SEARCH = {"steps": 4, "learning_rate": 0.1, "noises": 4, "seed": 0, "batch_size": 3}


class LinearImage(torch.nn.Module):
    """The exact denoiser of a set of one image, which is linear in the prompt: ``μ_e = Σ_i A_i e_i``; or, blind to the
    prompt, of the set of the empty image alone.

    ``ε(x_t, e) = (x_t − √ᾱ_t μ_e) / √(1−ᾱ_t)``.
    """

    def __init__(self, alphas_cumprod, prediction_type="epsilon", blind=False):
        super().__init__()
        self.config = SimpleNamespace(sample_size=SHAPE[1], in_channels=SHAPE[0])
        self.dtype, self.device = torch.float32, torch.device("cpu")
        generator = torch.Generator().manual_seed(0)
        self.a = torch.randn((TOKENS, WIDTH, *SHAPE), generator=generator) * (not blind)
        self.alphas_cumprod, self.prediction_type = alphas_cumprod, prediction_type

    def mean(self, e):
        return torch.einsum("nik,ikchw->nchw", e, self.a)

    def forward(self, x, t, encoder_hidden_states, return_dict):
        a = self.alphas_cumprod[t].view(-1, 1, 1, 1)
        eps = (x - a.sqrt() * self.mean(encoder_hidden_states)) / (1 - a).sqrt()
        return (eps if self.prediction_type == "epsilon" else (eps - (1 - a).sqrt() * x) / a.sqrt(),)


def with_denoiser(prediction_type="epsilon", **options):
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", prediction_type=prediction_type)
    unet = LinearImage(scheduler.alphas_cumprod, prediction_type, **options)
    return SimpleNamespace(unet=unet, scheduler=scheduler)


def targets(pipe, n=3):
    """Images that an embedding draws exactly, and searches that begin elsewhere."""
    generator = torch.Generator().manual_seed(1)
    goal = torch.randn((n, TOKENS, WIDTH), generator=generator)
    return pipe.unet.mean(goal), goal, goal + 0.3 * torch.randn(goal.shape, generator=generator)


def test_the_loss_is_the_closed_form_and_the_search_lowers_it():
    # ε(x_t, e) − ε = √ᾱ_t (x_0 − μ_e) / √(1−ᾱ_t): the noise cancels.
    pipe = with_denoiser()
    x_0, _, start = targets(pipe)
    options = SEARCH | {"steps": 60, "noises": 2}
    embeds, losses = zip(*search_embeds(pipe, x_0, start, [0] * 3, **options), strict=True)
    for step in (0, 1, 59):
        e = start if step == 0 else embeds[step - 1]
        a = pipe.scheduler.alphas_cumprod[_draws(0, 0, step, 2, SHAPE, 1000)[0]]
        error = (x_0 - pipe.unet.mean(e)).square().flatten(1).mean(1)
        assert losses[step].numpy() == pytest.approx((error * (a / (1 - a)).mean()).numpy(), rel=1e-3)
    first, last = ((x_0 - pipe.unet.mean(e)).flatten(1).norm(dim=1) for e in (start, embeds[-1]))
    assert (last < 0.6 * first).all()


def test_the_first_step_is_adams():
    # Whatever the gradient's size, Adam's first step is the learning rate against its sign.
    pipe = with_denoiser()
    x_0, _, start = targets(pipe)
    embeds, _ = next(iter(search_embeds(pipe, x_0, start, [0] * 3, **SEARCH)))
    towards = torch.einsum("nchw,ikchw->nik", x_0 - pipe.unet.mean(start), pipe.unet.a).sign()
    assert torch.allclose(embeds - start, 0.1 * towards, atol=1e-4)


def test_models_that_predict_noise_and_velocity_are_searched_the_same():
    x_0, _, start = targets(with_denoiser())
    found = [
        list(search_embeds(with_denoiser(kind), x_0, start, [0] * 3, **SEARCH))[-1]
        for kind in ("epsilon", "v_prediction")
    ]
    assert torch.allclose(found[0][0], found[1][0], atol=1e-3)
    assert torch.allclose(found[0][1], found[1][1], rtol=1e-3)


def test_a_batch_searches_as_single_images_do():
    pipe = with_denoiser()
    x_0, _, start = targets(pipe)
    together = list(search_embeds(pipe, x_0, start, [0, 1, 0], **SEARCH | {"batch_size": 5}))[-1]  # slices of 5, 5, 2
    for i, restart in enumerate([0, 1, 0]):
        alone = list(search_embeds(pipe, x_0[i : i + 1], start[i : i + 1], [restart], **SEARCH))[-1]
        assert torch.allclose(together[0][i], alone[0][0], atol=1e-5)
        assert torch.allclose(together[1][i], alone[1][0], rtol=1e-4)


def test_a_denoiser_that_is_blind_to_the_prompt_gives_nothing_back():
    pipe = with_denoiser(blind=True)
    x_0, _, start = targets(with_denoiser())
    embeds, losses = zip(*search_embeds(pipe, x_0, start, [0] * 3, **SEARCH), strict=True)
    assert torch.equal(embeds[-1], start)  # there is no gradient to follow
    assert all((loss > 0).all() for loss in losses)


def test_a_search_through_half_precision_goes_the_same_way(sample_model):
    pipe = load_pipeline(str(sample_model))
    x_0, start = encode_images(pipe, images_of(1)), encode_captions(pipe, ["red apple"])
    steps = []
    for dtype in (torch.float32, torch.float16):
        pipe.to(dtype=dtype)
        embeds, _ = next(iter(search_embeds(pipe, x_0, start, [0], **SEARCH)))
        steps.append((embeds - start).sign())
    assert (steps[0] == steps[1]).float().mean() > 0.97  # where the gradient vanished there would be no step


def test_restarts_begin_elsewhere_at_the_same_scale():
    caption = 3 + 2 * torch.randn(64, 64, generator=torch.Generator().manual_seed(5))
    assert torch.equal(starting_point(caption, 0, 0), caption)
    one, other = (starting_point(caption, 0, restart) for restart in (1, 2))
    assert torch.equal(one, starting_point(caption, 0, 1))
    for start in (one, other):
        assert start.mean().item() == pytest.approx(3, abs=0.2) and start.std().item() == pytest.approx(2, rel=0.05)
    assert abs(np.corrcoef(one.flatten(), other.flatten())[0, 1]) < 0.1


def images_of(n, seed=0):
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)) for _ in range(n)]


def test_drawing_is_the_pipelines_own(tiny_pipe):
    embeds = encode_captions(tiny_pipe, ["red apple", "flag"])
    before = tiny_pipe.scheduler.timesteps.clone()
    drawn = draw(tiny_pipe, embeds, [3, 4], 4, 2.0, batch_size=3)
    assert torch.equal(tiny_pipe.scheduler.timesteps, before)
    own = tiny_pipe("flag", latents=initial_noise(SHAPE, 4)[None], num_inference_steps=4, guidance_scale=2.0).images[0]
    assert np.abs(np.asarray(drawn[3], int) - np.asarray(own, int)).max() <= 1


def test_an_audit_with_a_pipeline_in_hand(tiny_pipe):
    ups = []
    bar = SimpleNamespace(update=ups.append)
    found = audit(
        tiny_pipe, images_of(2), ["red apple", "flag"], steps=5, noises=2, restarts=2, measure_every=2, seeds=[8, 9],
        num_inference_steps=2, bar=bar,
    )  # fmt: skip
    assert found.points.tolist() == [0, 2, 4, 5]
    assert found.measures["similarity"].shape == (4, 2, 2, 2)
    assert found.loss.shape == (2, 2, 5) and sum(ups) == 20
    assert len(found.before) == len(found.after) == 2
    assert all(parameter.requires_grad for parameter in tiny_pipe.unet.parameters())
    again = draw(tiny_pipe, found.embeds[1:, 0], [8], 2, 7.5, batch_size=1)[0]
    assert np.abs(np.asarray(again, int) - np.asarray(found.after[1], int)).max() <= 1
    alone = encode_images(tiny_pipe, images_of(2)[1:])
    assert torch.allclose(encode_images(tiny_pipe, images_of(2))[1:], alone, atol=1e-5)
    with pytest.raises(ValueError, match="2 images and 1 prompts"):
        audit(tiny_pipe, images_of(2), ["a"])


# ----------------------------------------------------------------------------------------------------- the job


def made_up(similarity, pixel=None):
    """An audit of as many images as rows, of two points, one restart."""
    values = np.asarray(similarity, np.float32)[:, :, None]
    measures = {"similarity": values, "pixel_correlation": values if pixel is None else pixel}
    n = values.shape[1]
    loss = np.tile(np.float32([3, 2, 1]), (n, 1, 1))
    return Audit(np.array([0, 3]), measures, loss, torch.zeros(n, 1, 1, 1), [], [])


def test_success_is_counted_and_set_against_the_control():
    training = made_up([[[0.1, 0.6], [0.0, 0.5]], [[0.9, 0.9], [0.2, 0.8]]])
    control = made_up([[[0.0, 0.0], [0.1, 0.1]], [[0.1, 0.1], [0.6, 0.1]]])
    rows = [row for kind, one in (("training", training), ("control", control)) for row in rows_of(kind, one)]
    assert [(row["kind"], row["step"]) for row in rows] == [
        ("training", 0), ("training", 3), ("control", 0), ("control", 3),
    ]  # fmt: skip
    assert [row["share"] for row in rows] == [0.25, 0.75, 0.0, 0.25]
    assert [row["reached"] for row in rows] == [0.5, 1.0, 0.0, 0.5]
    result = compared({"training": training, "control": control}, bootstrap=50)
    assert result["excess"] == pytest.approx(0.5) and result["auc"] == 1.0
    text = conclude({"rows": rows, **result})
    assert "25 % copies" in text and "75 %; 100 % of the images" in text and "+50 points" in text
    assert compared({"training": training}) == {}
    assert "There was no control" in conclude({"rows": rows[:2]})


def test_row_correlation_is_the_evaluations_own():
    a, b = images_of(3, 1), images_of(3, 2)
    stacks = [np.stack([np.asarray(i, np.float32).transpose(2, 0, 1) / 255 for i in images]) for images in (a, b)]
    assert row_correlation(a, b) == pytest.approx(np.diag(pixel_correlation(*stacks)), abs=1e-5)


@pytest.fixture(scope="module")
def model(tiny_pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_pipe.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.jsonl"
    rows = []
    for i, image in enumerate(images_of(4)):
        image.save(tmp_path / f"{i}.png")
        rows.append(Prompt(f"<b>face {i}</b>", i % 2, tmp_path / f"{i}.png"))
    write_prompts(file, [*rows, Prompt("without image", 1)])
    return file


def test_the_command_attacks_both_kinds_and_reports(model, prompts, tiny_pipe, tmp_path, capfd):
    neurons = tmp_path / "neurons.json"
    neurons.write_text(json.dumps({"neurons": {next(iter(value_layers(tiny_pipe.unet))): [1, 2]}}))
    out = tmp_path / "out"
    options = {"model": model, "prompts": prompts, "out": out, "neurons": neurons, "bootstrap": 10}
    options |= {"search_steps": 2, "noises": 2, "seeds": 2, "steps": 2, "measure_every": 1}
    assert main(["audit", "--json", *(f"--{key}={value}" for key, value in options.items())]) == 0
    summary = json.loads(capfd.readouterr().out)
    assert [(row["kind"], row["images"]) for row in summary["rows"]] == [("training", 2)] * 2 + [("control", 2)] * 2
    assert summary["auc"] is not None and summary["neurons"] == str(neurons)
    assert summary == json.loads((out / "summary.json").read_text())
    rows = parquet.read_table(out / "audit.parquet").to_pylist()
    assert len(rows) == 2 * 3 * 2 * 2  # kinds, points, images, seeds
    after = [row["similarity"] for row in rows if (row["kind"], row["step"]) == ("training", 2)]
    assert summary["rows"][1]["similarity"] == pytest.approx(np.mean(after))
    page = (out / "report.html").read_text()
    assert "<b>face" not in page and "&lt;b&gt;face 1" in page and "never trained on" in page
    assert "http" not in page.replace("base64", "")
    for name in ("curves.png", "figure.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")


def test_wrong_requests_are_named(model, prompts, tmp_path):
    def config(**changes):
        return AuditConfig(**{"model": "no-model", "prompts": str(prompts), "out": str(tmp_path / "out")} | changes)

    for changes, complaint in (
        ({"noises": 0}, "noises is 0"),
        ({"seeds": 0}, "seeds is 0"),
        ({"learning_rate": 0.0}, "learning_rate"),
    ):
        with pytest.raises(UsageError, match=complaint):
            run_audit(config(**changes))
    (tmp_path / "text.txt").write_text("a face")
    with pytest.raises(UserError, match="no row of label 1"):
        run_audit(config(prompts=str(tmp_path / "text.txt")))
    with pytest.raises(UserError, match="text.txt: no row has an image"):
        run_audit(config(control=str(tmp_path / "text.txt")))
    (tmp_path / "1.png").unlink()
    with pytest.raises(UserError, match="1.png: the image of .* is missing"):
        run_audit(config())
