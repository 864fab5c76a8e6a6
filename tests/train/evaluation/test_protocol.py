"""Protocol files and presets: paths, and mistakes that are named with their key."""

from __future__ import annotations

from pathlib import Path

import pytest

from afresh.errors import UsageError
from train.evaluation.config import EvaluateConfig
from train.evaluation.protocol import presets, protocol_of, read_preset, read_protocol
from train.sampling.terms import registry as terms

PROTOCOL = """
models: {raw: models/raw, hub: someone/model}
settings: [{model: raw}, {model: raw, guidance: amg}, {model: hub}]
prompts: {repeated: repeated.txt}
index: curated
training: [a/*.tar]
held_out: [b.tar]
"""


def test_paths_of_a_protocol_are_relative_to_its_file(tmp_path):
    (tmp_path / "models" / "raw").mkdir(parents=True)
    (tmp_path / "p.yaml").write_text(PROTOCOL + "scale: 5\n")
    protocol = read_protocol(tmp_path / "p.yaml")
    assert protocol.models == {"raw": str(tmp_path / "models/raw"), "hub": "someone/model"}
    assert protocol.prompts == {"repeated": str(tmp_path / "repeated.txt")}
    assert (protocol.index, protocol.training) == (str(tmp_path / "curated"), [str(tmp_path / "a/*.tar")])
    assert [(s.model, s.guidance) for s in protocol.settings] == [
        ("raw", "none"),
        ("raw", "amg"),
        ("hub", "none"),
    ]
    assert protocol.scale == 5.0


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (("index: curated", "indx: curated"), "unknown key 'indx'"),
        (("prompts: {repeated: repeated.txt}", ""), "'prompts' is missing"),
        (("index: curated", "index: 3"), "index is 3, expected text"),
        (("training: [a/*.tar]", "training: a.tar"), "training is 'a.tar', expected a list"),
        (("training: [a/*.tar]", "training: [1]"), "expected text in every place"),
        (("prompts: {repeated: repeated.txt}", "prompts: {}"), "prompts is empty"),
        (("held_out: [b.tar]", "labels: {other: 1}"), "labels: no prompts 'other'"),
        (("held_out: [b.tar]", "labels: {repeated: yes}"), "expected a whole number in every place"),
        (("held_out: [b.tar]", "resamples: -1"), "resamples is -1"),
        (("held_out: [b.tar]", "preset: sd14"), "preset 'sd14' is not known; choose of membench, quickstart"),
        (("{model: hub}", "{model: other}"), r"settings\[2\]: no model 'other'"),
        (("{model: hub}", "{model: hub, guide: amg}"), r"settings\[2\]: unknown key 'guide'"),
        (("held_out: [b.tar]", "held_out: [b.tar]\nseeds: many"), "seeds is 'many', expected a whole number"),
        (("models:", "loras: {raw: a, tuned: b}\nmodels:"), "loras: no model 'tuned'"),
        (("models:", "models: ["), "not readable as YAML"),
    ],
)
def test_a_wrong_protocol_is_named_with_its_key(tmp_path, change, complaint):
    (tmp_path / "p.yaml").write_text(PROTOCOL.replace(*change))
    with pytest.raises(UsageError, match=complaint) as caught:
        read_protocol(tmp_path / "p.yaml")
    assert str(tmp_path / "p.yaml") in str(caught.value)


def test_a_missing_protocol_is_named(tmp_path):
    with pytest.raises(UsageError, match="no such protocol"):
        read_protocol(tmp_path / "p.yaml")


# --------------------------------------------------------------------------------------------------- presets


@pytest.mark.parametrize("name", presets())
def test_every_preset_is_whole_and_names_guidances_that_there_are(name, tmp_path):
    protocol = read_preset(name, tmp_path)
    assert {setting.model for setting in protocol.settings} <= protocol.models.keys()
    assert all(terms.names(setting.guidance) is not None for setting in protocol.settings)
    assert any(setting.guidance == "none" for setting in protocol.settings)
    assert all(Path(file).parent.is_relative_to(tmp_path) for file in protocol.prompts.values())


def test_a_preset_takes_only_the_weights_that_lie_in_its_folder(tmp_path):
    assert read_preset("sd14-500", tmp_path).weights == {}
    (tmp_path / "sscd_disc_large.torchscript.pt").write_bytes(b"")
    protocol = read_preset("sd14-500", tmp_path)
    assert protocol.weights == {"sscd": str(tmp_path / "sscd_disc_large.torchscript.pt")}
    assert protocol.held_out == []
    (tmp_path / "held_out").mkdir()
    assert read_preset("sd14-500", tmp_path).held_out == [str(tmp_path / "held_out")]


def test_a_files_keys_replace_those_of_its_preset_and_each_has_its_own_folder(tmp_path):
    (tmp_path / "p.yaml").write_text("preset: membench\ndata: lists\nseeds: 3\nmodels: {sd14: mine}\n")
    (tmp_path / "mine").mkdir()
    protocol = read_protocol(tmp_path / "p.yaml")
    assert protocol.prompts == {"memorized": str(tmp_path / "lists" / "SD1_final.csv")}
    assert (protocol.seeds, protocol.steps, protocol.models) == (3, 50, {"sd14": str(tmp_path / "mine")})
    assert protocol.preset == "membench"


def test_a_job_takes_a_file_or_a_preset_and_a_model_in_the_place_of_the_presets(tmp_path):
    protocol = protocol_of(EvaluateConfig(out="o", preset="sd14-500", data=str(tmp_path), model="mine"))
    assert protocol.models == {"sd14": "mine"}
    with pytest.raises(UsageError, match="several models"):
        protocol_of(EvaluateConfig(out="o", preset="quickstart", model="mine"))
    for config in (EvaluateConfig(out="o"), EvaluateConfig(out="o", protocol="p.yaml", preset="membench")):
        with pytest.raises(UsageError, match="either --protocol FILE or --preset NAME"):
            protocol_of(config)
