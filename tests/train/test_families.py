"""Every verb on every family: random models of a few thousand weights, through the jobs behind the commands."""

from __future__ import annotations

import inspect
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch
from diffusers import FluxPipeline

from afresh.errors import UserError
from curate.embed.registry import load_embedder
from curate.index.training_index import TrainingIndex
from curate.reading.images import decode_image
from curate.reading.writing import write_shard
from curate.sample_set import load_part
from tests.train import families
from train.denoising.network import network_of
from train.denoising.opening.adapters import add_lora, save_lora
from train.denoising.opening.config import LoRAConfig
from train.denoising.opening.loading import load_pipeline
from train.evaluation.audit import run_audit
from train.evaluation.config import AuditConfig, EvaluateConfig, LocalizeConfig
from train.evaluation.evaluate import run_evaluate
from train.evaluation.localize import run_localize
from train.memorization import score
from train.memorization.config import DetectConfig, ExplainConfig
from train.memorization.detection.job import run_detect
from train.memorization.explaining.job import run_explain
from train.memorization.neurons.files import read_neurons
from train.memorization.thresholds import read_thresholds
from train.sampling.config import SampleConfig
from train.sampling.job.job import run_sample

KINDS = {
    "xl": families.tiny_xl,
    "sd3": families.tiny_sd3,
    "sd3-t5": lambda: families.tiny_sd3(with_t5=True),
    "flux": families.tiny_flux,
    "z-image": families.tiny_z_image,
    "schnell": lambda: families.tiny_flux(guidance_embeds=False),
}
DISTILLED = ["flux", "schnell"]
CROSS_ATTENTION = ["xl"]
JOINT_ATTENTION = ["sd3", "sd3-t5", "flux", "schnell"]


@pytest.fixture(scope="module", params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(kind, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp(kind) / "model"
    KINDS[kind]().save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def _small_flux(monkeypatch) -> None:
    """FLUX's pipeline draws 1024 pixels whatever its transformer is, and these models are tiny."""
    own = FluxPipeline.__init__

    def small(self, *args, **given) -> None:
        own(self, *args, **given)
        self.default_sample_size = 16

    small.__signature__ = inspect.signature(own)
    monkeypatch.setattr(FluxPipeline, "__init__", small)


@pytest.fixture(scope="module")
def samples():
    return load_part("finetune")[:12]


@pytest.fixture(scope="module")
def data(samples, tmp_path_factory) -> Path:
    """Prompts with labels and originals, shards, and the index of their images."""
    folder = tmp_path_factory.mktemp("data")
    layout, n = load_embedder("layout"), len(samples)
    TrainingIndex.build(
        embeddings=layout.embed([decode_image(sample.image) for sample in samples]),
        captions=[sample.caption for sample in samples],
        shards=["training.tar"] * n,
        keys=[sample.key for sample in samples],
        kept=np.ones(n, bool),
        group=np.arange(n),
        embedder_name=layout.name,
    ).save(folder / "index")
    for name, some in (("training", samples[:6]), ("held_out", samples[6:])):
        write_shard(str(folder / f"{name}.tar"), [(sample.key, sample.members) for sample in some])
    rows = []
    for number, sample in enumerate(samples[:4]):
        decode_image(sample.image).save(folder / f"{number}.png")
        rows.append({"caption": sample.caption, "label": int(number < 2), "image": f"{number}.png"})
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def test_detect_calibrates_and_sample_flags_by_it(kind, model, data, tmp_path):
    prompts = str(data / "prompts.jsonl")
    signals = ["magnitude", "consistency", "agreement", "anisotropy"]
    found = run_detect(
        DetectConfig(
            model=model,
            prompts=prompts,
            out=str(tmp_path / "d.parquet"),
            steps=2,
            num_inference_steps=4,
            seeds=2,
            signals=signals,
            calibrate=0.5,
            device="cpu",
            bootstrap=10,
        )  # fmt: skip
    )
    assert found["prompts"] == 4
    table = parquet.read_table(tmp_path / "d.parquet").to_pandas()
    assert len(table) == 8 and (table[signals].notna().all()).all() and (table["magnitude"] > 0).all()
    assert read_thresholds(Path(model) / "memorization.json").by_band[9] is not None

    config = SampleConfig(
        model=model, prompts=prompts, out=str(tmp_path / "s"), index=str(data / "index"), steps=3, seeds=1,
        guidance="none" if kind in DISTILLED else "amg", device="cpu",
    )  # fmt: skip
    run_sample(config)
    drawn = parquet.read_table(tmp_path / "s" / "samples.parquet").to_pandas()
    assert len(drawn) == 4 and drawn["similarity"].notna().all()
    assert drawn["memorized"].notna().all() == (kind not in DISTILLED)  # one pass a step, without its counterpart


@pytest.mark.parametrize("guidance", ["amg-strong", "prompt", "tokens", "anisotropy", "attention", "opposite", "noise"])
def test_sample_with_the_rivals_that_make_sense(kind, model, data, tmp_path, guidance):
    config = SampleConfig(
        model=model, prompts=str(data / "prompts.jsonl"), out=str(tmp_path / "s"), index=str(data / "index"),
        guidance=guidance, steps=2, seeds=1, device="cpu",
    )  # fmt: skip
    if kind in DISTILLED:
        with pytest.raises(UserError, match=r"FLUX.1 .*is distilled"):
            run_sample(config)
        if kind == "schnell" or guidance == "attention":
            return
        config = replace(config, negative_prompt="blurred")  # true guidance
    if guidance == "attention" and kind not in CROSS_ATTENTION:
        with pytest.raises(UserError, match=r"joint attention takes .*weights of tokens"):
            run_sample(config)
        return
    run_sample(config)
    assert len(list((tmp_path / "s").glob("*-s?.png"))) == 4


def test_explain_joins_the_tokens_of_all_encoders_to_words(model, tmp_path):
    summary = run_explain(
        ExplainConfig(
            model=model,
            prompt="grinning face, smiling",
            out=str(tmp_path / "e.html"),
            steps=1,
            num_inference_steps=3,
            seeds=1,
            words=1,
            replacements=1,
            device="cpu",
        )  # fmt: skip
    )
    (found,) = summary["explanations"]
    words = {word["word"]: word["significance"] for word in found["words"]}
    assert set(words) == {"grinning", "face", ",", "smiling"} and all(value > 0 for value in words.values())
    assert found["changes"]


def test_audit_and_evaluate(kind, model, data, tmp_path):
    config = AuditConfig(
        model=model, prompts=str(data / "prompts.jsonl"), out=str(tmp_path / "a"), search_steps=2, device="cpu",
        images=2, noises=1, seeds=1, steps=2, measure_every=1, bootstrap=10, index=str(data / "index"),
    )  # fmt: skip
    run_audit(config)
    other = "rejection" if kind in DISTILLED else "amg"
    assert (tmp_path / "a" / "report.html").exists()
    (data / "p.yaml").write_text(
        f"models: {{own: {model}}}\nsettings: [{{model: own}}, {{model: own, guidance: {other}}}]\n"
        "prompts: {repeated: prompts.jsonl}\nindex: index\ntraining: [training.tar]\nheld_out: [held_out.tar]\n"
        "seeds: 1\nsteps: 2\n"
    )
    out = tmp_path / "out"
    summary = run_evaluate(EvaluateConfig(protocol=str(data / "p.yaml"), out=str(out), batch_size=2, device="cpu"))
    assert [(row["guidance"], row["images"]) for row in summary["rows"]] == [("none", 4), (other, 4)]


def test_detect_and_audit_take_a_base_and_its_adapters(model, data, tmp_path):
    pipe = load_pipeline(model)
    add_lora(pipe, LoRAConfig(rank=2), seed=1)
    for name, parameter in network_of(pipe).named_parameters():
        if "lora_B" in name:  # as if they had been trained
            torch.nn.init.normal_(parameter, std=0.3)
    save_lora(pipe, tmp_path / "lora")

    def magnitudes(name: str, **options: str) -> list[float]:
        config = DetectConfig(
            model=model, prompts=str(data / "prompts.jsonl"), out=str(tmp_path / name), steps=1, num_inference_steps=2,
            seeds=1, device="cpu", bootstrap=10, **options,
        )  # fmt: skip
        run_detect(config)
        return parquet.read_table(config.out)["magnitude"].to_pylist()

    adapted = magnitudes("adapted.parquet", lora=str(tmp_path / "lora"))
    fused = load_pipeline(model, lora=str(tmp_path / "lora"))
    captions = [json.loads(line)["caption"] for line in (data / "prompts.jsonl").read_text().splitlines()]
    expected = score(fused, captions, steps=1, num_inference_steps=2, seeds=1).per_prompt()
    assert adapted == pytest.approx(expected.tolist(), rel=1e-4)
    assert np.abs(np.array(adapted) - magnitudes("base.parquet")).max() > 1e-3
    config = AuditConfig(
        model=model, lora=str(tmp_path / "lora"), prompts=str(data / "prompts.jsonl"), out=str(tmp_path / "a"),
        search_steps=1, device="cpu", images=1, noises=1, seeds=1, steps=2, measure_every=1, bootstrap=10,
        index=str(data / "index"),
    )  # fmt: skip
    run_audit(config)
    assert (tmp_path / "a" / "report.html").exists()


def test_localize_finds_value_neurons_of_cross_attention_and_of_the_texts_stream(kind, model, data, tmp_path):
    config = LocalizeConfig(
        model=model, prompts=str(data / "prompts.jsonl"), out=str(tmp_path / "n.json"), seeds=2, criterion="magnitude",
        threshold=0.4, number=5, up_blocks=True, image_seeds=1, others=1, steps=2, device="cpu",
        edited_model=str(tmp_path / "edited"),
    )  # fmt: skip
    if kind not in CROSS_ATTENTION + JOINT_ATTENTION:
        with pytest.raises(UserError, match="no cross-attention"):
            run_localize(config)
        return
    run_localize(config)
    together, own = read_neurons(config.out)
    assert together and len(own) == 2
    suffix = "attn2.to_v" if kind in CROSS_ATTENTION else "attn.add_v_proj"
    assert all(name.endswith(suffix) for name in together)
    assert (tmp_path / "edited" / "model_index.json").exists()
