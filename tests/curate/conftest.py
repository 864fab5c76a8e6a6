"""Sources for ``curate import``, and a mess for ``curate dedup`` with its curation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from curate.dedup import run_dedup
from curate.reading.images import decode_image
from curate.reading.samples import Sample, read_samples
from curate.reading.writing import write_shard
from tests.curate.made_mess import settings
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


@pytest.fixture(scope="session")
def mess(tmp_path_factory, sample_shards) -> Path:
    """Three shards of 60 emoji with planted copies and planted damage; every third original is untouched."""
    folder = tmp_path_factory.mktemp("mess")
    originals = [sample for sample in read_samples(sample_shards[0]) if isinstance(sample, Sample)][::6][:60]
    first = [(sample.key, dict(sample.members)) for sample in originals]
    second, third = [], []
    for number, sample in enumerate(originals[:20]):
        image, caption = decode_image(sample.image), str(sample.caption).encode()
        second.append((f"exact{number:02d}", {"webp": sample.image, "txt": caption}))
        second.append((f"png{number:02d}", {"png": encode(image, "PNG"), "txt": caption}))
        third.append((f"jpeg{number:02d}", {"jpg": encode(image, "JPEG", quality=85), "txt": caption}))
        other = f"other {number:02d}".encode()  # shorter than the original's, which is therefore preferred
        json_member = json.dumps({"url": "https://example.org/é", "n": number}).encode()
        third.append(
            (
                f"other{number:02d}",
                {"jpg": encode(image, "JPEG", quality=92), "txt": other, "json": json_member},
            )
        )
    third.append((originals[0].key, {"webp": originals[30].image, "txt": b"same key as in the first shard"}))
    third.append(("broken", {"jpg": b"no image", "txt": b"broken"}))
    third.append(("captionless", {"webp": originals[31].image}))
    third.append(("pickled", {"webp": originals[32].image, "txt": b"carried along", "pkl": b"\x80\x04."}))
    for name, samples in (("a", first), ("b", second), ("c", third)):
        write_shard(folder / f"{name}.tar", samples)
    return folder


@pytest.fixture(scope="session")
def curated(mess, tmp_path_factory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("curated") / "out"
    return out, run_dedup(settings(mess, out))
