"""``curate check``: read every sample as curation would, and list what is broken.

Not by webdataset's pipelines (:mod:`curate.reading.pipeline`): a shard is one task, and what is bad has a place in it.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Any

from afresh.cores import cpu_count, in_order, shares
from afresh.errors import UsageError
from curate.config import CheckConfig
from curate.engines.local import LocalEngine
from curate.reading.samples import BadSample, Sample, read_samples, sample_bytes
from curate.reading.urls import expand_shards, shard_bytes, shard_names

LISTED_PER_SHARD = 100_000
BYTES_AHEAD = 1 << 26  # of samples that are being decoded
# The words of ``kinds`` and of ``kind`` in ``listed``: scripts rely on them, so they are added to and never changed.
KINDS = {
    "truncated": "the archive ends before its end; the key names the sample that was cut, if there is one",
    "corrupt_archive": "a header or the compressed stream is damaged; what follows is not read",
    "trailing_data": "something follows the end of the archive; it is not read",
    "refused_member": "a link, device, sparse or oversized file, or a name that leads outside",
    "repeated_key": "members of a key that stood in the shard before: not side by side, or a second sample",
    "stray_member": "a file without key and extension",
    "no_image": "a sample without an image member",
    "several_images": "a sample with more than one image member; the first of jpg, jpeg, png, webp is taken",
    "unreadable_image": "an image that cannot be decoded, or is too large",
    "no_caption": "neither txt nor json hold a caption that can be read",
    "empty_caption": "a caption without a character",
}
USABLE = ("several_images", "empty_caption")  # said of samples that curation takes all the same


class CheckSummary(dict[str, Any]):
    """A summary that knows how the command ends: 1 when problems were found, as checking tools do."""

    @property
    def exit_code(self) -> int:
        return 1 if self["problems"] else 0


@dataclass(frozen=True)
class _CheckTask:
    url: str
    name: str
    caption_field: str
    max_pixels: int
    threads: int


def run_check(config: CheckConfig) -> CheckSummary:
    """Read every member of every shard, changing nothing.

    Returns:
        ``samples, readable`` (those that curation can take), ``problems``, ``kinds`` (how many problems of each of
        ``KINDS``), ``listed`` (rows shard, key, kind, reason; at most ``list_at_most``) and ``seconds``.

    Raises:
        UsageError: a setting is out of range, or there are no shards.
        UserError: a shard cannot be opened.
    """
    start = time.monotonic()
    if config.max_pixels < 1:
        raise UsageError(f"max_pixels must be at least 1, got {config.max_pixels}")
    if config.workers < 0:
        raise UsageError(f"workers must be 0 (all cores) or more, got {config.workers}")
    urls = expand_shards(config.shards)
    threads = shares([shard_bytes(url) for url in urls], config.workers or cpu_count())
    tasks = [
        _CheckTask(url, name, config.caption_field, config.max_pixels, of_shard)
        for url, name, of_shard in zip(urls, shard_names(urls), threads, strict=True)
    ]
    samples = readable = 0
    kinds: Counter[str] = Counter()
    listed: list[dict[str, str]] = []
    for of_shard in LocalEngine(config.workers).map(_check_shard, tasks, desc="checking"):
        samples += of_shard["samples"]
        readable += of_shard["readable"]
        kinds.update(of_shard["kinds"])
        listed += of_shard["listed"]
    return CheckSummary(
        samples=samples,
        readable=readable,
        problems=kinds.total(),
        kinds=dict(sorted(kinds.items())),
        listed=listed[: config.list_at_most],
        seconds=round(time.monotonic() - start, 3),
    )


def _check_shard(task: _CheckTask) -> dict[str, Any]:
    samples = readable = 0
    kinds: Counter[str] = Counter()
    listed: list[dict[str, str]] = []
    items = read_samples(task.url, name=task.name, caption_field=task.caption_field)
    look = partial(_problems, max_pixels=task.max_pixels)
    for key, found in in_order(look, items, task.threads, at_most=1024, weigh=sample_bytes, weight=BYTES_AHEAD):
        samples += 1
        readable += all(kind in USABLE for kind, _ in found)
        for kind, reason in found:
            kinds[kind] += 1
            if len(listed) < LISTED_PER_SHARD:
                listed.append({"shard": task.name, "key": key, "kind": kind, "reason": reason})
    return {"samples": samples, "readable": readable, "kinds": kinds, "listed": listed}


def _problems(item: Sample | BadSample, max_pixels: int) -> tuple[str, list[tuple[str, str]]]:
    """The key of a sample, and what is wrong with it: kinds and reasons."""
    from curate.reading.images import ImageError, decode_image

    if isinstance(item, BadSample):
        return item.key, [(item.kind, item.reason)]
    found: list[tuple[str, str]] = []
    try:
        decode_image(item.image, max_pixels=max_pixels)
    except ImageError as error:
        found.append(("unreadable_image", str(error)))
    if (reason := item.caption_problem) is not None:
        found.append(("no_caption", reason))
    elif not item.caption:
        found.append(("empty_caption", "caption is empty"))
    if len(item.images) > 1:
        reason = f"{len(item.images)} images ({', '.join(item.images)}): {item.image_ext} is taken"
        found.append(("several_images", reason))
    return item.key, found

