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
from afresh.progress import get_logger
from afresh.summaries import format_summary
from curate.config import CheckConfig
from curate.engines.local import LocalEngine
from curate.reading.samples import BadSample, Sample, Shard, machine_named, sample_bytes
from curate.reading.urls import expand_shards, shard_bytes, shard_names

log = get_logger(__name__)
SHOWN, SHOWN_ALIKE = 40, 3  # of the problems on a terminal: in all, and of a kind in a shard
ROWS_HELD = 100_000  # of problems, of the shards that are checked together
BYTES_AHEAD = 1 << 26  # of samples that are being decoded
# The words of ``kinds`` and of ``kind`` in ``listed``: scripts rely on them, so they are added to and never changed.
KINDS = {
    "truncated": "the archive ends before its end, before its first sample, or in more zeros than tar pads with; the "
    "key names the sample that was cut, if there is one",
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

    def view(self, *, colour: bool = False) -> str:
        """For a terminal: a few problems of each kind in each shard, and how many more there are."""
        alike: Counter[tuple[str, str]] = Counter()
        shown: list[dict[str, str]] = []
        for row in self["listed"]:
            alike[row["shard"], row["kind"]] += 1
            if alike[row["shard"], row["kind"]] <= SHOWN_ALIKE and len(shown) < SHOWN:
                shown.append(row)
        rest = {key: value for key, value in self.items() if key != "listed"}
        text = format_summary(rest | {"listed": shown} if shown else rest)
        if more := self["problems"] - len(shown):
            text += f"\n\n{more:,} more problems are counted, and not shown here; --json lists {len(self['listed']):,}"
        return text


@dataclass(frozen=True)
class _CheckTask:
    url: str
    name: str
    caption_field: str
    max_pixels: int
    threads: int
    list_at_most: int | None


def run_check(config: CheckConfig) -> CheckSummary:
    """Read every member of every shard, changing nothing.

    Returns:
        ``samples, readable`` (those that ``curate dedup`` takes), ``problems``, ``kinds`` (how many problems of each of
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
    names = shard_names(urls)
    samples = readable = captionless = captioned = 0
    kinds: Counter[str] = Counter()
    listed: list[dict[str, Any]] = []
    at_a_time = len(urls) if config.list_at_most is None else max(64, ROWS_HELD // max(1, config.list_at_most))
    with LocalEngine(config.workers) as engine:
        for first in range(0, len(urls), at_a_time):  # so that memory holds the lists of some shards only
            at_most = config.list_at_most
            left = None if at_most is None else at_most - len(listed)
            tasks = [
                _CheckTask(urls[n], names[n], config.caption_field, config.max_pixels, threads[n], left)
                for n in range(first, min(first + at_a_time, len(urls)))
            ]
            for of_shard in engine.map(_check_shard, tasks, desc="checking"):
                samples += of_shard["samples"]
                readable += of_shard["readable"]
                captionless += of_shard["captionless"]
                captioned += of_shard["captioned"]
                kinds.update(of_shard["kinds"])
                listed += of_shard["listed"][: None if at_most is None else at_most - len(listed)]
    if not captioned and captionless:  # nothing is missing: a set of images is what it is meant to be
        log.info("no sample has a caption: curate dedup takes such a set by its images alone")
        readable += captionless
        kinds = Counter(kinds) - Counter(no_caption=captionless)
        listed = [row for row in listed if not row["absent"]]
    for row in listed:
        del row["absent"]
    return CheckSummary(
        samples=samples,
        readable=readable,
        problems=kinds.total(),
        kinds=dict(sorted(kinds.items())),
        listed=listed,
        seconds=round(time.monotonic() - start, 3),
    )


def _check_shard(task: _CheckTask) -> dict[str, Any]:
    """Numbers of a shard: ``captionless`` samples are whole but for a caption, ``captioned`` ones tell that a set has
    captions, whatever they are like.
    """
    numbers: Counter[str] = Counter(samples=0, readable=0, captionless=0, captioned=0)
    kinds: Counter[str] = Counter()
    listed: list[dict[str, Any]] = []
    items = Shard(task.url, task.name, task.caption_field).accounted()
    look = partial(_problems, max_pixels=task.max_pixels)
    for key, captionless, found in in_order(
        look, items, task.threads, at_most=1024, weigh=sample_bytes, weight=BYTES_AHEAD
    ):
        lacks = [kind for kind, _ in found if kind not in USABLE]
        numbers["samples"] += 1
        numbers["readable"] += not lacks
        numbers["captioned"] += captionless is False
        absent = bool(captionless) and lacks == ["no_caption"]
        numbers["captionless"] += absent
        for kind, reason in found:
            kinds[kind] += 1
            if task.list_at_most is None or len(listed) < task.list_at_most:
                row = {"shard": task.name, "key": key, "kind": kind, "reason": reason}
                listed.append(row | {"absent": absent and kind == "no_caption"})
    return {**numbers, "kinds": kinds, "listed": listed}


def _problems(item: Sample | BadSample, max_pixels: int) -> tuple[str, bool | None, list[tuple[str, str]]]:
    """The key of a sample, whether nothing stands where its caption would (None of what is no whole sample), and what
    is wrong with it: kinds and reasons.
    """
    from curate.reading.images import ImageError, decode_image

    if isinstance(item, BadSample):
        return item.key, None, [(item.kind, item.reason)]
    found: list[tuple[str, str]] = []
    try:
        with machine_named(item):
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
    return item.key, item.captionless, found

