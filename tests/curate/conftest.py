"""Sources for ``curate import``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.curate.made_sources import encode, lay_out, picture, png


@pytest.fixture
def photos(tmp_path) -> Path:
    """Twelve images in three formats, captioned by txt or json, two folders deep."""
    kinds = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}
    files: dict[str, bytes | str] = {}
    for number in range(12):
        ext = list(kinds)[number % 3]
        stem = f"{'cats' if number % 2 else 'dogs/small'}/{number:03d}"
        files[f"{stem}.{ext}"] = encode(picture(number), kinds[ext])
        if number < 6:
            files[f"{stem}.txt"] = f"caption {number}\n"
        else:
            files[f"{stem}.json"] = json.dumps({"caption": f"caption {number}", "alt": "other", "n": number})
    return lay_out(tmp_path / "photos", files)


@pytest.fixture
def dataset():
    """Six rows with an encoded image, a caption, a label and a list."""
    import datasets

    features = {
        "image": datasets.Image(),
        "text": datasets.Value("string"),
        "label": datasets.ClassLabel(names=["a", "b"]),
        "boxes": datasets.List(datasets.Value("int32")),
    }
    columns = {
        "image": [{"bytes": png(number), "path": None} for number in range(6)],
        "text": [f"caption {number}" for number in range(6)],
        "label": [0, 1] * 3,
        "boxes": [[1]] * 6,
    }
    datasets.disable_progress_bars()
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))
