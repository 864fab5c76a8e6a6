"""The check of a machine: what it tells of what works, of what differs and of what fails, and what follows from it."""

from __future__ import annotations

import json

import pytest
import torch

from afresh.errors import UsageError, UserError
from train.cli import main
from train.machine import facts, probes
from train.machine.config import CheckConfig
from train.machine.findings import Absent, Finding, Findings, attempt
from train.machine.job import advice, run_check
from train.sample_model.small import tiny_pipeline

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny_pipeline().save_pretrained(folder)
    return str(folder)


def raising(error: Exception):
    def probe():
        raise error

    return probe


def test_what_a_probe_raises_is_a_finding_too():
    results = {
        attempt("part", "what", probe).result
        for probe in (raising(Absent("no GPU")), raising(ImportError("no module")))
    }
    assert results == {"not here"}
    failed = attempt("part", "what", raising(RuntimeError("out of luck")))
    assert failed.result == "fails" and "out of luck" in failed.detail
    assert attempt("part", "what", lambda: "12 GB") == Finding("part", "what", "works", "12 GB")


@pytest.mark.parametrize(("result", "code"), [("works", 0), ("not here", 0), ("differs", 1), ("fails", 1)])
def test_the_exit_code_says_whether_all_that_is_here_works(result, code):
    found = Findings([Finding("a", "b", "works"), Finding("a", "c", result, "x|y", 0.5)], {"compile": False})
    assert found.exit_code == code
    assert "compile: false" in found.view() and f"| a | c | {result} | x/y | 0.5 |" in found.markdown()


def steps(**seconds: float) -> list[Finding]:
    return [Finding("training step", what, "works", "", taken) for what, taken in seconds.items()]


def attended(**seconds: float) -> list[Finding]:
    return [Finding("attention", what.replace("_", ", "), "works", "", taken) for what, taken in seconds.items()]


def test_a_precision_is_advised_where_it_pays_and_agrees():
    assert advice(steps(no=1.0, bf16=0.5, fp16=0.4), "cuda")["mixed_precision"] == "fp16"
    assert advice(steps(no=1.0, bf16=0.95), "cpu")["mixed_precision"] == "no"
    wrong = [*steps(no=1.0, bf16=0.5), Finding("training step", "fp16", "differs", "", 0.1)]
    assert advice(wrong, "cuda")["mixed_precision"] == "bf16"
    assert advice([], "cpu")["mixed_precision"] == "no"


def test_xformers_and_compilation_are_advised_where_they_pay_in_the_precision_that_is():
    fast = attended(flash_bfloat16=1.0, xformers_bfloat16=0.5, flash_float32=1.0, xformers_float32=2.0)
    assert advice([*steps(no=1.0, bf16=0.5), *fast], "cuda")["attention"] == "xformers"
    assert advice([*steps(no=1.0, bf16=1.0), *fast], "cuda")["attention"] == "auto"
    assert advice(steps(no=1.0, compiled=0.5), "cuda")["compile"] is True
    assert advice(steps(no=1.0, compiled=0.95), "cuda")["compile"] is False


def test_a_step_agrees_with_itself_and_a_wrong_reference_is_noticed(model):
    step = probes.Step(model, CPU, 2)
    loss, gradient = step.take("no")
    assert probes._taken(step, "no", loss, gradient).result == "works"
    assert probes._taken(step, "bf16", loss, gradient).result == "works"
    assert probes._taken(step, "no", 2 * loss, gradient).result == "differs"
    assert probes._taken(step, "no", loss, -gradient).result == "differs"
    with pytest.raises(Absent, match="fp16 needs a GPU"):
        probes._taken(step, "fp16", loss, gradient)


def test_attention_is_compared_kernel_by_kernel():
    found = {one.what: one for one in probes.attention(CPU, large=False)}
    assert found["math, float32"].result == "works" and found["math, float32"].seconds
    assert found["cudnn, float32"].result == "not here" and "no kernel" in found["cudnn, float32"].detail
    assert {one.result for one in found.values()} <= {"works", "not here"}


def test_an_image_and_a_search_are_those_of_the_cpu(model):
    assert [one.result for one in probes.drawing(model, CPU)] == ["works", "works"]


def test_two_processes_add_up_each_others_numbers():
    found = {one.what: one for one in facts.processes()}
    assert found["gloo"].result == "works" and "2 processes" in found["gloo"].detail
    assert found["nccl"].result == ("works" if torch.cuda.is_available() else "not here")


def test_a_package_that_is_needed_and_missing_fails_and_an_optional_one_is_not_here(monkeypatch):
    monkeypatch.setattr(facts, "NEEDED", ("no-such-package",))
    monkeypatch.setattr(facts, "OPTIONAL", ("nor-this-one",))
    found = {one.what: one.result for one in facts.versions()}
    assert (found["no-such-package"], found["nor-this-one"]) == ("fails", "not here")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_its_check_fails_in_one_line(capsys):
    with pytest.raises(UserError, match="sees no GPU here"):
        run_check(CheckConfig(gpu=True))
    assert main(["check", "--gpu"]) == 1  # a switch needs no value
    err = capsys.readouterr().err
    assert err.startswith("error: gpu: torch") and err.count("\n") == 1
    with pytest.raises(UsageError, match="device nowhere"):
        run_check(CheckConfig(device="nowhere"))


@pytest.mark.slow
def test_the_whole_check_ends_with_a_table_and_a_config(model, tmp_path, capsys):
    assert main(["check", "--model", model, "--out", str(tmp_path / "found.md"), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert {"versions", "devices", "disk", "processes", "attention", "sampling", "index", "training step"} == {
        row["part"] for row in printed["findings"]
    }
    assert printed["config"].keys() == {"mixed_precision", "attention", "compile", "workers"}
    assert "```yaml\nmixed_precision:" in (tmp_path / "found.md").read_text()
