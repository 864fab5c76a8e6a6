"""What decides an image beside its prompt and seed, as one digest; and options that do not go together."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from afresh.errors import UsageError
from train.memorization.neurons.files import read_neurons
from train.sampling.config import SampleConfig
from train.sampling.pipelines.session import fingerprint
from train.sampling.terms import registry


def check_settings(config: SampleConfig) -> None:
    for option, least in (("seeds", 1), ("steps", 1), ("batch_size", 1), ("first_seed", 0), ("tries", 1)):
        if getattr(config, option) < least:
            raise UsageError(f"--{option} is {getattr(config, option)}: it is at least {least}")
    registry.check(config)
    registry.automatic(config)
    if registry.needs_index(config.guidance) and not config.index:
        raise UsageError(f"--guidance {config.guidance} needs --index: the output folder of curate dedup")
    if config.embedder and not config.index:
        raise UsageError("--embedder needs --index")
    if config.never_above is not None and not config.index:
        raise UsageError("--never_above needs --index: the output folder of curate dedup")
    if config.never_above is not None and not -1 <= config.never_above <= 1:
        raise UsageError(f"--never_above is {config.never_above}: similarities lie between -1 and 1")
    if config.judge_index and config.never_above is None:
        raise UsageError("--judge_index is of --never_above: give that too")


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
