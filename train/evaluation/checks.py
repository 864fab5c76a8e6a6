"""What can be seen to be wrong with a job's settings and files before torch or a model is loaded."""

from __future__ import annotations

from pathlib import Path

from afresh.errors import UsageError, UserError
from curate.index.training_index import check_index
from train.denoising.opening.files import check_device, check_model, check_openable
from train.evaluation.config import AuditConfig, EvaluateConfig, LocalizeConfig
from train.evaluation.inputs import refuse_missing
from train.evaluation.protocol import protocol_of
from train.memorization.neurons.files import read_neurons
from train.prompts import Prompt, read_prompts

REMOVED = "removed_rows.safetensors"
"""What an edited model's folder keeps of the rows that were taken out."""


# ------------------------------------------------------------------------------------------------------- localize


def check_localize(config: LocalizeConfig) -> None:
    """Check ``train localize``: its options, the prompts, the model's files.

    Raises:
        UserError: a setting is out of its range, or a file is missing or malformed.
    """
    prompts_to_localize(config)
    if config.edited_model:
        check_edited(Path(config.edited_model))
    check_openable(config)


def prompts_to_localize(config: LocalizeConfig) -> tuple[list[Prompt], list[Prompt]]:
    """The prompts, each caption once, and the clean ones, the options having been checked.

    Raises:
        UserError: an option is out of its range, a file cannot be read, or has no prompts of the kind.
    """
    if Path(config.out).suffix != ".json":
        raise UsageError(f"out is {config.out!r}: expected a file that ends in .json")
    for option, least in (("seeds", 2), ("first_seed", 0), ("image_seeds", 1), ("clean_captions", 2), ("others", 0)):
        if getattr(config, option) < least:
            raise UsageError(f"--{option} is {getattr(config, option)}: it is at least {least}")
    if config.threshold < 0 or (config.criterion == "similarity" and config.threshold >= 1):
        raise UsageError(f"--threshold is {config.threshold}: a similarity is between 0 and 1, a magnitude above 0")
    everything = read_prompts(config.prompts)
    prompts = list({prompt.caption: prompt for prompt in everything if prompt.label != 0}.values())
    clean = read_prompts(config.clean) if config.clean else [prompt for prompt in everything if prompt.label == 0]
    clean = clean[: config.clean_captions]
    if not prompts:
        raise UserError(f"{config.prompts}: every prompt has label 0, so there is none to localize")
    if len(clean) < 2:
        raise UsageError("--clean is needed: a file of captions that are not memorized (or prompts of label 0)")
    return prompts, clean


def check_edited(folder: Path) -> None:
    """See that an edited model can be written there, or was already.

    Raises:
        UserError: the folder holds something else.
    """
    if folder.exists() and any(folder.iterdir()) and not (folder / REMOVED).is_file():
        raise UserError(f"{folder}: holds something else already: choose another --edited_model")


# ---------------------------------------------------------------------------------------------------------- audit


def check_audit(config: AuditConfig) -> None:
    """Check ``train audit``: its options, the prompts and their images, the neurons, the index, the model's files.

    Raises:
        UserError: a setting is out of its range, or a file is missing or malformed.
    """
    for prompts in images_to_audit(config).values():
        for prompt in prompts:
            if prompt.image is not None and not prompt.image.is_file():
                raise UserError(f"{prompt.image}: the image of {prompt.caption!r} is missing")
    if config.neurons:
        read_neurons(config.neurons)
    if config.index:
        check_index(config.index)
    check_openable(config)


def images_to_audit(config: AuditConfig) -> dict[str, list[Prompt]]:
    """The prompts with images, the options having been checked: ``training``, and ``control`` where there are some.

    Raises:
        UserError: an option is out of its range, or a file cannot be read or names no image.
    """
    for option, least in (
        ("images", 0),
        ("search_steps", 1),
        ("noises", 1),
        ("restarts", 1),
        ("measure_every", 1),
        ("seeds", 1),
        ("first_seed", 0),
        ("search_seed", 0),
        ("steps", 1),
        ("batch_size", 1),
        ("bootstrap", 0),
    ):
        if getattr(config, option) < least:
            raise UsageError(f"{option} is {getattr(config, option)}: expected at least {least}")
    if not config.learning_rate > 0:
        raise UsageError(f"learning_rate is {config.learning_rate}: expected more than 0")
    prompts = read_prompts(config.prompts)
    chosen = {
        "training": [prompt for prompt in prompts if prompt.label != 0],
        "control": [prompt for prompt in prompts if prompt.label == 0],
    }
    if config.control:
        chosen["control"] = read_prompts(config.control)
    chosen = {kind: [prompt for prompt in some if prompt.image is not None] for kind, some in chosen.items()}
    if config.control and not chosen["control"]:
        raise UserError(f"{config.control}: no row has an image")
    if not chosen["training"]:
        raise UserError(f"{config.prompts}: no row of label 1 or without label has an image to bring back")
    return {kind: some[: config.images or None] for kind, some in chosen.items() if some}


# ------------------------------------------------------------------------------------------------------- evaluate


def check_evaluate(config: EvaluateConfig) -> None:
    """Check ``train evaluate``: the protocol, and the models, prompts, index and shards that it names.

    Raises:
        UserError: one is missing or malformed.
    """
    protocol = protocol_of(config)
    refuse_missing(protocol)
    if not protocol.originals:  # lists in a published form are read by the job
        for file in protocol.prompts.values():
            read_prompts(file)
    for model in protocol.models.values():
        check_model(model)
    if config.device not in ("auto", "cpu"):
        check_device(config.device)
