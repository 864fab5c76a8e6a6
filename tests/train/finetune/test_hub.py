"""Uploading the result: what is checked first, and what becomes of a failure. The hub itself is replaced."""

from __future__ import annotations

import json

import huggingface_hub
import pytest

from afresh.errors import UsageError, UserError
from tests.train.finetune.runs import settings
from train.finetune.hub import check_hub, push_model
from train.finetune.loop import run_finetune


class Hub:
    """What is asked of ``huggingface_hub.HfApi``."""

    calls: list[tuple]
    fails = False

    def create_repo(self, repo_id, **options):
        self.calls.append(("create", repo_id, options))

    def upload_folder(self, *, repo_id, folder_path, commit_message, path_in_repo=None):
        if self.fails:
            raise OSError("the connection was reset\nby peer")
        self.calls.append(("upload", repo_id, folder_path, *([path_in_repo] if path_in_repo else [])))

    def upload_file(self, *, repo_id, path_or_fileobj, path_in_repo, commit_message):
        self.calls.append(("file", repo_id, path_or_fileobj, path_in_repo))


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(Hub, "calls", [], raising=False)
    return Hub


def test_a_bad_name_and_a_missing_token_are_found_before_the_training(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(UsageError, match="hf auth login"):
        check_hub("someone/model")
    for name in ("a/b/c", "someone/my model"):
        with pytest.raises(UsageError, match="push_to_hub"):
            check_hub(name)


def test_a_failed_upload_keeps_the_model_and_the_same_command_tries_again(model, shards, tmp_path, hub, monkeypatch):
    config = settings(model, shards, tmp_path / "run", steps=1, push_to_hub="someone/model")
    monkeypatch.setattr(Hub, "fails", True)
    with pytest.raises(UserError, match="someone/model: the connection was reset .*same command tries again"):
        run_finetune(config)
    assert (tmp_path / "run" / "model" / "model_index.json").is_file()
    monkeypatch.setattr(Hub, "fails", False)
    hub.calls.clear()
    assert run_finetune(config)["hub"] == "https://huggingface.co/someone/model"
    assert hub.calls == [
        ("create", "someone/model", {"repo_type": "model", "private": True, "exist_ok": True}),
        ("upload", "someone/model", str(tmp_path / "run" / "model")),
    ]
    run_finetune(config)
    assert len(hub.calls) == 2  # once is enough
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["hub"].endswith("someone/model")


def test_adapters_and_the_single_file_are_uploaded_too(tmp_path, hub):
    for name in ("model", "lora"):
        (tmp_path / name).mkdir()
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    push_model(tmp_path, "someone/model")
    assert hub.calls[1:] == [
        ("upload", "someone/model", str(tmp_path / "model")),
        ("upload", "someone/model", str(tmp_path / "lora"), "lora"),
        ("file", "someone/model", str(tmp_path / "model.safetensors"), "model.safetensors"),
    ]
