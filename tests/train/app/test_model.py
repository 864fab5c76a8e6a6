"""What needs a model: one for many clients, stopped by its own; magnitudes, images, neurons."""

from __future__ import annotations

import threading

import pytest
import torch

from afresh.errors import UsageError
from train.app.bench import Bench, StoppedError
from train.app.config import AppConfig
from train.app.neurons import PromptNeurons, label, strip, switched
from train.app.prompts import Reader, Scale, draw, settings
from train.denoising.network import network_of
from train.memorization import explain, score


@pytest.fixture(scope="module")
def config(sample_model, curated) -> AppConfig:
    out, shards = curated
    return AppConfig(str(sample_model), str(out), shards=[shards], steps=2, seeds=2, image_steps=3, scale=4.0)


@pytest.fixture(scope="module")
def bench(config) -> Bench:
    return Bench(config)


def test_a_reading_has_the_magnitude_that_score_gives_clean_prompts(bench, config):
    scale = Scale(["owl", "a red car", "grapes"], "clean prompts")
    reader = Reader(bench, config, scale)
    reader.score_clean()
    trajectory = {"steps": 2, "seeds": 2, "guidance_scale": 4.0}
    expected = score(bench.opened.pipe, scale.captions, **trajectory).per_prompt()
    assert scale.magnitudes == pytest.approx(sorted(expected.tolist()))
    found = reader.read("me", "a red car, owl", [1])
    alone = explain(bench.opened.pipe, "a car, owl", **trajectory)[0]
    assert found["asked"] == "a car, owl" and found["magnitude"] == pytest.approx(alone.magnitude)
    assert [word["significance"] for word in found["words"] if word["significance"] is not None] == pytest.approx(
        [word.significance for word in alone.words() if not word.punctuation]
    )
    assert found["memorized"] is None  # the model has no threshold
    with pytest.raises(UsageError):
        reader.read("me", "owl", [0])  # nothing is left


def test_watching_leaves_every_pixel_and_gives_the_similarity_of_each_step(bench):
    plain, guided = settings(bench.sampling, ["attention"], 2.0, 3, 4.0)
    watched = draw(bench, "me", plain, "owl", 7)
    alone = draw(bench, "me", bench.sampling, "owl", 7)
    assert watched["image"].tobytes() == alone["image"].tobytes()
    assert [row["similarity"] is not None for row in watched["trace"]] == [True] * 3
    assert watched["nearest_key"] == alone["nearest_key"] and watched["copied"] == (watched["similarity"] > 0.5)
    other = draw(bench, "me", guided, "owl", 7)
    assert other["image"].tobytes() != watched["image"].tobytes() and other["trace"][0]["similarity"] is not None
    with pytest.raises(UsageError, match="seed"):
        draw(bench, "me", plain, "owl", -1)


def test_a_client_stops_what_is_its_own_at_the_next_evaluation(bench):
    calls = []

    def count(*_: object) -> None:
        calls.append(None)
        if len(calls) == 2:
            assert bench.stop("another") == 0
            assert bench.stop("me") == 1

    with bench.alone("me") as pipe:
        network = network_of(pipe)
    handle = network.register_forward_hook(count)
    try:
        with pytest.raises(StoppedError):
            draw(bench, "me", bench.sampling, "owl", 0)
        assert len(calls) == 2
        assert draw(bench, "me", bench.sampling, "owl", 0)["image"] is not None  # as if nothing had been
        assert len(calls) == 2 + 3
    finally:
        handle.remove()
    assert bench.waiting == 0 and not network._forward_pre_hooks


def test_who_waits_for_the_model_can_be_stopped_too(bench):
    told: list[object] = []

    def ask() -> None:
        try:
            draw(bench, "waiting", bench.sampling, "owl", 0)
        except StoppedError as error:
            told.append(error)

    with bench.alone("first"):
        thread = threading.Thread(target=ask)
        thread.start()
        while not bench.stop("waiting"):
            pass
    thread.join(60)
    assert len(told) == 1 and bench.waiting == 0


def test_clients_have_the_model_one_after_the_other(bench):
    images: dict[int, bytes] = {}

    def ask(seed: int) -> None:
        images[seed] = draw(bench, f"client {seed}", bench.sampling, "owl", seed)["image"].tobytes()

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert images == {seed: draw(bench, "me", bench.sampling, "owl", seed)["image"].tobytes() for seed in range(4)}


def test_neurons_of_a_prompt_are_found_switched_and_blocked(bench):
    neurons = PromptNeurons(bench, ["owl", "grapes", "a red car"], seeds=2)
    sizes = neurons.sizes("me")
    found = neurons.find("me", "cat face", 0.05)
    shown = strip(sizes, found, found)
    assert shown["found"] == shown["blocked"] == round(0.05 * shown["all"])
    config = bench.sampling
    whole, without = (neurons.draw("me", config, "cat face", 0, off)["image"] for off in ({}, found))
    assert whole.tobytes() != without.tobytes()
    assert neurons.draw("me", config, "cat face", 0, {})["image"].tobytes() == whole.tobytes()
    with pytest.raises(UsageError, match="clean captions"):
        PromptNeurons(bench, []).find("me", "cat face", 0.05)
    assert all(parameter.grad is None for parameter in bench.opened.pipe.unet.parameters())
    assert torch.is_grad_enabled()


def test_switching_a_layer_or_a_neuron():
    layer = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_v"
    found = {layer: [3, 5], "mid_block.attentions.0.transformer_blocks.0.attn2.to_v": [1]}
    assert switched(found, {}, layer) == {layer: [3, 5]}
    assert switched(found, {layer: [3]}, layer) == {layer: [3, 5]}
    assert switched(found, {layer: [3, 5]}, layer) == {}
    assert switched(found, {layer: [3]}, layer, 3) == {} and switched(found, {}, layer, 5) == {layer: [5]}
    for wrong in (("nowhere", None), (layer, 4)):
        with pytest.raises(UsageError):
            switched(found, {}, *wrong)
    assert [label(one) for one in found] == ["down 1.0", "mid 0"]
