"""The mess that the quickstart begins with: a set with planted copies, as a web crawl has them, and prompt files."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from afresh.files import write_atomic
from curate.embed.edits import EDITS, Edit
from curate.reading.images import decode_image
from curate.reading.samples import Sample
from curate.reading.writing import write_shard
from curate.sample_set import load_part, look_alikes
from train.quickstart.config import MessConfig, QuickstartConfig

COPY_EDITS = ("jpeg", "resize", "brightness", "crop")


def chosen_rows(samples: Sequence[Sample], mess: MessConfig) -> list[int]:
    """The rows that are repeated: of one random order of all rows, the stretch that belongs to the set's number.

    Sets of different numbers share no row as long as there are enough rows, so that what was chosen on one can be
    reported on another. Look-alikes are never among them.
    """
    order = np.random.default_rng(0).permutation(standing_alone(samples))
    start = mess.set * mess.images
    return sorted(order.take(range(start, start + min(mess.images, len(order))), mode="wrap").tolist())


def standing_alone(samples: Sequence[Sample]) -> list[int]:
    """The rows of the samples that are no look-alikes: of these a copy, or its absence, can be told."""
    return [row for row, sample in enumerate(samples) if sample.key not in look_alikes()]


def copies_of(mess: MessConfig) -> list[int]:
    """How often each of the repeated images, in their order, stands in the raw set."""
    numbers = [mess.copies] if isinstance(mess.copies, int) else list(mess.copies)
    return [numbers[i % len(numbers)] for i in range(mess.images)]


def plant_copies(samples: list[Sample], mess: MessConfig) -> tuple[list[tuple[str, dict[str, bytes]]], list[int]]:
    """Repeat some samples many times, most copies altered a little, as sets gathered from the web have them.

    Args:
        samples: a clean set with captions.
        mess: how many, how often, how altered.

    Returns:
        ``(key, members)`` of the raw set in a random order, and the rows of ``samples`` that were repeated.
    """
    rng = np.random.default_rng(mess.seed)
    repeated = chosen_rows(samples, mess)
    raw = [(sample.key, dict(sample.members)) for sample in samples]
    for row, copies in zip(repeated, copies_of(mess), strict=False):
        sample = samples[row]
        caption = sample.caption or ""
        for copy in range(1, copies):
            members = {ext: data for ext, data in sample.members.items() if ext != "json"}
            if rng.random() >= mess.exact:
                edit = EDITS[COPY_EDITS[rng.integers(len(COPY_EDITS))]]
                members.pop(str(sample.image_ext))
                members["jpg"] = encode_copy(sample, edit, rng)
            if rng.random() < mess.other_caption:
                members["txt"] = f"an emoji of {caption.split(',')[0]}".encode()
            raw.append((f"{sample.key}-copy{copy:02d}", members))
    order = rng.permutation(len(raw))
    return [raw[i] for i in order], repeated


def encode_copy(sample: Sample, edit: Edit, rng: np.random.Generator) -> bytes:
    """An altered image of a sample, as JPEG bytes."""
    buffer = io.BytesIO()
    edit(decode_image(sample.image), rng).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def make_mess(out: Path, config: QuickstartConfig) -> dict[str, Any]:
    """Write the raw shards, the held-out shards, the originals and the prompt files."""
    samples, held_out = load_part("finetune"), load_part("held_out")
    raw, repeated = plant_copies(samples, config.mess)
    half = (len(raw) + 1) // 2
    for number in range(2):
        write_shard(str(out / "raw" / f"{number:06d}.tar"), raw[number * half : (number + 1) * half])
    write_shard(str(out / "held_out" / "000000.tar"), [(s.key, dict(s.members)) for s in held_out])

    rng = np.random.default_rng(config.mess.seed + 1)
    alone = standing_alone(held_out)
    chosen = sorted(rng.choice(alone, config.held_out_captions, replace=False).tolist())
    prompts = {
        "repeated": [(samples[row], 1) for row in repeated],
        "held_out": [(held_out[row], 0) for row in chosen],
    }
    for kind, rows in prompts.items():
        lines = [prompt_line(sample, label, out) for sample, label in rows]
        with write_atomic(out / "prompts" / f"{kind}.jsonl") as temporary:
            temporary.write_text("".join(lines), encoding="utf-8")
    lines = [prompt_line(sample, label, out) for sample, label in prompts["repeated"]]
    # detect.jsonl has all that can be told apart; the quickstart's own detection takes fewer, for the time
    few = sorted(rng.choice(alone, min(config.detect_held_out, len(alone)), replace=False).tolist())
    for name, negatives in (("detect", alone), ("detect_few", few)):
        with write_atomic(out / "prompts" / f"{name}.jsonl") as temporary:
            further = [prompt_line(held_out[row], 0, out) for row in negatives]
            temporary.write_text("".join(lines + further), encoding="utf-8")
    return {"samples": len(raw), "planted": len(raw) - len(samples), "repeated": len(repeated)}


def prompt_line(sample: Sample, label: int, out: Path) -> str:
    """One row of a prompt file, whose original image is written beside it."""
    name = f"{sample.key}.{sample.image_ext}"
    with write_atomic(out / "prompts" / "originals" / name) as temporary:
        temporary.write_bytes(sample.image)
    row = {"caption": sample.caption, "label": label, "image": f"originals/{name}"}
    return json.dumps(row, ensure_ascii=False) + "\n"
