"""A model, the training-set index and its embedder, opened together: what drawing and judging need."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from afresh.errors import UsageError
from afresh.progress import get_logger, is_main_process
from train.denoising.families.registry import denoiser_of, pipeline_family
from train.denoising.opening.checkpoints import check_scheduler
from train.denoising.opening.loading import chosen_device, open_pipeline
from train.memorization.thresholds import FILE, Thresholds, model_thresholds
from train.prompts import Prompt
from train.sampling.config import SampleConfig
from train.sampling.pipelines.registry import guided
from train.sampling.similarity import check_not_empty

if TYPE_CHECKING:
    from curate.embed.protocol import Embedder
    from curate.index.training_index import TrainingIndex


log = get_logger(__name__)


class Opened:
    """The model, the index and what else belongs to them, opened when the first image is to be drawn, and once."""

    def __init__(self, config: SampleConfig, prompts: Sequence[Prompt]) -> None:
        self.config, self.prompts = config, prompts

    @cached_property
    def pipe(self) -> Any:
        """The guided pipeline; says which prompts are too long for it."""
        pipe = open_pipeline(self.config)
        drawing = guided(pipe, **_scheduler(self.config, pipe))
        flow = pipeline_family(pipe).flow
        name = self.config.scheduler or self.config.model
        check_scheduler(drawing.scheduler, name, self.config.steps, flow=flow)
        drawing.set_progress_bar_config(disable=True)
        _say_what_is_cut(drawing.tokenizer, self.prompts)
        return drawing

    @cached_property
    def index(self) -> tuple[TrainingIndex, Embedder] | tuple[None, None]:
        """The training set, and its embedder on the job's device."""
        return self._open(self.config.index, self.config.embedder) if self.config.index else (None, None)

    @cached_property
    def views(self) -> list[tuple[TrainingIndex, Embedder]]:
        """The views of the training set, each with its embedder on the job's device; none without an index."""
        if not (self.config.index and self.config.views):
            return []
        from curate.stages.views import views_of

        return [self._placed(*view) for view in views_of(self.config.index, self.index[0])]  # type: ignore[arg-type]

    @cached_property
    def judges(self) -> list[tuple[Any, Any]]:
        """A second index, if one is to judge too."""
        return [self._open(self.config.judge_index, "")] if self.config.judge_index else []

    @cached_property
    def thresholds(self) -> Thresholds | None:
        """The model's calibrated ones; None, and a warning, where magnitudes here are not to be compared with them."""
        found = model_thresholds(self.config.model)
        if found is None:
            return None
        space = denoiser_of(self.pipe).schedule.space
        if not (why := found.unlike(self.config.negative_prompt, self.elements, space)):
            return found
        if is_main_process():
            log.warning(f"{Path(self.config.model) / FILE}: {why}; no image is called memorized by its magnitude")
        return None

    @cached_property
    def elements(self) -> int:
        """Numbers in an image's latents."""
        (channels, *own), factor = denoiser_of(self.pipe).shape, self.pipe.vae_scale_factor
        given = (self.config.height, self.config.width)
        sides = tuple(length // factor for length in given) if all(given) else own
        return channels * sides[0] * sides[1]

    def _open(self, path: str, name: str) -> tuple[TrainingIndex, Embedder]:
        return self._placed(*open_index(path, name))

    def _placed(self, index: TrainingIndex, embedder: Embedder) -> tuple[TrainingIndex, Embedder]:
        if hasattr(embedder, "to"):
            embedder.to(chosen_device(self.config.device))
        return index, embedder


def open_index(path: str, embedder: str = "") -> tuple[TrainingIndex, Embedder]:
    """A training-set index and the embedder that belongs to it.

    Args:
        path: the output folder of ``curate dedup``, or its ``index`` folder; or the URL of one.
        embedder: name or file; empty takes the index's own.

    Raises:
        UserError: no index there, an empty one, or it was built with another embedder.
    """
    from curate.embed.registry import load_embedder
    from curate.index.training_index import TrainingIndex, refuse_other

    index = TrainingIndex.load(path)
    check_not_empty(index, path)
    loaded = load_embedder(embedder or index.embedder)
    refuse_other(index, loaded, f"the index {path}")
    return index, loaded


def fingerprint(path: Path) -> str:
    """Of a file or folder: names, sizes, and both ends of each file (weights run to gigabytes)."""
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(path) if file != path else ''}\0{size}\0".encode())
        with open(file, "rb") as stream:
            digest.update(stream.read(1 << 20))
            stream.seek(max(0, size - (1 << 20)))
            digest.update(stream.read())
    return digest.hexdigest()


def _say_what_is_cut(tokenizer: Any, prompts: Sequence[Prompt]) -> None:
    """Warn, once, of prompts with more tokens than the tokenizer's limit."""
    limit = tokenizer.model_max_length
    captions = dict.fromkeys(prompt.caption for prompt in prompts)
    counts = {caption: len(tokenizer(caption).input_ids) for caption in captions}
    long = [caption for caption, count in counts.items() if count > limit]
    if long and is_main_process():
        log.warning(
            f"{len(long)} of {len(captions)} prompts are longer than the {limit} tokens that the model reads, and are "
            f"cut there; the first, of {counts[long[0]]} tokens: {long[0]!r}"
        )


def _scheduler(config: SampleConfig, pipe: Any) -> dict[str, Any]:
    if not config.scheduler:
        return {}
    import diffusers

    kind: Any = getattr(diffusers, config.scheduler, None)
    if not hasattr(kind, "from_config") or not issubclass(kind, diffusers.SchedulerMixin):
        raise UsageError(f"--scheduler {config.scheduler}: not a diffusers scheduler class")
    return {"scheduler": kind.from_config(pipe.scheduler.config)}


NEAREST = (
    "similarity",
    "highest",
    "judged_by",
    "cosine",
    "nearest_row",
    "nearest_shard",
    "nearest_key",
    "nearest_caption",
)

