"""Value neurons: blocking, the search, its file and the job."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from afresh.errors import UsageError, UserError
from train.memorization import blocked, localize
from train.memorization.neurons.first_step import FirstStep
from train.memorization.neurons.localization import Localizer
from train.memorization.neurons.search import Blocking, candidate_sets, refine, select
from train.memorization.neurons.selectivity import per_cost, sensitivity
from train.memorization.neurons.value_neurons import (
    Statistics,
    activations,
    count,
    random_neurons,
    to_mask,
    to_neurons,
    union,
    value_layers,
    widths,
)
from train.memorization.neurons.weights import load_rows, restore_rows, save_rows, zero_rows

CLEAN = ["grinning face, face smiling", "red apple, food fruit", "flag", "house", "cat face, animal mammal", "a pear"]


@pytest.fixture(scope="module")
def pipe(tiny_pipe):
    return copy.deepcopy(tiny_pipe)


@pytest.fixture(scope="module")
def sizes(pipe):
    return widths(value_layers(pipe.unet, up_blocks=True))


def predict(pipe, caption: str = CLEAN[0]) -> torch.Tensor:
    step = FirstStep(pipe, caption, [0, 1])
    with torch.no_grad():
        return pipe.unet(step.x_T, step.timesteps[0], encoder_hidden_states=step.prompt.embeds.expand(2, -1, -1)).sample


# ------------------------------------------------------------------------------------------------------ blocking


def test_layers_are_found_by_name_and_up_blocks_on_demand(pipe):
    assert [name.split(".")[0] for name in value_layers(pipe.unet)] == ["down_blocks", "mid_block"]
    every = value_layers(pipe.unet, up_blocks=True)
    assert len(every) == sum(name.endswith("attn2.to_v") for name, _ in pipe.unet.named_modules())


def test_fused_projections_are_refused(tiny_pipe):
    unet = copy.deepcopy(tiny_pipe.unet)
    unet.fuse_qkv_projections()
    with pytest.raises(UserError, match="fused"):
        value_layers(unet)


def test_activations_are_the_mean_absolute_values_over_tokens(pipe):
    from train.denoising.families.stable_diffusion import encode_captions

    layers = value_layers(pipe.unet)
    name, layer = next(iter(layers.items()))
    e = encode_captions(pipe, CLEAN[:3])
    expected = (e @ layer.weight.T).abs().mean(dim=1).detach().numpy()
    values = activations(pipe, CLEAN[:3], layers, batch_size=2)
    assert values[:, : widths(layers)[name]] == pytest.approx(expected, rel=1e-4)


def test_masks_and_neurons_are_two_forms_of_one_set(sizes):
    names = list(sizes)
    neurons = {names[0]: [0, 5], names[-1]: [sizes[names[-1]] - 1]}
    assert to_neurons(to_mask(neurons, sizes), sizes) == neurons
    assert count(union([neurons, {names[0]: [5, 7]}])) == 4


def test_blocked_neurons_give_zero_and_nest_and_are_restored(pipe, sizes):
    first, last = list(sizes)[0], list(sizes)[-1]
    layers = value_layers(pipe.unet, up_blocks=True)
    e = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0))
    before, hooks = predict(pipe), {name: len(layer._forward_hooks) for name, layer in layers.items()}
    with blocked(pipe, {first: [1, 3]}):
        with blocked(pipe.unet, {first: [4], last: [0]}):
            assert layers[first](e).abs().amax(dim=(0, 1)).nonzero().flatten().tolist() == [
                unit for unit in range(sizes[first]) if unit not in (1, 3, 4)
            ]
            assert not layers[last](e)[..., 0].any()
        assert layers[last](e)[..., 0].any()
        assert not torch.equal(predict(pipe), before)
    with pytest.raises(RuntimeError, match="on purpose"), blocked(pipe, {first: [1]}):
        raise RuntimeError("on purpose")
    assert torch.equal(predict(pipe), before)
    assert hooks == {name: len(layer._forward_hooks) for name, layer in layers.items()}


def test_neurons_of_another_model_are_refused(pipe, sizes):
    elsewhere = {"elsewhere.attn2.to_v": [0]}
    with pytest.raises(UserError, match="no value layer elsewhere.attn2.to_v"), blocked(pipe, elsewhere):
        pass
    with pytest.raises(UserError, match="no number 9999"), blocked(pipe, {next(iter(sizes)): [9999]}):
        pass


def test_zero_rows_are_blocked_neurons_and_come_back_bit_for_bit(tiny_pipe, sizes, tmp_path):
    from diffusers import StableDiffusionPipeline

    pipe = copy.deepcopy(tiny_pipe)
    neurons = {name: [0, 2] for name in sizes}
    weights = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    with blocked(pipe, neurons):
        expected = predict(pipe)
    save_rows(tmp_path / "rows.safetensors", zero_rows(pipe, neurons))
    assert predict(pipe) == pytest.approx(expected, abs=1e-5)
    pipe.save_pretrained(tmp_path / "edited")
    edited = StableDiffusionPipeline.from_pretrained(tmp_path / "edited")
    assert predict(edited) == pytest.approx(expected, abs=1e-5)
    rows = load_rows(tmp_path / "rows.safetensors")
    restore_rows(edited, rows)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in edited.unet.state_dict().items())
    with pytest.raises(UserError, match="not zero"):
        restore_rows(edited, rows)


def test_adapters_are_blocked_too_but_not_edited(tiny_pipe, sizes):
    from train.denoising.opening.adapters import add_lora
    from train.denoising.opening.config import LoRAConfig

    pipe = copy.deepcopy(tiny_pipe)
    add_lora(pipe, LoRAConfig(rank=2, targets=["to_v"]))
    for name, parameter in pipe.unet.named_parameters():
        if "lora_B" in name:  # an untrained adapter adds nothing
            torch.nn.init.ones_(parameter)
    first = next(iter(sizes))
    layer = value_layers(pipe.unet)[first]
    e = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0))
    assert not torch.allclose(layer(e), layer.base_layer(e))
    with blocked(pipe, {first: [3]}):
        assert not layer(e)[..., 3].any()
    with pytest.raises(UserError, match="adapters"):
        zero_rows(pipe, {first: [3]})


def test_the_control_has_as_many_others_in_every_layer(sizes):
    first, last = list(sizes)[0], list(sizes)[-1]
    neurons = {first: [0, 1, 2], last: list(range(sizes[last] - 2))}
    control = random_neurons(neurons, sizes, seed=0)
    assert {name: len(units) for name, units in control.items()} == {first: 3, last: sizes[last] - 2}
    assert not set(control[first]) & {0, 1, 2}
    assert control == random_neurons(neurons, sizes, seed=0) != random_neurons(neurons, sizes, seed=1)


# ---------------------------------------------------------------------------------------------------- the search


class Known(Blocking):
    """A criterion with a known answer: the score is below the threshold while all ``needed`` are blocked.

    Each seed watches its own part of them, so that a seed alone does not tell. What the gradient foretells is noise;
    unless it is blind, it tells the needed ones from the others.
    """

    def __init__(self, needed, units: int = 200, seeds: int = 4, blind: bool = False):
        self.parts = [list(needed)[seed::seeds] for seed in range(seeds)]
        self.rows, self.threshold, self.units, self.evaluations = list(range(seeds)), 0.5, units, 0
        self.blind = blind

    def measures(self, rows, masks):
        self.evaluations += len(rows)
        return np.array([0.1 if mask[self.parts[row]].all() else 1.0 for row, mask in zip(rows, masks, strict=True)])

    def slope(self, row, mask):
        self.evaluations += 3
        rises = np.random.default_rng(row).uniform(-0.005, 0.01, self.units)
        if not self.blind:
            rises[self.parts[row]] = 0.9
        return 0.1, rises


@pytest.mark.parametrize("needed", [[7], [3, 50, 51, 120, 199], range(0, 200, 3)])
def test_refinement_keeps_what_is_needed_and_nothing_else(needed):
    judge = Known(needed)
    mask = refine(judge, np.ones(200, bool))
    assert np.flatnonzero(mask).tolist() == sorted(needed)
    assert judge.evaluations < 160  # one by one asks 4 seeds for each of 200
    # where the gradient is wrong it takes longer, and comes to the same
    assert np.array_equal(refine(Known(needed, blind=True), np.ones(200, bool)), mask)


def test_selection_takes_the_first_set_that_passes():
    rng = np.random.default_rng(0)
    sizes = {"a": 120, "b": 80}
    z, values = rng.gamma(2, 1, 200), rng.random(200)
    sets = candidate_sets(z, values, sizes)
    for wanted in (0, 3, 11, 70):
        new = np.flatnonzero(sets[wanted] & ~sets[wanted - 1] if wanted else sets[0])
        assert np.array_equal(select(Known(new[:1]), sets), sets[wanted])

    class Never(Known):
        def measures(self, rows, masks):
            return np.ones(len(rows))

    assert select(Never([]), sets) is None


def test_the_sets_grow_by_theta_and_top_k():
    z, values = np.array([4.9, 0.2, 1.5, 0.1, 0.3]), np.array([0.1, 0.9, 0.2, 0.5, 0.4])
    sets = candidate_sets(z, values, {"a": 3, "b": 2})
    assert [np.flatnonzero(mask).tolist() for mask in sets] == [[0, 1, 3], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]
    assert all((later >= earlier).all() for earlier, later in zip(sets, sets[1:], strict=False))


def test_early_rejection_gives_the_verdict_of_the_whole_score(pipe):
    layers = value_layers(pipe.unet, up_blocks=True)
    step = FirstStep(pipe, CLEAN[0], range(6), layers=layers, batch_size=4)
    rng = np.random.default_rng(0)
    masks = [rng.random(sum(widths(layers).values())) < share for share in (0.1, 0.5, 0.9, 1.0)]
    everyone = Blocking(step, range(6), 0.5)
    scores = [everyone.score(mask) for mask in masks]
    assert scores == sorted(scores, reverse=True)
    threshold = (scores[1] + scores[2]) / 2
    judge = Blocking(step, range(6), threshold)
    assert [judge.passes(mask) for mask in masks] == [score < threshold for score in scores]
    before = step.evaluations
    assert not judge.passes(masks[0])
    assert step.evaluations == before + 1


def test_rows_of_a_batch_have_neurons_of_their_own(pipe, sizes):
    layers = value_layers(pipe.unet, up_blocks=True)
    step = FirstStep(pipe, CLEAN[0], range(3), layers=layers, batch_size=2)
    first = next(iter(sizes))
    masks = np.stack([to_mask(neurons, sizes) for neurons in ({}, {first: [0, 1, 2]}, {first: list(range(9))})])
    with torch.no_grad():
        together = step.difference([0, 1, 2], torch.from_numpy(~masks).float())
        for row, mask in enumerate(masks):
            alone = step.difference([row], torch.from_numpy(~mask[None]).float())
            assert alone[0] == pytest.approx(together[row], abs=1e-5)
            with blocked(pipe, to_neurons(mask, sizes)):
                assert step.difference([row])[0] == pytest.approx(together[row], abs=1e-5)


def test_what_is_found_meets_the_criterion_and_no_neuron_could_be_spared(pipe):
    localizer = Localizer(pipe, CLEAN, up_blocks=True)
    seeds = list(range(4))
    full = FirstStep(pipe, CLEAN[0], seeds, layers=localizer.layers)
    everything = np.ones(sum(localizer.sizes.values()), bool)
    lowest = Blocking(full, seeds, 0.0).score(everything)
    threshold = max(lowest + 0.3 * (1 - lowest), 0.05)
    judge = Blocking(full, seeds, threshold)
    mask = refine(judge, everything)
    assert 0 < mask.sum() < len(mask)
    assert judge.score(mask) < threshold
    kept = np.flatnonzero(mask)
    spared = [unit for unit in kept if Blocking(full, seeds, threshold).passes(mask & (np.arange(len(mask)) != unit))]
    assert not spared


def test_localize_tells_of_each_prompt_and_of_what_cannot_be_reached(pipe):
    found = localize(pipe, CLEAN[:2], clean=CLEAN[2:], seeds=4, threshold=0.999)
    assert [prompt.memorized_seeds for prompt in found.prompts] == [[], []]
    assert found.neurons == {} and all(prompt.found for prompt in found.prompts)
    found = localize(pipe, CLEAN[:1], clean=CLEAN[2:], seeds=4, threshold=1e-6)
    (prompt,) = found.prompts
    assert prompt.memorized_seeds == [0, 1, 2, 3]
    assert not prompt.found and prompt.neurons == {} and prompt.blocked_score > 1e-6
    with pytest.raises(UsageError, match="at least two"):
        localize(pipe, CLEAN[:1], clean=CLEAN[2:], seeds=1)


def test_the_threshold_is_mean_plus_deviation_of_the_clean_scores(pipe):
    scores = [FirstStep(pipe, caption, range(3)).scores("similarity").max() for caption in CLEAN[2:]]
    assert localize(pipe, CLEAN[:1], clean=CLEAN[2:], seeds=3).threshold == pytest.approx(
        np.mean(scores) + np.std(scores), rel=1e-5
    )


def test_statistics_need_captions():
    with pytest.raises(UserError, match="at least two"):
        Statistics.of(np.zeros((1, 4), np.float32))
    assert Statistics.of(np.array([[0.0], [2.0]], np.float32)).z(np.array([1 - 2**0.5])) == pytest.approx([1])


def test_slopes_are_the_derivative_of_the_magnitude(pipe):
    localizer = Localizer(pipe, CLEAN, criterion="magnitude", up_blocks=True)
    step = localizer.first_step(CLEAN[0], [0, 1])
    units = sum(localizer.sizes.values())
    slopes = Blocking(step, [0, 1], 0.0, "magnitude").slopes(np.zeros(units, bool))
    unit, h = int(np.abs(slopes).argmax()), 0.05
    values = []
    with torch.no_grad():
        for factor in (1 - h, 1 + h):
            factors = torch.ones(2, units)
            factors[:, unit] = factor
            values.append(float(step.magnitude([0, 1], factors).sum()))
    assert (values[1] - values[0]) / (2 * h) == pytest.approx(slopes[unit], rel=0.05)


def test_by_magnitude_either_a_threshold_or_a_number_decides(pipe):
    options = {"clean": CLEAN[2:], "seeds": 2, "criterion": "magnitude"}
    before = localize(pipe, CLEAN[:1], threshold=1e-6, number=1, **options).prompts[0].score
    (prompt,) = localize(pipe, CLEAN[:1], threshold=0.9 * before, **options).prompts
    assert prompt.found and prompt.blocked_score < 0.9 * before and 0 < count(prompt.neurons) <= prompt.initial
    (prompt,) = localize(pipe, CLEAN[:1], threshold=0.8 * before, number=5, **options).prompts
    assert count(prompt.neurons) == 5 and prompt.blocked_score < before
    with pytest.raises(UsageError, match="set criterion to magnitude"):
        localize(pipe, CLEAN[:1], clean=CLEAN[2:], number=5)


# --------------------------------------------------------------------------------------------------- selectivity


def test_the_sensitivity_is_the_norm_of_the_predictions_change_with_each_neuron(pipe, monkeypatch):
    monkeypatch.setattr("train.memorization.neurons.selectivity.PROBES", 60)
    monkeypatch.setattr("train.memorization.neurons.selectivity.STEPS", (0,))
    layers = value_layers(pipe.unet, up_blocks=True)
    name, layer = list(layers.items())[-1]
    found = sensitivity(pipe, CLEAN[:2], layers, batch_size=2)[-layer.out_features :]
    expected = []
    for unit in range(4):
        changes = []
        for caption in CLEAN[:2]:
            step = FirstStep(pipe, caption, [0, 1], layers=layers)
            factors = torch.ones(2, int(step.splits[-1]))
            moved = factors.clone()
            moved[:, int(step.splits[-2]) + unit] += 1e-2
            with torch.no_grad():
                one, two = (step.eps([0, 1], f, step.prompt, step.timesteps[0]) for f in (factors, moved))
            changes.append(((two - one) / 1e-2).square().sum(dim=(1, 2, 3)).mean())
        expected.append(float(torch.stack(changes).mean().sqrt()))
    assert name in layers and found[:4] == pytest.approx(expected, rel=0.3)


def test_a_neuron_that_no_clean_caption_needs_comes_first(pipe):
    slopes, needed = np.array([1.0, 1.0, 0.5, -1.0], np.float32), np.array([2.0, 0.5, 0.5, 0.0], np.float32)
    assert np.argsort(-per_cost(slopes, needed)).tolist() == [1, 2, 0, 3]
    assert np.isfinite(per_cost(slopes, needed)).all()
    found = localize(pipe, CLEAN[:1], clean=CLEAN[1:], seeds=2, criterion="selective", threshold=0.0, number=5)
    assert count(found.neurons) == 5
