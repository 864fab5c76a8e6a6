"""What decides an image beside its prompt and seed, as one digest."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from train.memorization.neurons.files import read_neurons
from train.sampling.config import SampleConfig
from train.sampling.pipelines.session import fingerprint
from train.sampling.terms import registry


def settings_digest(config: SampleConfig) -> str:
    """Digest of everything that decides an image but its prompt and seed: options, weights and index."""
    from curate.index.training_index import index_folder

    names = [
        "model",
        "guidance",
        "steps",
        "scale",
        "scheduler",
        "negative_prompt",
        "height",
        "width",
        "dtype",
    ]
    decisive: dict[str, Any] = {name: getattr(config, name) for name in names}
    decisive["model"] = [config.model, fingerprint(Path(config.model))]
    for name in ("revision", "variant", "model_config"):
        if getattr(config, name):
            decisive[name] = getattr(config, name)
    if config.lora:
        decisive["lora"] = [config.lora, fingerprint(Path(config.lora))]
    if config.index:
        decisive["index"] = fingerprint(index_folder(config.index))
    if config.never_above is not None:
        decisive["never_above"] = [config.never_above, config.tries]
        if config.judge_index:
            decisive["judge_index"] = fingerprint(index_folder(config.judge_index))
    if config.neurons:
        decisive["neurons"] = [config.neurons_of, *read_neurons(config.neurons)]
    decisive["settings"] = registry.settings(config)
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:16]
