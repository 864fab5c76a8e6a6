"""Tar shards: a safe streaming read of samples, and an atomic, byte-reproducible write.

A shard is a WebDataset tar: members ``key.ext`` with the same key, side by side, are one sample. Members are
data: their names are never used as paths, their contents never unpickled, and what cannot be a sample (links,
devices, names that point outside, a cut archive) is handed out as a ``BadSample`` with its reason.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import math
import os
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any

from curate.console import UsageError, UserError, printable, write_atomic
from curate.tar import BLOCK, MAX_MEMBER_BYTES, Archive, Member, ReadError, shown

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
MAX_SAMPLE_BYTES = 1 << 30  # all members of a sample together, which memory holds
MAX_NAME = 4096  # characters of a member's name
_WRITTEN_AT_ONCE = 1 << 20
MAX_CAPTION_BYTES = 1 << 20
MAX_JSON_BYTES = 1 << 24  # of a json that is read for its caption; parsed, it takes many times its size
_DRIVE = re.compile(r"[A-Za-z]:[/\\]")
# WebDataset's rule: the key ends at the first dot of the last path component.
_MEMBER_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)", re.DOTALL)


@dataclass(frozen=True)
class Sample:
    """One sample as it stands in its shard: ``members`` maps extensions (as spelled) to bytes, in order.

    ``offsets`` says where in the file the bytes of each begin; it is empty where the archive is compressed.
    """

    shard: str
    key: str
    members: Mapping[str, bytes] = field(repr=False)
    offsets: Mapping[str, int] = field(default_factory=dict, repr=False, compare=False)

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
        """The caption: ``txt``, else the string ``caption`` in ``json``; None if missing, too large or not UTF-8."""
        return self._caption[0]

    @property
    def caption_problem(self) -> str | None:
        """Why ``caption`` is None, or None when there is a caption (which may be empty)."""
        return self._caption[1]

    def number(self, name: str) -> float | None:
        """The number in the field ``name`` of ``json``; None if there is no finite number to read there."""
        value = self._fields.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return None
        with contextlib.suppress(OverflowError):
            return float(value) if math.isfinite(value) else None
        return None

    @cached_property
    def _fields(self) -> dict[str, Any]:
        ext = self._extension("json")
        if ext is None or len(self.members[ext]) > MAX_JSON_BYTES:
            return {}
        try:
            fields = json.loads(self.members[ext])
        except (ValueError, RecursionError):
            return {}
        return fields if isinstance(fields, dict) else {}

    @cached_property
    def _caption(self) -> tuple[str | None, str | None]:
        if (ext := self._extension("txt")) is not None:
            return _text_caption(self.members[ext])
        if (ext := self._extension("json")) is not None:
            return _json_caption(self.members[ext])
        return None, "no caption: there is neither a txt nor a json member"

    def _extension(self, *wanted: str) -> str | None:
        spelled = {ext.lower(): ext for ext in self.members}
        return next((spelled[ext] for ext in wanted if ext in spelled), None)


def _text_caption(data: bytes) -> tuple[str | None, str | None]:
    if len(data) > MAX_CAPTION_BYTES:
        return None, f"caption has {len(data)} bytes, more than {MAX_CAPTION_BYTES}"
    try:
        return data.decode("utf-8-sig").strip(), None
    except UnicodeDecodeError:
        return None, "caption is not UTF-8"


def _json_caption(data: bytes) -> tuple[str | None, str | None]:
    if len(data) > MAX_JSON_BYTES:
        size = f"{len(data)} bytes, more than {MAX_JSON_BYTES}"
        return None, f"no caption: there is no txt member and the json member has {size}"
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError):
        return None, "no caption: there is no txt member and the json member is not valid JSON"
    caption = fields.get("caption") if isinstance(fields, dict) else None
    if not isinstance(caption, str):
        return None, "no caption: there is no txt member and the json member has no string 'caption'"
    # JSON can spell lone surrogates, which no UTF-8 file can hold.
    return _text_caption(caption.encode("utf-8", "replace"))


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


def expand_shards(patterns: Sequence[str] | str) -> list[str]:
    """Shard paths or URLs that the patterns stand for, each once, in the order of the patterns.

    A pattern is a path, a folder (its ``*.tar``, sorted), a glob, a brace range (``{000000..000099}.tar``)
    or a URL that fsspec opens.

    Raises:
        UsageError: a pattern names nothing, or is a ``pipe:`` URL (no shard list is ever run as a command).
    """
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    if not patterns:
        raise UsageError("no shards given: name tar files, a folder of them, or a glob")
    found = dict.fromkeys(url for pattern in patterns for url in _expand(str(pattern)))
    return list(found)


def shard_names(urls: Sequence[str]) -> list[str]:
    """The name under which each shard stands in a ledger: its file name, with as many parent folders in front
    as tell it apart from the others, so that names do not depend on where the set lies.
    """
    parts = [PurePosixPath(_path_of(url)).parts for url in urls]
    names = [path[-1] for path in parts]
    depth = 1
    while len(set(names)) < len(names):
        repeated = {name for name in names if names.count(name) > 1}
        depth += 1
        if depth > max(len(path) for path in parts):
            return list(urls)
        names = [
            "/".join(path[-depth:]) if name in repeated else name
            for name, path in zip(names, parts, strict=True)
        ]
    return names


def find_shards(names: Iterable[str], urls: Sequence[str], source: str) -> dict[str, int]:
    """Which of the shards at ``urls`` each name of :func:`shard_names` means: the one whose path ends with it.

    Args:
        names: of shards, as a ledger or a list has them; perhaps given when the shards stood among others.
        urls: paths or URLs.
        source: where the names come from, for messages.

    Returns:
        Position in ``urls`` by name; names that mean none of them are left out.

    Raises:
        UsageError: a name means several of them.
    """
    found: dict[str, int] = {}
    by_tail: dict[int, dict[str, list[int]]] = {}  # by the number of path components
    for name in dict.fromkeys(names):
        depth = len(PurePosixPath(name).parts)
        if depth not in by_tail:
            tails = by_tail[depth] = {}
            for number, url in enumerate(urls):
                tails.setdefault("/".join(PurePosixPath(_path_of(url)).parts[-depth:]), []).append(number)
        matches = by_tail[depth].get(name) or [number for number, url in enumerate(urls) if url == name]
        if len(matches) > 1:
            several = ", ".join(urls[number] for number in matches[:3])
            raise UsageError(
                f"{source}: the shard {printable(name)} may be any of {several}: put as much of its path in front of "
                "it there as tells them apart"
            )
        if matches:
            found[name] = matches[0]
    return found


def read_samples(url: str, *, name: str | None = None) -> Iterator[Sample | BadSample]:
    """Stream one shard's samples in order; what cannot be a sample comes as a ``BadSample`` in its place.

    A sample is bad as a whole when one of its members is refused (link, device, sparse or oversized file).
    When a key appears again later in the shard, the first run of members is the sample and each later run is
    bad. Of a cut or damaged archive the samples before the damage are given, then a ``BadSample`` that says what
    befell it, under the key of the sample that was cut if there is one; an archive that ends at a member's border
    without its end-of-archive block is cut as well.

    Args:
        url: a local path or an fsspec URL; gzip, bzip2 and xz archives are read too.
        name: what to call the shard, by default its file name.

    Raises:
        UserError: the file cannot be opened or read.
    """
    shard = name if name is not None else shard_names([url])[0]
    seen: set[str] = set()
    group: _Group | None = None
    usual = {"txt"}  # where the sample before had its caption: what a cut one lacks

    def close(finished: _Group) -> Sample | BadSample:
        key = finished.key
        if finished.problem is not None:
            seen.add(key)
            kind, reason = finished.problem
            return BadSample(shard, key, reason, kind)
        if key in seen:
            extensions = _listed(finished.members)
            reason = f"key {shown(key)} stands in this shard before: its members must be side by side, each once"
            return BadSample(shard, key, f"{reason} (here: {extensions})", "repeated_key")
        seen.add(key)
        sample = Sample(shard, key, finished.members, finished.offsets)
        if sample.image_ext is None:
            extensions = _listed(finished.members)
            reason = f"no image: none of {', '.join(IMAGE_EXTENSIONS)} among its members ({extensions})"
            return BadSample(shard, key, reason, "no_image")
        return sample

    with open_shard(url) as stream:
        try:
            archive = Archive(stream)
            for member in archive:
                if member.kind == "folder":
                    continue
                problem = _refusal(member)
                if (named := _key_and_extension(member.name)) is None:
                    if group is not None:
                        yield close(group)
                        group = None
                    reason = problem or f"member {shown(member.name)} has no key and extension"
                    kind = "refused_member" if problem else "stray_member"
                    yield BadSample(shard, _safe_name(member.name), reason, kind)
                    continue
                key, ext = named
                if group is None or group.key != key or ext.lower() in group.lowered:
                    if group is not None:
                        yield close(group)
                        usual = group.lowered & {"txt", "json"}
                    group = _Group(key)
                group.add(ext, member, problem)
        except ReadError as error:
            raise UserError(f"cannot read shard {url}: {error}") from error

        failure = archive.failure
        if failure is not None and failure.cut_member is not None:
            named = _key_and_extension(failure.cut_member)
            key, ext = named or (_safe_name(failure.cut_member), "")
            if group is not None and (group.key != key or ext.lower() in group.lowered):
                yield close(group)
            yield BadSample(shard, key, failure.reason, failure.kind)
            return
        last = close(group) if group is not None else None
        if failure is None or failure.kind == "trailing_data":
            if last is not None:
                yield last
            if failure is not None:
                yield BadSample(shard, "", failure.reason, failure.kind)
        elif last is not None and _was_cut(last, usual):
            yield BadSample(shard, last.key, failure.reason, failure.kind)
        else:
            reason = failure.reason
            if last is not None:
                yield last
                reason += f" (other members of sample {shown(last.key)} may have followed)"
            yield BadSample(shard, "", reason, failure.kind)


def _was_cut(last: Sample | BadSample, usual: set[str]) -> bool:
    """Whether the sample before the end of a cut archive lacks its image, or a caption where one is usual."""
    if isinstance(last, BadSample):
        return last.kind == "no_image"
    extensions = {ext.lower() for ext in last.members}
    return last.caption is None and "txt" not in extensions and bool(usual - extensions)


def sample_bytes(sample: Sample | BadSample) -> int:
    """Bytes that a sample holds."""
    return sum(map(len, sample.members.values())) if isinstance(sample, Sample) else 0


def shard_bytes(url: str) -> int | None:
    """Size of a local shard; None for a URL, whose store would have to be asked."""
    try:
        return os.stat(url).st_size if "://" not in url else None
    except OSError:  # who reads the shard will say what is wrong
        return None


def write_shard(path: str | Path, samples: Iterable[tuple[str, Mapping[str, bytes]]]) -> int:
    """Write samples as one tar, atomically; equal samples give equal bytes.

    Args:
        path: the local file to write; it appears only when complete.
        samples: pairs of key and members (extension → bytes), written in this order.

    Returns:
        The number of samples written.

    Raises:
        ValueError: a key is repeated, or a key or extension would not be read back as it is.
    """
    written: set[str] = set()
    with write_atomic(path) as temporary, open(temporary, "wb", buffering=_WRITTEN_AT_ONCE) as file:
        for key, members in samples:
            if key in written:
                raise ValueError(f"key {key!r} twice in shard {path}")
            written.add(key)
            for ext, data in members.items():
                member = f"{key}.{ext}"
                if _key_and_extension(member) != (key, ext):
                    raise ValueError(
                        f"{member!r} cannot be a member of a shard: it would not be read back as it is"
                    )
                file.write(_header(member, len(data)))
                file.write(data)
                file.write(bytes(-len(data) % BLOCK))
        file.write(bytes(2 * BLOCK))
        file.write(bytes(-file.tell() % tarfile.RECORDSIZE))
    return len(written)


def _header(name: str, size: int) -> bytes:
    """What stands before a member's data: ``tarfile``'s bytes, in a tenth of its time for usual names and sizes."""
    if not name.isascii() or len(name) > 100 or size >= 1 << 33:
        return _tarfile_header(name, size)
    name_bytes, digits = name.encode(), b"%011o" % size
    checksum = _NAMELESS_SUM + sum(name_bytes) + sum(digits) - sum(b"00000000000")
    return b"".join(
        (name_bytes, bytes(100 - len(name)), _NAMELESS[100:124], digits, _NAMELESS[135:148], b"%06o\0 " % checksum,
         _NAMELESS[156:])
    )  # fmt: skip


def _tarfile_header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = size, 0o644, 0
    return info.tobuf(tarfile.PAX_FORMAT)


_NAMELESS = _tarfile_header("", 0)
_NAMELESS_SUM = int(_NAMELESS[148:154], 8)


def _key_and_extension(name: str) -> tuple[str, str] | None:
    """Those of a member that may be part of a sample; None if its name is refused or has none."""
    return split_name(name) if len(name) <= MAX_NAME and _plain(name) else None


def split_name(member: str) -> tuple[str, str] | None:
    """``"a/b.seg.png"`` → ``("a/b", "seg.png")``, WebDataset's rule; None if there is no key or extension."""
    match = _MEMBER_NAME.fullmatch(member)
    return (match[1], match[2]) if match else None


@contextlib.contextmanager
def open_shard(url: str) -> Iterator[IO[bytes]]:
    """The bytes of a shard, a local path or an fsspec URL. Raises ``UserError`` when it cannot be opened."""
    _refuse_pipe(url)
    try:
        if "://" in url:
            import fsspec

            opened = fsspec.open(url, "rb").open()
        else:
            opened = open(url, "rb")  # noqa: SIM115  # closed below, where errors are the reader's own
    except Exception as error:  # fsspec's file systems raise their own kinds
        raise UserError(f"cannot open shard {url}: {error}") from error
    with opened as stream:
        yield stream


@dataclass
class _Group:
    """Members of one key, as far as they were read."""

    key: str
    members: dict[str, bytes] = field(default_factory=dict)
    offsets: dict[str, int] = field(default_factory=dict)
    lowered: set[str] = field(default_factory=set)
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


def _refusal(member: Member) -> str | None:
    """Why this member is not accepted, or None."""
    name = shown(member.name)
    if len(member.name) > MAX_NAME:
        return f"refused member {name}: its name has {len(member.name)} characters, more than {MAX_NAME}"
    if not _plain(member.name):
        return f"refused member {name}: its name is absolute, leads outside or is not UTF-8"
    if member.problem is not None:
        return f"refused member {name}: {member.problem}"
    if member.kind == "link":
        return f"refused member {name}: it is a link"
    if member.kind == "device":
        return f"refused member {name}: it is a device or pipe"
    if member.kind != "file":
        return f"refused member {name}: it is not a plain file"
    if member.data is None:
        return f"refused member {name}: {member.size} bytes, more than {MAX_MEMBER_BYTES}"
    return None


def _plain(name: str) -> bool:
    parts = name.replace("\\", "/").split("/")
    if not parts[0] or ".." in parts or _DRIVE.match(name) or "\0" in name:
        return False
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _listed(extensions: Iterable[str]) -> str:
    text = printable(", ".join(extensions))
    return text if len(text) <= 200 else text[:200] + "…"


def _safe_name(name: str) -> str:
    """A refused member's name as it may stand in a ledger."""
    return printable(name[:MAX_NAME])


def _refuse_pipe(url: str) -> None:
    if re.match(r"\s*pipe:", url, re.IGNORECASE):
        raise UsageError(f"shards {url!r}: pipe: URLs are refused, name files or fsspec URLs instead")


def _path_of(url: str) -> str:
    return url.split("://", 1)[-1].split("?", 1)[0] if "://" in url else Path(url).as_posix()


def _expand(pattern: str) -> list[str]:
    _refuse_pipe(pattern)
    local = Path(pattern).expanduser()
    if "://" not in pattern and local.is_file():
        return [str(local)]
    from braceexpand import braceexpand

    try:
        patterns = list(braceexpand(pattern))
    except ValueError as error:  # unbalanced braces
        raise UsageError(f"shards {pattern!r}: {error}") from error
    return [
        url for one in patterns for url in (_expand_url(one) if "://" in one else _expand_path(one, pattern))
    ]


def _expand_path(pattern: str, given: str) -> list[str]:
    path = Path(pattern).expanduser()
    if path.is_dir():
        found = sorted(str(file) for file in path.glob("*.tar"))
        if not found:
            hint = f" (did you mean {path / 'shards'}?)" if (path / "shards").is_dir() else ""
            raise UsageError(f"shards {given!r}: the folder holds no *.tar file{hint}")
        return found
    if path.exists():
        return [str(path)]
    found = sorted(file for file in glob.glob(str(path), recursive=True) if Path(file).is_file())
    if not found:
        raise UsageError(f"shards {given!r}: no such file" + ("" if pattern == given else f" ({pattern})"))
    return found


def _expand_url(pattern: str) -> list[str]:
    if not glob.has_magic(pattern):
        return [pattern]
    import fsspec

    try:
        filesystem, path = fsspec.core.url_to_fs(pattern)
        found = sorted(filesystem.unstrip_protocol(file) for file in filesystem.glob(path))
    except Exception as error:
        raise UsageError(f"shards {pattern!r}: {error}") from error
    if not found:
        raise UsageError(f"shards {pattern!r}: no such file")
    return found


def fingerprint(url: str) -> list[str | int]:
    """Changes when a shard does: size, time of change, first and last 64 KiB; or what its store says."""
    if "://" in url:
        import fsspec

        try:
            return [version(*fsspec.core.url_to_fs(url))]
        except Exception as error:
            raise UserError(f"cannot open shard {url}: {error}") from error
    with open_shard(url) as file:
        stat = os.fstat(file.fileno())
        digest = hashlib.sha256(file.read(1 << 16))
        file.seek(max(0, stat.st_size - (1 << 16)))
        digest.update(file.read(1 << 16))
    return [stat.st_size, stat.st_mtime_ns, digest.hexdigest()]


def version(filesystem: AbstractFileSystem, path: str) -> str:
    """What a store calls this version of a file: size and tag, which it gives alike in a listing and by itself.

    Stores without tags are asked for all they say of the file.
    """
    info = filesystem.info(path)
    tag = next((info[name] for name in ("ETag", "etag", "md5Hash") if info.get(name)), None)
    return f"{info['size']} {tag}" if tag else str(filesystem.ukey(path))
