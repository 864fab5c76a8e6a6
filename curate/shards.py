"""Tar shards: a safe streaming read of samples, and an atomic, byte-reproducible write.

A shard is a WebDataset tar: members ``key.ext`` with the same key, side by side, are one sample. Members are
data: their names are never used as paths, their contents never unpickled, and what cannot be a sample (links,
devices, names that point outside, a cut archive) is handed out as a ``BadSample`` with its reason.
"""

from __future__ import annotations

import contextlib
import glob
import io
import json
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Self

from curate.console import UsageError, UserError, write_atomic

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
MAX_MEMBER_BYTES = 1 << 28
# WebDataset's rule: the key ends at the first dot of the last path component.
_MEMBER_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)", re.DOTALL)
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Sample:
    """One sample as it stands in its shard: ``members`` maps extensions (as spelled) to bytes, in order."""

    shard: str
    key: str
    members: Mapping[str, bytes] = field(repr=False)

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
    def caption(self) -> str | None:
        """The caption: ``txt``, else the string ``caption`` in ``json``; None if missing or not UTF-8."""
        return self._read_caption()[0]

    @property
    def caption_problem(self) -> str | None:
        """Why ``caption`` is None, or None when there is a caption (which may be empty)."""
        return self._read_caption()[1]

    def _read_caption(self) -> tuple[str | None, str | None]:
        if (ext := self._extension("txt")) is not None:
            try:
                return self.members[ext].decode("utf-8-sig").strip(), None
            except UnicodeDecodeError:
                return None, "caption is not UTF-8"
        if (ext := self._extension("json")) is not None:
            try:
                fields = json.loads(self.members[ext])
            except (ValueError, RecursionError):
                return None, "no caption: there is no txt member and the json member is not valid JSON"
            caption = fields.get("caption") if isinstance(fields, dict) else None
            if isinstance(caption, str):
                # JSON can spell lone surrogates, which no UTF-8 file can hold.
                return caption.encode("utf-8", "replace").decode().strip(), None
            return None, "no caption: there is no txt member and the json member has no string 'caption'"
        return None, "no caption: there is neither a txt nor a json member"

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


def read_samples(url: str, *, name: str | None = None) -> Iterator[Sample | BadSample]:
    """Stream one shard's samples in order; what cannot be a sample comes as a ``BadSample`` in its place.

    A sample is bad as a whole when one of its members is refused (link, device, sparse or oversized file).
    When a key appears again later in the shard, the first run of members is the sample and each later run is
    bad. Of a cut archive the samples before the cut are given, then a ``BadSample`` of kind ``truncated``; an
    archive that ends at a member's border without its end-of-archive block is cut as well.

    Args:
        url: a local path or an fsspec URL; gzip, bzip2 and xz archives are read too.
        name: what to call the shard, by default its file name.

    Raises:
        UserError: the file cannot be opened.
    """
    shard = name if name is not None else shard_names([url])[0]
    seen: set[str] = set()
    group: _Group | None = None

    def close(finished: _Group) -> Sample | BadSample:
        key = finished.key
        if finished.problem is not None:
            seen.add(key)
            kind, reason = finished.problem
            return BadSample(shard, key, reason, kind)
        if key in seen:
            extensions = ", ".join(finished.members)
            reason = f"key {key!r} stands in this shard before: its members must be side by side, each once"
            return BadSample(shard, key, f"{reason} (here: {extensions})", "repeated_key")
        seen.add(key)
        sample = Sample(shard, key, finished.members)
        if sample.image_ext is None:
            extensions = ", ".join(finished.members)
            reason = f"no image: none of {', '.join(IMAGE_EXTENSIONS)} among its members ({extensions})"
            return BadSample(shard, key, reason, "no_image")
        return sample

    with open_shard(url) as stream:
        reader = _Archive(stream)
        for member, data in reader:
            problem = _refusal(member) or (None if data is not None else _oversized(member))
            key, ext = split_name(member.name) or (None, None)
            if key is None or ext is None or (problem and not _plain(member.name)):
                reason = problem or f"member {_plain_name(member.name)!r} has no key and extension"
                if group is not None:
                    yield close(group)
                    group = None
                yield BadSample(
                    shard, _plain_name(member.name), reason, "refused_member" if problem else "stray_member"
                )
                continue
            if group is None or group.key != key or ext.lower() in group.lowered:
                if group is not None:
                    yield close(group)
                group = _Group(key)
            group.lowered.add(ext.lower())
            if problem:
                group.problem = group.problem or ("refused_member", problem)
            elif data is not None:
                group.members[ext] = data

        failure = reader.failure
        if failure is not None and failure.cut_member is not None:
            cut = split_name(failure.cut_member)
            key = cut[0] if cut and _plain(failure.cut_member) else _plain_name(failure.cut_member)
            if group is not None and group.key != key:
                yield close(group)
            yield BadSample(shard, key, failure.reason, failure.kind)
            return
        last = close(group) if group is not None else None
        whole = isinstance(last, Sample) and last.caption is not None
        if last is not None and not whole and failure is not None and failure.kind != "trailing_data":
            yield BadSample(shard, last.key, failure.reason, failure.kind)  # its other members were cut off
            return
        if last is not None:
            yield last
        if failure is not None:
            yield BadSample(shard, "", failure.reason, failure.kind)


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
    with write_atomic(path) as temporary, tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT) as tar:
        for key, members in samples:
            if key in written:
                raise ValueError(f"key {key!r} twice in shard {path}")
            written.add(key)
            for ext, data in members.items():
                member = f"{key}.{ext}"
                if split_name(member) != (key, ext) or not _plain(member):
                    raise ValueError(
                        f"{member!r} cannot be a member of a shard: it would not be read back as it is"
                    )
                info = tarfile.TarInfo(member)
                info.size, info.mode, info.mtime = len(data), 0o644, 0
                tar.addfile(info, io.BytesIO(data))
    return len(written)


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
    lowered: set[str] = field(default_factory=set)
    problem: tuple[str, str] | None = None


@dataclass(frozen=True)
class _Failure:
    kind: str
    reason: str
    cut_member: str | None = None


class _CheckedTarInfo(tarfile.TarInfo):
    """Remembers how reading headers ended: tarfile ends alike on an end-of-archive block and on a cut."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(tar)
        except tarfile.HeaderError as error:
            tar.header_end = error  # type: ignore[attr-defined]
            raise


class _Archive:
    """Iterates over (member, data) of a tar stream; ``failure`` says afterwards if it ended as it should not.

    ``data`` is None for members that are not plain files of acceptable size.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream = stream
        self.failure: _Failure | None = None

    def __iter__(self) -> Iterator[tuple[tarfile.TarInfo, bytes | None]]:
        last = None
        try:
            with tarfile.open(fileobj=self.stream, mode="r|*", tarinfo=_CheckedTarInfo) as tar:
                while (member := tar.next()) is not None:
                    tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep every header
                    if member.isdir():
                        continue
                    last = member.name
                    data = None
                    if member.isreg() and not member.issparse() and member.size <= MAX_MEMBER_BYTES:
                        try:
                            data = self._read(tar, member)
                        except (EOFError, OSError, tarfile.TarError, ValueError) as error:
                            self.failure = _cut_in(member, error)
                            return
                    yield member, data
                self.failure = self._ending(tar, last)
        except (EOFError, OSError, tarfile.TarError, ValueError) as error:
            where = f"after member {_plain_name(last)!r}" if last is not None else "at its start"
            cut = isinstance(error, EOFError) or "unexpected end" in str(error) or "truncated" in str(error)
            text = str(error) or type(error).__name__
            self.failure = (
                _Failure("truncated", f"archive is truncated {where}: {text}")
                if cut
                else _Failure("corrupt_archive", f"archive is not readable {where}: {text}")
            )

    @staticmethod
    def _read(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
        handle = tar.extractfile(member)
        data = handle.read() if handle is not None else b""
        if len(data) != member.size:
            raise EOFError("unexpected end of data")
        return data

    @staticmethod
    def _ending(tar: tarfile.TarFile, last: str | None) -> _Failure | None:
        end = getattr(tar, "header_end", None)
        where = f"after member {_plain_name(last)!r}" if last is not None else "at its start"
        if isinstance(end, tarfile.EOFHeaderError):  # type: ignore[attr-defined]
            while block := tar.fileobj.read(_BLOCK):
                if block.count(0) != len(block):
                    reason = (
                        f"archive goes on behind its end-of-archive block, {where} (archives joined by cat?)"
                    )
                    return _Failure("trailing_data", f"{reason}: what follows is not read")
            return None
        if isinstance(end, tarfile.InvalidHeaderError):  # type: ignore[attr-defined]
            return _Failure("corrupt_archive", f"archive is corrupt {where}: {end}")
        return _Failure("truncated", f"archive is truncated {where}: its end-of-archive block is missing")


def _cut_in(member: tarfile.TarInfo, error: Exception) -> _Failure:
    text = str(error) or type(error).__name__
    if "unexpected end" in text or isinstance(error, EOFError):
        return _Failure(
            "truncated", f"archive is truncated inside member {_plain_name(member.name)!r}", member.name
        )
    return _Failure(
        "corrupt_archive",
        f"archive is not readable inside member {_plain_name(member.name)!r}: {text}",
        member.name,
    )


def _refusal(member: tarfile.TarInfo) -> str | None:
    """Why this member is not accepted, or None."""
    name = _plain_name(member.name)
    if not _plain(member.name):
        return f"refused member {name!r}: its name is absolute, leads outside or is not UTF-8"
    if member.issym() or member.islnk():
        return f"refused member {name!r}: it is a link"
    if member.ischr() or member.isblk() or member.isfifo():
        return f"refused member {name!r}: it is a device or pipe"
    if not member.isreg() or member.issparse():
        return f"refused member {name!r}: it is not a plain file"
    return None


def _oversized(member: tarfile.TarInfo) -> str:
    return f"refused member {_plain_name(member.name)!r}: {member.size} bytes, more than {MAX_MEMBER_BYTES}"


def _plain(name: str) -> bool:
    parts = re.split(r"[/\\]", name)
    if not name or not parts[0] or ".." in parts or re.match(r"[A-Za-z]:[/\\]", name) or "\0" in name:
        return False
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _plain_name(name: str) -> str:
    return name.encode("utf-8", "backslashreplace").decode()


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
