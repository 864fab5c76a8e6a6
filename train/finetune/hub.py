"""Uploading the result to the Hugging Face hub. Only the checks run in the test suite; the upload needs the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from afresh.errors import UsageError, UserError, reason


def check_hub(repo_id: str) -> None:
    """See, without asking the hub, that a model could be uploaded under this name.

    Raises:
        UsageError: the name is no repository's, or there is no token to write with.
    """
    from huggingface_hub import get_token
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UsageError(f"push_to_hub: {error}") from error
    if get_token() is None:
        raise UsageError("push_to_hub: no token to write with: run `hf auth login`, or set HF_TOKEN")


def push_model(out: Path, repo_id: str) -> str:
    """Upload a run's ``model``, and its ``lora`` and ``model.safetensors`` where there are some; returns the address.

    A repository that does not exist is made, private. The pipeline lies at its top, the adapters in ``lora``.

    Raises:
        UserError: the hub refused, or was out of reach; says how to repeat it.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repo_id, repo_type="model", private=True, exist_ok=True)
        about: dict[str, Any] = {"repo_id": repo_id, "commit_message": "Fine-tuned with Afresh"}
        api.upload_folder(folder_path=str(out / "model"), **about)
        if (out / "lora").is_dir():
            api.upload_folder(folder_path=str(out / "lora"), path_in_repo="lora", **about)
        if (file := out / "model.safetensors").is_file():
            api.upload_file(path_or_fileobj=str(file), path_in_repo=file.name, **about)
    except Exception as error:  # the hub's own errors, requests', the network's: for the user one thing
        raise UserError(
            f"push_to_hub: {repo_id}: {reason(error)} (the model is in {out / 'model'}; the same command tries again)"
        ) from error
    return f"https://huggingface.co/{repo_id}"

