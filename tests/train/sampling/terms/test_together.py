"""Terms that act together: each goes by the guidance scale and the prompt that the ones before it left."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from afresh.errors import UsageError
from tests.train.sampling.terms.known_parts import Embedder, index_near, make_state, only
from train.sampling import (
    AMG,
    AttractionBasin,
    GuidedStableDiffusion,
    NoiseAdjustment,
    PromptMinimisation,
    RandomTokens,
)
from train.sampling.config import SampleConfig
from train.sampling.guidance import Correction, Part, guide
from train.sampling.terms import registry

TEXT = only(despecification=True, deduplication=True)


def scale_of(state, terms) -> tuple[float, float]:
    """The effective scale of the first image: as it stands in the columns, and as it is in ``ε̂``."""
    eps_hat, _, columns = guide([(term.name, term.start(state.run)) for term in terms], state)
    direction = (state.eps_cond - state.eps_uncond)[0].flatten()
    found = (eps_hat - state.eps_uncond)[0].flatten() @ direction / (direction @ direction)
    return float(columns["scale"][0]), float(found)


def amg(state, *before, **options) -> AMG:
    """Acts on the first image, as the terms before leave it, with all its strength; e_N is the prompt itself."""
    left = guide([(term.name, term.start(state.run)) for term in before], state)[0]
    index = index_near(replace(state, eps_hat=left), 0, 0.75)
    return AMG(index, Embedder(), schedule="constant", lambda_b=0.5, **TEXT, **options)


@pytest.mark.parametrize(
    ("others", "left"),
    [
        ([], 1.0),
        ([AttractionBasin()], 0.0),
        ([AttractionBasin(before=1.0)], 1.0),
        ([AttractionBasin(before=4.0)], 1.0),
        ([AttractionBasin(before=-7.5)], -7.5),  # opposite guidance that was asked for
        ([NoiseAdjustment(method="batch", delay=1)], 0.0),
        ([AttractionBasin(), NoiseAdjustment(method="batch", delay=1)], 0.0),
    ],
)
def test_the_floor_holds_for_what_all_terms_take_together(others, left):
    state = make_state(["a known cat", "car"])
    for declared in scale_of(state, [*others, amg(state, *others)]):
        assert declared == pytest.approx(left, abs=1e-4)


def test_a_lower_floor_lets_amg_take_what_is_left_above_it():
    state = make_state(["a known cat", "car"])
    for declared in scale_of(state, [AttractionBasin(), amg(state, AttractionBasin(), floor=-1.0)]):
        assert declared == pytest.approx(-1.0, abs=1e-4)


@pytest.mark.parametrize("before", [0.0, 1.0, -2.0])
def test_inside_the_basin_the_scale_is_the_basins_whatever_came_before(before):
    state = make_state(["a known cat", "car"])
    for declared in scale_of(state, [amg(state), AttractionBasin(before=before)]):
        assert declared == pytest.approx(before, abs=1e-4)
    for declared in scale_of(state, [NoiseAdjustment(method="batch", delay=1), AttractionBasin(before=before)]):
        assert declared == pytest.approx(before, abs=1e-4)


def test_two_amgs_share_one_floor():
    state = make_state(["a known cat", "car"])
    for declared in scale_of(state, [amg(state), amg(state, amg(state))]):
        assert declared == pytest.approx(1.0, abs=1e-4)


class Less:
    """A term of one's own, which does not say what it takes."""

    name = "less"

    def start(self, run):
        def step(state):
            rows = torch.arange(run.batch_size)
            return Correction({"less": Part(rows, -5.0 * (state.eps_cond - state.eps_uncond))})

        return step


def test_what_a_term_does_not_say_of_its_part_is_measured():
    state = make_state(["a known cat", "car"])
    for declared in scale_of(state, [Less()]):
        assert declared == pytest.approx(2.5, abs=1e-4)
    for declared in scale_of(state, [Less(), amg(state, Less())]):
        assert declared == pytest.approx(1.0, abs=1e-4)


def test_the_dissimilarity_term_is_no_guidance_by_a_text():
    state = make_state(["a known cat", "car"])
    term = AMG(index_near(state, 0, 0.75), Embedder(), **only(dissimilarity=True))
    assert scale_of(state, [term])[0] == 7.5


def test_a_delay_leaves_what_other_terms_did_beside_the_scale():
    state = make_state(["a known cat", "car"])
    term = AMG(index_near(state, 0, 0.75), Embedder(), **only(dissimilarity=True))
    terms = [term, NoiseAdjustment(method="batch", delay=1)]
    eps_hat, parts, _ = guide([(one.name, one.start(state.run)) for one in terms], state)
    torch.testing.assert_close(eps_hat[:1], state.eps_uncond[:1] + parts["dissimilarity"].delta)


def test_an_image_that_no_term_acts_on_keeps_its_scale_and_every_bit():
    state = make_state(["a known cat", "car"])
    eps_hat, _, columns = guide([("amg", amg(state).start(state.run))], state)
    assert torch.equal(eps_hat[1], state.eps_hat[1]) and columns["scale"][1] == 7.5


# ------------------------------------------------------------------------------------------------ before the first step


def test_words_join_words_that_another_term_has_put_in(tiny_pipe):
    guided = GuidedStableDiffusion.from_pipe(tiny_pipe)
    terms = [RandomTokens(kind="number", number=2), RandomTokens(kind="repeat", number=3)]
    first = guided("red apple", num_inference_steps=1, guidance=terms, output_type="latent").trace[0]
    assert len(first["tokens.prompt_drawn"].split()) == 2 + 2 + 3
    assert set(first["tokens.prompt_drawn"].split()) == set(first["prompt_drawn"].split())


def test_words_do_not_replace_embeddings_that_were_minimised(tiny_pipe):
    guided = GuidedStableDiffusion.from_pipe(tiny_pipe)
    terms = [PromptMinimisation(target=0.0, steps=1), RandomTokens()]
    with pytest.raises(ValueError, match="let tokens act first"):
        guided("red apple", num_inference_steps=1, guidance=terms, output_type="latent")
    with pytest.raises(UsageError, match=r"write tokens\+prompt"):
        registry.check(SampleConfig("m", "p", "o", guidance="prompt+tokens"))
    registry.check(SampleConfig("m", "p", "o", guidance="tokens+prompt"))
