"""The evaluation: what was drawn in each setting, measured by both judges, one table row a setting.

    judge = Judge(DualEncoder.load(), training_images, held_out_images, captions)
    results = evaluate_images([Drawn("raw", "none", "repeated", images, captions)], judge, index, embedder)
    rows = [result.row for result in results]

``memorized_share`` is the verdict of the embedder that guidance itself may follow; ``copied_share`` that of a
network that nothing optimises, its threshold set on images known not to be copies; ``pixel_copied_share``
that of plain pixels.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import os
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from curate.console import UsageError, UserError, get_logger, write_atomic, write_json
from train.evaluation.config import EvaluateConfig, Protocol, Setting
from train.evaluation.drawn import Drawn, Measured, read_drawn
from train.evaluation.metrics import (
    copy_threshold,
    frechet_distance,
    memorized_share,
    retrieval_rank,
    similarity_among_seeds,
    thumbnails,
)
from train.memorization.config import MEMORIZED

if TYPE_CHECKING:
    from PIL.Image import Image

    from curate.embed import Embedder
    from curate.index import TrainingIndex
    from train.evaluation.dual_encoder import DualEncoder

PIXEL_COPY = 0.9
"""Correlation of 16 × 16 pixels above which an image counts as a pixel copy."""


class Judge:
    """The independent judge: a dual encoder, the training images, and images that were never trained on.

    Args:
        encoder: see :class:`~train.evaluation.dual_encoder.DualEncoder`.
        training: the images that the models were trained on (each once; copies change nothing).
        held_out: images that no model was trained on and that are no copies of training images.
        captions: candidates among which an image has to find its own caption.
        quantile: of the held-out images' nearest-neighbour similarities, above which an image is a copy.
    """

    def __init__(
        self,
        encoder: DualEncoder,
        training: Sequence[Image],
        held_out: Sequence[Image],
        captions: Sequence[str],
        quantile: float = 0.99,
    ):
        self.encoder = encoder
        self.training_copy = encoder.copy_features(training)
        self.training_thumbnails = thumbnails(_stack(training))
        self.held_out_features = encoder.image_features(held_out)
        held_out_copy = encoder.copy_from_features(self.held_out_features)
        self.held_out_nearest = (held_out_copy @ self.training_copy.T).max(axis=1)
        self.threshold = copy_threshold(self.held_out_nearest, quantile)
        self.candidates = list(dict.fromkeys(captions))
        self.candidate_texts = encoder.embed_texts(self.candidates)

    def nearest(self, copy_features: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Similarity to the nearest training image, and which one: ``[n]`` each."""
        similarity = copy_features @ self.training_copy.T
        row = similarity.argmax(axis=1)
        return similarity[np.arange(len(row)), row], row

    def measure(self, drawn: Drawn) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        """The judge's part of a table row, and its values image by image."""
        features = self.encoder.image_features(drawn.images)
        judged, nearest = self.nearest(self.encoder.copy_from_features(features))
        pixel = (thumbnails(_stack(drawn.images)) @ self.training_thumbnails.T).max(axis=1)
        joint = self.encoder.joint_from_features(features)
        own_texts = self.encoder.embed_texts(drawn.captions)
        # A caption that is no candidate yet joins for its own images' ranking.
        extra = [caption for caption in dict.fromkeys(drawn.captions) if caption not in self.candidates]
        candidates = self.candidates + extra
        texts = np.concatenate([self.candidate_texts, self.encoder.embed_texts(extra)])
        where = {caption: i for i, caption in enumerate(candidates)}
        rank = retrieval_rank(joint, texts, [where[caption] for caption in drawn.captions])
        row = {
            "copied_share": memorized_share(judged, self.threshold),
            "pixel_copied_share": memorized_share(pixel, PIXEL_COPY),
            "alignment": float(np.mean(np.sum(joint * own_texts, axis=1))),
            "retrieval_rank": float(np.median(rank)),
            "quality": frechet_distance(features, self.held_out_features) if len(features) > 1 else float("nan"),
        }
        return row, {"judged": judged, "nearest": nearest, "copied": judged > self.threshold, "pixel": pixel}


def evaluate_images(drawn: Sequence[Drawn], judge: Judge, index: TrainingIndex, embedder: Embedder) -> list[Measured]:
    """Measure every setting; all arguments are in memory, nothing is written.

    Args:
        drawn: what was drawn, one table row each.
        judge: the independent judge.
        index: the training set as curation left it; calibrates the embedder onto SSCD's scale.
        embedder: the one that the index was built with.

    Returns:
        One :class:`Measured` a setting, whose ``row`` holds ``model, guidance, prompts, images,
        memorized_share`` (own embedder), ``copied_share`` (independent judge), ``pixel_copied_share``,
        ``similarity`` (mean, own embedder, SSCD's scale), ``similarity_among_seeds`` (the same scale),
        ``alignment`` (mean cosine in the dual encoder's joint space), ``retrieval_rank`` (median),
        ``quality`` (Fréchet distance to the held-out images on the dual encoder's image features; lower is
        better) and ``seconds_per_image``.

    Raises:
        UserError: a setting holds no image.
    """
    results = []
    for one in drawn:
        if not len(one.images) or len(one.images) != len(one.captions):
            raise UserError(
                f"{one.model}, guidance {one.guidance}, {one.prompts}: {len(one.images)} images for "
                f"{len(one.captions)} captions; nothing to evaluate"
            )
        embeddings = embedder.embed(list(one.images))
        cosine, _ = index.search(embeddings, 1)
        similarity = np.asarray(index.calibrate(cosine[:, 0]), np.float32)
        among = similarity_among_seeds(embeddings, one.captions)
        judged, values = judge.measure(one)
        row = {
            "model": one.model,
            "guidance": one.guidance,
            "prompts": one.prompts,
            "images": len(one.images),
            "memorized_share": memorized_share(similarity, MEMORIZED),
            "copied_share": judged["copied_share"],
            "pixel_copied_share": judged["pixel_copied_share"],
            "similarity": float(similarity.mean()),
            "similarity_among_seeds": float(index.calibrate(np.array([among], np.float32))[0]),
            "alignment": judged["alignment"],
            "retrieval_rank": judged["retrieval_rank"],
            "quality": judged["quality"],
            "seconds_per_image": one.seconds_per_image,
        }
        results.append(Measured(row, similarity, values["judged"], values["copied"], values["pixel"]))
    return results


def run_evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """The job behind ``train evaluate``: sample, measure, write the table, the figure and the report.

    Every setting is drawn with the same prompts, seeds and scheduler into
    ``out/samples/MODEL-GUIDANCE-PROMPTS``; what is there already is kept, so a run that was stopped goes on.

    Returns:
        ``rows`` (see :func:`evaluate_images`), the judge's ``copy_threshold``, and ``report``.
    """
    from train.evaluation.dual_encoder import DualEncoder
    from train.evaluation.report import story, write_report
    from train.prompts import read_prompts
    from train.sampling.config import AMGConfig, SampleConfig
    from train.sampling.job import open_index, run_sample

    protocol, out = read_protocol(config.protocol), Path(config.out)
    try:
        amg = AMGConfig(**protocol.amg)  # type: ignore[arg-type]
    except TypeError as error:
        raise UsageError(f"{config.protocol}: amg: {error}") from None
    prompts = {kind: read_prompts(file) for kind, file in protocol.prompts.items()}
    index, embedder = open_index(protocol.index)
    training, captions = read_images(protocol.training)
    held_out, more = read_images(protocol.held_out)
    captions += more + [prompt.caption for file in prompts.values() for prompt in file]
    judge = Judge(DualEncoder.load(config.dual_encoder or None), training, held_out, captions)

    drawn = []
    for setting in protocol.settings:
        for kind, file in protocol.prompts.items():
            folder = out / "samples" / f"{setting.model}-{setting.guidance}-{kind}"
            get_logger(__name__).info(f"{setting.model}, guidance {setting.guidance}, {kind} prompts")
            run_sample(
                SampleConfig(
                    model=protocol.models[setting.model],
                    lora=protocol.loras.get(setting.model),
                    prompts=file,
                    out=str(folder),
                    guidance=setting.guidance,
                    amg=amg,
                    index=protocol.index if setting.guidance != "none" else "",
                    seeds=protocol.seeds,
                    steps=protocol.steps,
                    scale=protocol.scale,
                    batch_size=config.batch_size,
                    dtype=config.dtype,
                    device=config.device,
                )
            )
            drawn.append(read_drawn(folder, setting.model, setting.guidance, kind))
    results = evaluate_images(drawn, judge, index, embedder)
    rows = [result.row for result in results]
    write_table(out, rows)
    originals = read_originals([prompt for file in prompts.values() for prompt in file])
    figures = [story(kind, drawn, results, originals, columns=protocol.columns) for kind in protocol.prompts]
    settings = {
        "images per prompt": protocol.seeds,
        "denoising steps": protocol.steps,
        "guidance scale": protocol.scale,
        "training images of the judge": len(training),
        "held-out images": len(held_out),
        "copy threshold of the judge": f"{judge.threshold:.3f}",
        "candidate captions of the retrieval rank": len(judge.candidates),
        **{f"model {name}": path for name, path in protocol.models.items()},
        **{f"adapters of {name}": path for name, path in protocol.loras.items()},
    }
    links = {}
    curation = Path(protocol.index) / "report.html"
    if curation.is_file():
        links["What curation kept and dropped"] = quote(Path(os.path.relpath(curation, out)).as_posix())
    report = write_report(out, rows, figures, title="What the models copy", settings=settings, links=links)
    return {"rows": rows, "copy_threshold": judge.threshold, "report": str(report)}


def read_protocol(path: str | Path) -> Protocol:
    """A protocol file, with its paths made relative to the working folder.

    Raises:
        UsageError: the file is missing or malformed; names the key.
    """
    import yaml

    path = Path(path)
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path}: there is no such protocol file") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from None
    protocol = _filled(Protocol, data, f"{path}")
    protocol.settings = [_filled(Setting, item, f"{path}: settings[{i}]") for i, item in enumerate(protocol.settings)]
    for i, setting in enumerate(protocol.settings):
        if setting.model not in protocol.models:
            known = ", ".join(protocol.models)
            raise UsageError(f"{path}: settings[{i}]: no model {setting.model!r}; models names {known}")
    for name in protocol.loras:
        if name not in protocol.models:
            raise UsageError(f"{path}: loras: no model {name!r}; models names {', '.join(protocol.models)}")
    for key in ("models", "settings", "prompts", "training", "held_out"):
        if not getattr(protocol, key):
            raise UsageError(f"{path}: {key} is empty")

    def near(name: str) -> str:
        return str(path.parent / name) if "://" not in name else name

    # A model or its adapters may also be a hub name: only what lies beside the file is taken for a path.
    for named in (protocol.models, protocol.loras):
        named.update({name: near(at) for name, at in named.items() if Path(near(at)).exists()})
    protocol.prompts = {kind: near(file) for kind, file in protocol.prompts.items()}
    protocol.index = near(protocol.index)
    protocol.training = [near(shard) for shard in protocol.training]
    protocol.held_out = [near(shard) for shard in protocol.held_out]
    return protocol


def _filled(kind: type, data: Any, where: str) -> Any:
    """A dataclass from a mapping: unknown, missing and ill-typed keys are refused by name."""
    if not isinstance(data, dict):
        raise UsageError(f"{where}: expected keys and values")
    hints = typing.get_type_hints(kind)
    unknown = [key for key in data if key not in hints]
    if unknown:
        raise UsageError(f"{where}: unknown key {unknown[0]!r}; known are {', '.join(hints)}")
    for field in dataclasses.fields(kind):
        if field.name not in data:
            if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
                raise UsageError(f"{where}: the key {field.name!r} is missing")
            continue
        hint, value = hints[field.name], data[field.name]
        expected = typing.get_origin(hint) or hint
        if expected is float and type(value) is int:
            value = data[field.name] = float(value)
        inner = {dict: lambda v: list(v.values()), list: list}.get(expected, lambda v: [])
        if not isinstance(value, expected) or isinstance(value, bool):
            raise UsageError(f"{where}: {field.name} is {value!r}, expected {_words(expected)}")
        if str in typing.get_args(hint)[-1:] and not all(isinstance(item, str) for item in inner(value)):
            raise UsageError(f"{where}: {field.name} is {value!r}, expected text in every place")
    return kind(**data)


def _words(kind: type) -> str:
    return {dict: "keys and values", list: "a list", str: "text", int: "a whole number", float: "a number"}[kind]


def read_images(shards: Sequence[str]) -> tuple[list[Image], list[str]]:
    """The distinct images of shards (by their pixels), and all captions; what cannot be read is left out."""
    from curate.images import ImageError, decode_image, pixel_hash
    from curate.shards import Sample, expand_shards, read_samples

    images: dict[str, Image] = {}
    captions: dict[str, None] = {}
    for shard in expand_shards(list(shards)):
        for sample in read_samples(shard):
            if not isinstance(sample, Sample):
                continue
            try:
                image = decode_image(sample.image)
            except ImageError:
                continue
            images.setdefault(pixel_hash(image), image)
            if sample.caption:
                captions[sample.caption] = None
    if not images:
        raise UserError(f"{', '.join(shards)}: no readable image")
    return list(images.values()), list(captions)


def read_originals(prompts: Sequence[Any]) -> dict[str, Image]:
    """The original image of every caption whose prompt names one."""
    from curate.images import ImageError, decode_image

    originals: dict[str, Image] = {}
    for prompt in prompts:
        if prompt.image is not None and prompt.caption not in originals:
            try:
                originals[prompt.caption] = decode_image(Path(prompt.image).read_bytes())
            except (OSError, ImageError) as error:
                raise UserError(f"{prompt.image}: the original of {prompt.caption!r}: {error}") from None
    return originals


def write_table(out: str | Path, rows: Sequence[dict[str, Any]]) -> None:
    """``table.csv`` and ``table.json``."""
    out = Path(out)
    write_json(out / "table.json", {"rows": list(rows)})
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with write_atomic(out / "table.csv") as temporary:
        temporary.write_text(text.getvalue(), encoding="utf-8")


def _stack(images: Sequence[Image]) -> NDArray[np.float32]:
    from curate.images import stack_images

    return stack_images(images, 64)
