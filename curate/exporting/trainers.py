"""Kept samples as a folder that another trainer reads, and the file that tells the trainer of it.

Images that an epoch shows n times lie in a folder ``n_CONCEPT``, each beside a text file with its captions, a line each
(``imagefolder`` has all images in one folder, and ``metadata.jsonl``). Image bytes are those that came.

=============  ======================  ==========================================================================
trainer        what tells it           several captions, and repeats
=============  ======================  ==========================================================================
imagefolder    ``metadata.jsonl``      the column ``captions``, a list; the column ``repeats``, which nobody reads
kohya          ``dataset.toml``        a line is drawn at random (``enable_wildcard``); ``num_repeats``
simpletuner    ``multidatabackend``    a line is drawn at random; ``repeats``, counted from 0
               ``.json``
onetrainer     ``concepts.json``       a line is drawn at random; ``balancing``
ai-toolkit     ``datasets.yaml``       the first alone; ``num_repeats``
=============  ======================  ==========================================================================
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from curate.config import ExportConfig
from curate.reading.samples import Sample

Groups = Mapping[int, Path]
"""Repeats → the folder with the images that are seen so often, as the trainer is to know it."""


def write_for_trainer(
    samples: Iterable[tuple[str, Sample, str]], folder: Path, place: Path, config: ExportConfig
) -> int:
    """Write samples and what ``config.format``'s trainer is told of them; their number.

    Args:
        samples: a name that no other has, the sample, and the shard that it came in.
        folder: to fill.
        place: where it will lie, for the paths in the trainer's file.
        config: ``format``, ``repeats_field`` and ``concept``.
    """
    if config.format == "imagefolder":
        return _write_imagefolder(samples, folder, config.repeats_field)
    groups: dict[int, Path] = {}
    written = 0
    for name, sample, _ in samples:
        repeats = repeats_of(sample, config.repeats_field)
        groups[repeats] = place / f"{repeats}_{config.concept}"
        there = folder / groups[repeats].name
        there.mkdir(exist_ok=True)
        (there / f"{name}.{sample.image_ext}").write_bytes(sample.image)
        lines = [_line(caption) for caption in sample.captions]
        if lines:  # an absent caption is no empty one: each trainer has its own way with it
            text = "\n".join(lines[:1] if config.format == "ai-toolkit" else lines)
            if config.format == "kohya":  # its wildcards are {this|that}; doubled, a brace is one
                text = text.replace("{", "{{").replace("}", "}}")
            (there / f"{name}.txt").write_text(text, encoding="utf-8", newline="\n")
        written += 1
    file, describe = _TOLD[config.format]
    (folder / file).write_text(describe(dict(sorted(groups.items())), config.concept), encoding="utf-8", newline="\n")
    return written


def repeats_of(sample: Sample, field: str) -> int:
    """How often an epoch shows a sample: the number in ``field`` of its json, rounded; 1 where that says nothing."""
    return max(round(sample.number(field) or 1), 1)


def _line(caption: str) -> str:
    return " ".join(caption.split())


def _write_imagefolder(samples: Iterable[tuple[str, Sample, str]], folder: Path, field: str) -> int:
    written = 0
    with open(folder / "metadata.jsonl", "w", encoding="utf-8", newline="\n") as table:
        for name, sample, shard in samples:
            file = f"{name}.{sample.image_ext}"
            (folder / file).write_bytes(sample.image)
            row = {
                "file_name": file,
                "text": sample.caption,
                "captions": list(sample.captions),
                "repeats": repeats_of(sample, field),
                "key": sample.key,
                "shard": shard,
            }
            table.write(json.dumps(row) + "\n")
            written += 1
    return written


def _kohya(groups: Groups, concept: str) -> str:
    lines = ["[general]", 'caption_extension = ".txt"', "enable_wildcard = true", "enable_bucket = true", ""]
    lines.append("[[datasets]]")
    for repeats, path in groups.items():
        lines += ["", "[[datasets.subsets]]", f"image_dir = {_quoted(str(path))}", f"num_repeats = {repeats}"]
        lines.append(f"class_tokens = {_quoted(concept)}")
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """A basic string of TOML, whose escapes are those of JSON."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _simpletuner(groups: Groups, _: str) -> str:
    sets: list[dict[str, Any]] = [
        {
            "id": path.name,
            "type": "local",
            "instance_data_dir": str(path),
            "caption_strategy": "textfile",
            "cache_dir_vae": f"cache/vae/{path.name}",
            "repeats": repeats - 1,
        }
        for repeats, path in groups.items()
    ]
    embeds = {"id": "text-embeds", "dataset_type": "text_embeds", "default": True, "type": "local"}
    return _json([*sets, {**embeds, "cache_dir": "cache/text"}])


def _onetrainer(groups: Groups, _: str) -> str:
    return _json(
        [
            {
                "name": path.name,
                "path": str(path),
                "enabled": True,
                "include_subdirectories": False,
                "balancing": float(repeats),
                "balancing_strategy": "REPEATS",
                "text": {"prompt_source": "sample"},
            }
            for repeats, path in groups.items()
        ]
    )


def _ai_toolkit(groups: Groups, _: str) -> str:
    sets = [
        {"folder_path": str(path), "caption_ext": "txt", "num_repeats": repeats} for repeats, path in groups.items()
    ]
    return yaml.safe_dump({"datasets": sets}, sort_keys=False, allow_unicode=True)


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


_TOLD: Mapping[str, tuple[str, Callable[[Groups, str], str]]] = {
    "kohya": ("dataset.toml", _kohya),
    "simpletuner": ("multidatabackend.json", _simpletuner),
    "onetrainer": ("concepts.json", _onetrainer),
    "ai-toolkit": ("datasets.yaml", _ai_toolkit),
}
