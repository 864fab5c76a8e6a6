"""What can be seen to be wrong with the settings and files of ``train sample`` before a model is loaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from afresh.errors import UsageError, UserError
from curate.index.training_index import check_index
from train.denoising.opening.files import check_openable
from train.memorization.neurons.files import read_neurons
from train.prompts import Prompt, read_prompts
from train.sampling.config import SampleConfig


def check_sample(config: SampleConfig) -> None:
    """Check ``train sample``: its options, the prompts, the index, the model's files.

    Raises:
        UserError: options do not go together, or a file is missing or malformed.
    """
    prompts_to_draw(config)
    for one in settings_of_each(config):
        check_options(one)
    if config.index:
        check_index(config.index)
    if config.neurons:
        read_neurons(config.neurons)
    check_openable(config)
    for one in settings_of_each(config):
        check_guidance(one)


def settings_of_each(config: SampleConfig) -> list[SampleConfig]:
    """The settings of each guidance that is compared, or these alone.

    Raises:
        UsageError: a guidance stands twice, or beside those that are compared.
    """
    if not config.compare:
        return [config]
    if config.guidance != "none":
        raise UsageError("--compare names the guidances: leave --guidance out, or put it among them")
    if len(set(config.compare)) < len(config.compare):
        raise UsageError(f"--compare {','.join(config.compare)}: a guidance stands twice")
    names = [name or "none" for name in config.compare]
    return [replace(config, guidance=name, out=str(Path(config.out) / name), compare=[]) for name in names]


def prompts_to_draw(config: SampleConfig) -> list[Prompt]:
    """The prompts; where guidances are compared, with images that are there.

    Raises:
        UserError: the file cannot be read, or an image is missing.
    """
    prompts = read_prompts(config.prompts)
    for prompt in prompts:
        if config.compare and prompt.image is not None and not prompt.image.is_file():
            raise UserError(f"{prompt.image}: the training image of {prompt.caption!r} is missing")
    return prompts


def check_options(config: SampleConfig) -> None:
    """Raise ``UsageError`` for numbers out of range, and options that need another one."""
    for option, least in (("seeds", 1), ("steps", 1), ("batch_size", 1), ("first_seed", 0), ("tries", 1)):
        if getattr(config, option) < least:
            raise UsageError(f"--{option} is {getattr(config, option)}: it is at least {least}")
    if config.embedder and not config.index:
        raise UsageError("--embedder needs --index")
    if config.never_above is not None and not config.index:
        raise UsageError("--never_above needs --index: the output folder of curate dedup")
    if config.never_above is not None and not -1 <= config.never_above <= 1:
        raise UsageError(f"--never_above is {config.never_above}: similarities lie between -1 and 1")
    if config.judge_index and config.never_above is None:
        raise UsageError("--judge_index is of --never_above: give that too")


def check_guidance(config: SampleConfig) -> None:
    """Raise ``UsageError`` for a guidance that is not known, or whose settings make no sense; imports torch."""
    from train.sampling.terms import registry

    registry.check(config)
    registry.automatic(config)
    if registry.needs_index(config.guidance) and not config.index:
        raise UsageError(f"--guidance {config.guidance} needs --index: the output folder of curate dedup")
