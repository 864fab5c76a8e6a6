"""Explanation: token gradients against a denoiser that is known in closed form, words from tokens, and the job."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from afresh.errors import UsageError, UserError
from train.cli import main
from train.denoising.families.stable_diffusion import encode_captions, initial_noise
from train.denoising.network import frozen
from train.memorization import explain, magnitude, suggest
from train.memorization.config import ExplainConfig
from train.memorization.explaining.changes import without
from train.memorization.explaining.explanation import read_tokens
from train.memorization.explaining.job import run_explain
from train.memorization.explaining.page import render, terminal_view

PROMPTS = ["red apple, food fruit", "grinning face"]
SHAPE = (4, 16, 16)
HOSTILE = '<script>alert("1")</script> & \x1b[31mface'


class LinearGaussian(torch.nn.Module):
    """The exact denoiser of N(μ_e, s²) data whose mean is linear in the embeddings: ``μ_e = Σ_i A_i (e_i − e_∅i)``.

    ``ε(x_t, e) = √(1−ᾱ_t) (x_t − √ᾱ_t μ_e) / (ᾱ_t s_e² + 1 − ᾱ_t)``; the empty prompt stands for N(0, 1).
    """

    def __init__(self, pipe, s: float, prediction_type: str = "epsilon"):
        super().__init__()
        self.config = SimpleNamespace(sample_size=SHAPE[1], in_channels=SHAPE[0])
        self.dtype, self.device = torch.float32, torch.device("cpu")
        self.empty = encode_captions(pipe, [""])[0].double()
        generator = torch.Generator().manual_seed(0)
        size = SHAPE[0] * SHAPE[1] * SHAPE[2]
        self.a = torch.randn((*self.empty.shape, size), generator=generator, dtype=torch.float64) / 16
        self.s, self.prediction_type = s, prediction_type
        self.alphas_cumprod = pipe.scheduler.alphas_cumprod.double()

    def mean(self, e):
        """``[n, tokens, width] → [n, c, h, w]``."""
        return torch.einsum("nik,ikp->np", e.double() - self.empty, self.a).view(-1, *SHAPE)

    def eps(self, x, a, e):
        s = torch.where((e.double() - self.empty).abs().amax((1, 2)) == 0, 1.0, self.s).view(-1, 1, 1, 1)
        return (1 - a).sqrt() * (x.double() - a.sqrt() * self.mean(e)) / (a * s**2 + 1 - a)

    def forward(self, x, t, encoder_hidden_states, return_dict):
        a = self.alphas_cumprod[int(t)]
        eps = self.eps(x, a, encoder_hidden_states)
        if self.prediction_type == "v_prediction":
            eps = (eps - (1 - a).sqrt() * x.double()) / a.sqrt()
        return (eps.float(),)


def with_denoiser(pipe, unet, prediction_type="epsilon"):
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config, prediction_type=prediction_type)
    return SimpleNamespace(unet=unet, scheduler=scheduler, tokenizer=pipe.tokenizer, text_encoder=pipe.text_encoder)


def closed_form(pipe, unet, prompt, seed, timesteps, scale):
    """m_t and ‖∂m_t/∂e_i‖ along the guided trajectory, in float64 from the formulas alone."""
    e, (A, empty) = encode_captions(pipe, [prompt]).double(), (unet.a, unet.empty[None])
    x = initial_noise(SHAPE, seed).double()[None]
    m, significance = [], []
    alpha_bar = [unet.alphas_cumprod[t] for t in timesteps]
    for a, after in zip(alpha_bar, [*alpha_bar[1:], None], strict=True):
        cond, uncond = unet.eps(x, a, e), unet.eps(x, a, empty)
        difference = cond - uncond
        m.append(difference.norm().item())
        # ∂ε_c/∂e_i = −√(1−ᾱ) √ᾱ A_i / (ᾱ s² + 1 − ᾱ), and ∂‖d‖/∂d = d / ‖d‖.
        factor = (1 - a).sqrt() * a.sqrt() / (a * unet.s**2 + 1 - a)
        gradient = -factor * torch.einsum("ikp,p->ik", A, (difference / difference.norm()).flatten())
        significance.append(gradient.norm(dim=1))
        if after is not None:
            eps = uncond + scale * difference
            x_0 = (x - (1 - a).sqrt() * eps) / a.sqrt()
            x = after.sqrt() * x_0 + (1 - after).sqrt() * eps
    return np.array(m), torch.stack(significance).numpy()


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_magnitude_and_token_gradient_are_the_closed_form(tiny_pipe, prediction_type):
    unet = LinearGaussian(tiny_pipe, s=0.5, prediction_type=prediction_type)
    pipe = with_denoiser(tiny_pipe, unet, prediction_type)
    found = explain(pipe, PROMPTS, steps=4, num_inference_steps=10, seeds=[3, 11], guidance_scale=2.0, batch_size=3)
    for explanation in found:
        for row, seed in enumerate((3, 11)):
            m, significance = closed_form(tiny_pipe, unet, explanation.prompt, seed, explanation.timesteps, 2.0)
            assert explanation.magnitudes[row] == pytest.approx(m, rel=1e-5)
            assert explanation.significance[row] == pytest.approx(significance, rel=1e-5, abs=1e-7)
            assert np.ptp(significance[0]) > 0.1 * significance[0].mean()  # tokens differ: the order is tested too


def test_the_formulas_gradient_is_the_one_that_finite_differences_find(tiny_pipe):
    unet = LinearGaussian(tiny_pipe, s=0.5)
    explanation = explain(with_denoiser(tiny_pipe, unet), PROMPTS[:1], steps=1, seeds=[7])[0]
    e, a = encode_captions(tiny_pipe, PROMPTS[:1]).double(), unet.alphas_cumprod[int(explanation.timesteps[0])]
    x, i, h = initial_noise(SHAPE, 7)[None], 2, 1e-3
    gradient = []
    for k in range(e.shape[2]):
        m = []
        for sign in (-1, 1):
            moved = e.clone()
            moved[0, i, k] += sign * h
            m.append((unet.eps(x, a, moved) - unet.eps(x, a, unet.empty[None])).norm().item())
        gradient.append((m[1] - m[0]) / (2 * h))
    assert explanation.significance[0, 0, i] == pytest.approx(np.linalg.norm(gradient), rel=1e-4)


def test_a_batch_gives_what_single_items_give(tiny_pipe):
    options = {"steps": 2, "num_inference_steps": 10, "seeds": 3}
    batch = explain(tiny_pipe, PROMPTS, batch_size=5, **options)
    for together, prompt in zip(batch, PROMPTS, strict=True):
        single = explain(tiny_pipe, prompt, batch_size=1, **options)[0]
        assert together.significance == pytest.approx(single.significance, rel=1e-3, abs=1e-6)
        assert together.magnitudes == pytest.approx(single.magnitudes, rel=1e-3)
        assert (single.per_token() > 0).all()


def test_checkpointing_gives_the_same_and_leaves_the_unet_as_it_was(tiny_pipe):
    unet = tiny_pipe.unet
    before = [parameter.requires_grad for parameter in unet.parameters()]
    options = {"steps": 1, "seeds": 1}
    plain = explain(tiny_pipe, PROMPTS, **options)[0]
    saved = explain(tiny_pipe, PROMPTS, gradient_checkpointing=True, **options)[0]
    assert saved.significance == pytest.approx(plain.significance, rel=1e-4, abs=1e-7)
    assert [parameter.requires_grad for parameter in unet.parameters()] == before
    assert not unet.is_gradient_checkpointing
    assert all(parameter.grad is None for parameter in unet.parameters())
    with pytest.raises(RuntimeError), frozen(unet, checkpointing=True):
        assert unet.is_gradient_checkpointing
        raise RuntimeError
    assert not unet.is_gradient_checkpointing and [p.requires_grad for p in unet.parameters()] == before


@pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_half_precision_stays_near_full_precision(sample_model, dtype, error):
    from train.denoising.opening.loading import load_pipeline

    pipe = load_pipeline(str(sample_model))
    full = explain(pipe, PROMPTS[:1], steps=1, seeds=1)[0]
    pipe.to(dtype=dtype)
    half = explain(pipe, PROMPTS[:1], steps=1, seeds=1)[0]
    assert half.magnitude == pytest.approx(full.magnitude, rel=error)
    assert half.per_token() == pytest.approx(full.per_token(), rel=error, abs=error * float(full.per_token().max()))


# ------------------------------------------------------------------------------------------------- words


def test_tokens_are_joined_to_words_and_specials_stand_apart(sample_model):
    from transformers import CLIPTokenizer

    pipe = SimpleNamespace(tokenizer=CLIPTokenizer.from_pretrained(sample_model / "tokenizer"))
    prompt = "Woman's t-shirt, piñata 🍎"
    tokens = read_tokens(pipe, prompt)
    assert [token.kind for token in tokens[:1]] == ["begin"]
    assert len(tokens) == pipe.tokenizer.model_max_length
    kinds = [token.kind for token in tokens]
    assert kinds.count("end") == 1 and set(kinds[kinds.index("end") + 1 :]) == {"padding"}

    significance = np.arange(len(tokens), dtype=np.float32)[None, None].repeat(2, 0).repeat(3, 1)
    explanation = explanation_of(prompt, tokens, significance)
    words = explanation.words()
    assert [word.text for word in words] == ["Woman's", "t-shirt", ",", "piñata", "🍎"]
    assert sorted(i for word in words for i in word.tokens) == [i for i, k in enumerate(kinds) if k == "word"]
    assert all(len(word.tokens) > 1 for word in words if word.text != ",")
    for word in words:
        assert word.significance == pytest.approx(np.sqrt(sum(i**2 for i in word.tokens)))
    assert [word.text for word in explanation.ranked()] == ["piñata", "t-shirt", "Woman's"]
    assert explanation.specials()["end"] == kinds.index("end")


def explanation_of(prompt, tokens, significance):
    from train.memorization.explaining.explanation import Explanation

    seeds, steps, _ = significance.shape
    return Explanation(
        prompt, tokens, significance, np.ones((seeds, steps), np.float32), np.arange(seeds), np.arange(steps)
    )


def test_words_behind_the_token_limit_are_said_not_to_be_seen(tiny_pipe):
    prompt = "apple " * 20 + "pear"
    explanation = explain(tiny_pipe, prompt, steps=1, seeds=1)[0]
    last = explanation.words()[-1]
    assert last.text == "pear" and last.tokens == () and np.isnan(last.significance)
    assert "pear" not in [word.text for word in explanation.ranked()]
    view = terminal_view(explanation.as_json() | {"changes": []})
    assert "pear" in view and "behind the model's token limit" in view


def test_removing_a_word_leaves_no_lone_separators(tiny_pipe):
    prompt = "family: woman, girl, boy"
    explanation = explanation_of(prompt, read_tokens(tiny_pipe, prompt), np.ones((1, 1, 16), np.float32))
    by_text = {word.text: word for word in explanation.words()}
    assert without(prompt, by_text["family"]) == "woman, girl, boy"
    assert without(prompt, by_text["girl"]) == "family: woman, boy"
    assert without(prompt, by_text["boy"]) == "family: woman, girl"
    assert without(prompt, by_text["woman"]) == "family: girl, boy"
    assert without(prompt, by_text["girl"], replacement="kite") == "family: woman, kite, boy"


def test_suggestions_measure_the_changed_prompts(tiny_pipe):
    explanation = explain(tiny_pipe, PROMPTS[0], steps=2, seeds=2)[0]
    changes = suggest(tiny_pipe, explanation, words=2, replacements=1, instead="a kite")
    assert [change.kind for change in changes] == ["instead", "removed", "removed", "control"] + ["replaced"] * 2
    ranked = [word.text for word in explanation.ranked()]
    assert [change.word for change in changes if change.kind == "removed"] == ranked[:2]
    assert changes[3].word == ranked[-1]
    for change in changes:
        assert change.word not in change.prompt.split() or change.kind == "instead"
        own = explain(tiny_pipe, change.prompt, steps=2, seeds=2)[0]
        assert change.magnitude == pytest.approx(own.magnitude, rel=1e-3)
    assert suggest(tiny_pipe, explain(tiny_pipe, "apple", steps=1, seeds=1)[0], replacements=0) == []


def test_three_lines_with_a_pipeline_in_hand(tiny_pipe):
    explanation = explain(tiny_pipe, "red apple", steps=1, seeds=1)[0]
    first = explanation.ranked()[0]
    assert first.text in ("red", "apple") and first.significance > 0
    assert callable(magnitude)


# -------------------------------------------------------------------------------------------------- the job


@pytest.fixture(scope="module")
def model(tiny_pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_pipe.save_pretrained(folder)
    return str(folder)


def test_the_command_shows_bars_or_json_and_writes_a_page(model, tmp_path, capfd):
    options = ["explain", "--model", model, "--steps", "1", "--seeds", "1", "--words", "1", "--replacements", "1"]
    assert main([*options, "--prompt", HOSTILE, "--out", str(tmp_path / "o.html"), "--instead", "a pear"]) == 0
    shown = capfd.readouterr().out
    assert "█" in shown and "without “" in shown and "the changed prompt: a pear" in shown
    assert "\x1b" not in shown  # neither colour nor the prompt's own codes: this is no terminal
    page = (tmp_path / "o.html").read_text()
    assert "<script" not in page and "&lt;script" not in page.split("<style>")[0]
    assert "http" not in page and "script" in page
    stored = json.loads((tmp_path / "o.json").read_text())
    assert stored["explanations"][0]["prompt"] == HOSTILE

    assert main([*options, "--prompt", "red apple", "--json"]) == 0
    row = json.loads(capfd.readouterr().out)["explanations"][0]
    assert row["change_first"][0] == max(row["words"], key=lambda word: word["significance"])["word"]
    assert row["changes"][0]["kind"] == "removed"


def test_colour_marks_the_first_words_only_where_it_is_asked_for():
    words = [{"word": w, "significance": s, "seen": True, "tokens": []} for w, s in (("a", 1.0), ("b", 2.0))]
    row = {"prompt": "a b", "magnitude": 1.0, "words": words, "specials": {"end": 0.5}, "change_first": ["b"]}
    row["changes"] = []
    assert "\x1b" not in terminal_view(row)
    coloured = terminal_view(row, colour=True).splitlines()
    assert [line for line in coloured if "\x1b[31m" in line] == [line for line in coloured if " b " in line]


def test_the_page_escapes_every_text():
    words = [{"word": "<b>", "significance": 1.0, "seen": True, "tokens": [{"token": '"<i>', "significance": 1.0}]}]
    words.append({"word": "<u>", "significance": float("nan"), "seen": False, "tokens": []})
    change = {"kind": "removed", "word": "<s>", "prompt": "<p>", "magnitude": 1.0}
    row = {"prompt": "<b>", "magnitude": 1.0, "words": words, "specials": {}, "changes": [change], "model": "<m>"}
    page = render({"explanations": [row], "model": "<m>", "steps": 1, "num_inference_steps": 2, "seeds": 1})
    for tag in ("<b>", "<i>", "<u>", "<s>", "<p>", "<m>"):
        assert tag not in page.replace('<p class="soft">', "")


def test_wrong_requests_are_refused(tiny_pipe, tmp_path):
    for options, complaint in (
        ({"steps": 51}, "steps is 51"),
        ({"seeds": 0}, "nothing to explain"),
        ({"batch_size": 0}, "batch_size"),
    ):
        with pytest.raises(UsageError, match=complaint):
            explain(tiny_pipe, PROMPTS, **options)
    for options, complaint in (
        ({}, "either --prompt or --prompts"),
        ({"prompt": "a", "prompts": "b.txt"}, "either"),
        ({"prompts": "b.txt", "instead": "c"}, "--instead goes with --prompt"),
        ({"prompt": "a", "out": "o.txt"}, "ends in .html"),
        ({"prompt": "a", "steps": 51}, "steps is 51"),
        ({"prompt": "a", "seeds": 0}, "seeds is 0"),
    ):
        with pytest.raises(UsageError, match=complaint):
            run_explain(ExplainConfig("no-model", **options))
    with pytest.raises(UserError, match="nowhere.txt"):
        run_explain(ExplainConfig("no-model", prompts=str(tmp_path / "nowhere.txt")))
