"""Samples of tar shards: a safe streaming read.

A shard is a WebDataset tar: members ``key.ext`` with the same key, side by side, are one sample. Members are
data: their names are never used as paths, their contents never unpickled, and what cannot be a sample (links,
devices, names that point outside, a cut archive) is handed out as a ``BadSample`` with its reason.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from afresh.errors import UserError
from curate.reading.captions import TEXT_EXTENSIONS, field_captions, json_fields, text_caption, texts_of
from curate.reading.members import cut_name, is_left_behind, key_and_extension, listed, refusal, safe_name
from curate.reading.tar import BLOCK, Archive, Failure, Member, ReadError, shown
from curate.reading.urls import open_shard, shard_names

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
MAX_SAMPLE_BYTES = 1 << 30  # all members of a sample together, which memory holds
NO_SAMPLE = "archive holds no sample"
MAX_BETWEEN = 1000  # stray members that memory holds while they stand between those of a sample


@dataclass(frozen=True)
class Sample:
    """One sample as it stands in its shard: ``members`` maps extensions (as spelled) to bytes, in order.

    ``offsets`` says where in the file the bytes of each begin; it is empty where the archive is compressed.
    ``caption_field`` names the field of ``json`` that holds the caption; empty for ``txt``, or the usual fields.
    """

    shard: str
    key: str
    members: Mapping[str, bytes] = field(repr=False)
    offsets: Mapping[str, int] = field(default_factory=dict, repr=False, compare=False)
    caption_field: str = field(default="", repr=False, compare=False)

    @property
    def image_ext(self) -> str | None:
        """Extension of the image member, the first of jpg, jpeg, png, webp that there is."""
        return self._extension(*IMAGE_EXTENSIONS)

    @property
    def image(self) -> bytes:
        """The encoded image. Raises ``ValueError`` when the sample has none."""
        ext = self.image_ext
        if ext is None:
            raise ValueError(f"sample {self.key!r} of shard {self.shard} has no image member")
        return self.members[ext]

    @property
    def images(self) -> list[str]:
        """Extensions of all image members, that of ``image`` first."""
        spelled = {ext.lower(): ext for ext in self.members}
        return [spelled[ext] for ext in IMAGE_EXTENSIONS if ext in spelled]

    @property
    def caption(self) -> str | None:
        """The caption: the text in that field of ``json`` that ``caption_field`` names, else ``txt`` (or ``caption``,
        ``cap``), else, where no field is named, the first text in ``caption``, ``text``, ``prompt`` or ``captions`` of
        ``json``; None if there is none.
        """
        return self._caption[0]

    @property
    def caption_problem(self) -> str | None:
        """Why ``caption`` is None, or None when there is a caption (which may be empty)."""
        return self._caption[1]

    @property
    def captionless(self) -> bool:
        """Whether nothing stands where a caption would: no caption that cannot be read, and no other field."""
        if self.caption is not None or self.caption_field or self._extension(*TEXT_EXTENSIONS) is not None:
            return False
        return self._json[1] is None

    @property
    def captions(self) -> tuple[str, ...]:
        """All captions without repetition, empty ones left out: ``caption``, the others of a list in ``json`` that it
        stands in, and those that curation pooled from copies.
        """
        listed = [text.strip() for text in field_captions(self.fields, self.caption_field)]
        found = [self.caption, *(listed if self.caption in listed else ()), *texts_of(self.account.get("captions"))]
        return tuple(dict.fromkeys(filter(None, found)))

    @cached_property
    def fields(self) -> Mapping[str, Any]:
        """The fields of ``json``; none where it is missing, too large, too deep or no object."""
        return self._json[0] or {}

    @property
    def account(self) -> Mapping[str, Any]:
        """What a curation noted of the sample: the field ``afresh`` of ``json``, or where that had no room for it the
        member ``afresh.json``.
        """
        noted = self.fields.get("afresh")
        if not isinstance(noted, dict) and (ext := self._extension("afresh.json")) is not None:
            noted = json_fields(self.members[ext])[0]
        return noted if isinstance(noted, dict) else {}

    def number(self, name: str) -> float | None:
        """The number in the field ``name`` of ``json``; None if there is no finite number to read there."""
        value = self.fields.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return None
        with contextlib.suppress(OverflowError):
            return float(value) if math.isfinite(value) else None
        return None

    @cached_property
    def _json(self) -> tuple[Mapping[str, Any] | None, str | None]:
        ext = self._extension("json")
        return (None, None) if ext is None else json_fields(self.members[ext])

    @cached_property
    def _caption(self) -> tuple[str | None, str | None]:
        if self._in_json:
            return text_caption(self._in_json[0].encode())
        if (ext := self._extension(*TEXT_EXTENSIONS)) is not None:
            return text_caption(self.members[ext])
        if self._extension("json") is None:
            return None, "no caption: there is neither a txt nor a json member"
        problem = self._json[1] or f"has no string {self.caption_field or 'caption'!r}"
        return None, f"no caption: there is no txt member and the json member {problem}"

    @cached_property
    def _in_json(self) -> tuple[str, ...]:
        """The captions in ``json``, where it is there that the caption stands."""
        if self.caption_field or self._extension(*TEXT_EXTENSIONS) is None:
            return field_captions(self.fields, self.caption_field)
        return ()

    def _extension(self, *wanted: str) -> str | None:
        spelled = {ext.lower(): ext for ext in self.members}
        return next((spelled[ext] for ext in wanted if ext in spelled), None)


@dataclass(frozen=True)
class BadSample:
    """Something in a shard that cannot be used as a sample.

    ``kind`` is one of truncated, corrupt_archive, trailing_data, refused_member, repeated_key, stray_member,
    no_image; ``key`` is empty when it concerns the archive itself.
    """

    shard: str
    key: str
    reason: str
    kind: str


def read_samples(url: str, *, name: str | None = None, caption_field: str = "") -> Iterator[Sample | BadSample]:
    """Stream one shard's samples in order; what cannot be a sample comes as a ``BadSample`` in its place.

    A sample is bad as a whole when one of its members is refused (link, device, sparse or oversized file).
    When a key appears again later in the shard, the first run of members is the sample and each later run is
    bad. What is no part of a sample passes by between its members without ending it: a file without key and extension
    comes as a ``BadSample`` behind it, what systems leave behind (``._NAME``, ``__MACOSX/``, ``Thumbs.db``) not at all.
    Of a cut or damaged archive the samples before the damage are given, then a ``BadSample`` that says what
    befell it, under the key of the sample that was cut if there is one; an archive that ends at a member's border
    without its end-of-archive block is cut as well.

    Args:
        url: a local path or an fsspec URL; gzip, bzip2 and xz archives are read too.
        name: what to call the shard, by default its file name.
        caption_field: field of the samples' ``json`` that holds the caption; empty for ``txt``, or the usual fields.

    Raises:
        UserError: the file cannot be opened or read.
    """
    shard = name if name is not None else shard_names([url])[0]
    seen: set[str] = set()
    group: _Group | None = None
    usual = {"txt"}  # members in which the sample before had its caption: what a cut one lacks

    with open_shard(url) as stream:
        try:
            archive = Archive(stream)
            for member in archive:
                if member.kind == "folder" or is_left_behind(member.name):
                    continue
                problem = refusal(member)
                if (named := key_and_extension(member.name)) is None:
                    reason = problem or f"member {shown(member.name)} has no key and extension"
                    kind = "refused_member" if problem else "stray_member"
                    stray = BadSample(shard, safe_name(member.name), reason, kind)
                    if group is None:
                        yield stray
                        continue
                    group.between.append(stray)
                    if len(group.between) == MAX_BETWEEN:
                        yield _closed(group, shard, seen)
                        yield from group.between
                        group = None
                    continue
                key, ext = named
                if group is None or group.key != key or ext.lower() in group.lowered:
                    if group is not None:
                        yield _closed(group, shard, seen)
                        yield from group.between
                        usual = group.lowered & {*TEXT_EXTENSIONS, "json"}
                    group = _Group(key, caption_field)
                group.add(ext, member, problem)
        except ReadError as error:
            raise UserError(f"cannot read shard {url}: {error}") from error
        except MemoryError as error:
            raise UserError(f"cannot read shard {url}: out of memory: give it fewer --workers") from error
    yield from _at_the_end(archive.failure, group, shard, seen, usual)


@dataclass(frozen=True)
class Shard:
    """A shard, to be read as often as it is iterated: :func:`read_samples` of ``url`` under ``name``."""

    url: str
    name: str
    caption_field: str = ""

    def __iter__(self) -> Iterator[Sample | BadSample]:
        return read_samples(self.url, name=self.name, caption_field=self.caption_field)

    def accounted(self) -> Iterator[Sample | BadSample]:
        """The same, for an account of a set: an archive without a sample is a ``BadSample``, too."""
        empty = True
        for item in self:
            empty = False
            yield item
        if empty:
            yield BadSample(self.name, "", NO_SAMPLE, "truncated")


def _at_the_end(
    failure: Failure | None, group: _Group | None, shard: str, seen: set[str], usual: set[str]
) -> Iterator[Sample | BadSample]:
    """What is left when an archive has ended: the sample whose members came last, and how it ended."""
    between = group.between if group is not None else []
    if failure is not None and failure.cut_member is not None:
        named = key_and_extension(failure.cut_member)
        key, ext = named or (safe_name(failure.cut_member), "")
        if group is not None and (group.key != key or ext.lower() in group.lowered):
            yield _closed(group, shard, seen)
        yield from between
        yield BadSample(shard, key, failure.reason, failure.kind)
        return
    last = _closed(group, shard, seen) if group is not None else None
    cut = failure if failure is not None and failure.kind != "trailing_data" else None
    if cut is not None and last is not None and _was_cut(last, usual):
        yield from between
        yield BadSample(shard, last.key, cut.reason, cut.kind)
        return
    if last is not None:
        yield last
    yield from between
    if failure is not None:
        reason = failure.reason
        if cut is not None and last is not None:
            reason += f" (other members of sample {shown(last.key)} may have followed)"
        yield BadSample(shard, "", reason, failure.kind)


def _closed(group: _Group, shard: str, seen: set[str]) -> Sample | BadSample:
    """What the members of a key are, now that all are read; ``seen`` are the keys before it, and then this one too."""
    key, before = group.key, group.key in seen
    seen.add(key)
    if group.problem is not None:
        kind, reason = group.problem
        return BadSample(shard, key, reason, kind)
    if before:
        reason = f"key {shown(key)} stands in this shard before: its members must be side by side, each once"
        return BadSample(shard, key, f"{reason} (here: {listed(group.members)})", "repeated_key")
    sample = Sample(shard, key, group.members, group.offsets, group.caption_field)
    if sample.image_ext is None:
        reason = f"no image: none of {', '.join(IMAGE_EXTENSIONS)} among its members ({listed(group.members)})"
        return BadSample(shard, key, reason + cut_name(key, group.members, IMAGE_EXTENSIONS), "no_image")
    return sample


def _was_cut(last: Sample | BadSample, usual: set[str]) -> bool:
    """Whether the sample before the end of a cut archive lacks its image, or a caption where one is usual."""
    if isinstance(last, BadSample):
        return last.kind == "no_image"
    extensions = {ext.lower() for ext in last.members}
    return last.caption is None and not extensions & set(TEXT_EXTENSIONS) and bool(usual - extensions)


@contextlib.contextmanager
def machine_named(sample: Sample | BadSample) -> Iterator[None]:
    """Troubles of the machine while a sample is looked at end the job, by the sample's name; they are none of its own.

    Raises:
        UserError: memory ran out, or the system refused something.
    """
    where = f"sample {shown(sample.key)} of {sample.shard or 'the set'}"
    try:
        yield
    except (MemoryError, OSError) as error:
        why = f"{error.strerror};" if isinstance(error, OSError) and error.strerror else (
            "out of memory: give it fewer --workers, or a lower --max_pixels;"
        )
        raise UserError(f"{where}: {why} the same command goes on there") from error


def sample_bytes(sample: Sample | BadSample) -> int:
    """Bytes that a sample holds."""
    return sum(map(len, sample.members.values())) if isinstance(sample, Sample) else 0


@dataclass
class _Group:
    """Members of one key, as far as they were read."""

    key: str
    caption_field: str = ""
    members: dict[str, bytes] = field(default_factory=dict)
    offsets: dict[str, int] = field(default_factory=dict)
    lowered: set[str] = field(default_factory=set)
    between: list[BadSample] = field(default_factory=list)  # what stood among them and is no part of a sample
    problem: tuple[str, str] | None = None
    size: int = 0

    def add(self, ext: str, member: Member, problem: str | None) -> None:
        data = member.data
        self.lowered.add(ext.lower())
        self.size += len(data or b"") + BLOCK
        if problem is None and self.size > MAX_SAMPLE_BYTES:
            problem = f"refused sample {shown(self.key)}: its members have more than {MAX_SAMPLE_BYTES} bytes"
        if problem is not None:
            self.problem = self.problem or ("refused_member", problem)
            self.members.clear()
        elif data is not None and self.problem is None:
            self.members[ext] = data
            if member.offset is not None:
                self.offsets[ext] = member.offset

