"""A strict reader of tar streams: the members in order, and afterwards whether the archive ended as it should.

The standard library's reader is made for archives that one trusts. In a stream it ends alike at the end of an
archive and at a cut between members, never looks at gzip's checksum nor at what follows the first gzip stream, takes
extended headers of any size into memory, and recurses over chains of them. This one reads the same archives (V7,
ustar, PAX, GNU long names; plain or compressed by gzip, bzip2 or xz) in one pass, allocates nothing on the word of a
header, and hands out what it does not read (links, devices, sparse files) by name.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any, Literal, Protocol

from afresh.errors import printable, reason

BLOCK = 512
MAX_MEMBER_BYTES = 1 << 28
MAX_EXTENDED_HEADER_BYTES = 1 << 20
RECORD = 20 * BLOCK  # to which tar pads an archive; some tools add another one
_PIECE = 1 << 20
_ZEROS = bytes(BLOCK)
Kind = Literal["file", "folder", "link", "device", "other"]
FailureKind = Literal["truncated", "corrupt_archive", "trailing_data"]
_KINDS: dict[bytes, Kind] = {
    b"0": "file",
    b"\0": "file",
    b"7": "file",
    b"1": "link",
    b"2": "link",
    b"3": "device",
    b"4": "device",
    b"5": "folder",
    b"6": "device",
}
_LONG_NAME, _LONG_LINK, _SPARSE, _GLOBAL = b"L", b"K", b"S", b"g"
_EXTENDED = (_LONG_NAME, _LONG_LINK, _GLOBAL, b"x", b"X")


@dataclass(frozen=True)
class Member:
    """One member of an archive.

    ``data`` is None unless it is a plain file of at most ``MAX_MEMBER_BYTES`` without a ``problem``. ``offset`` is
    where the data begin in the file, None in a compressed one. Bytes of the name that are not UTF-8 are lone surrogates
    in ``name``.
    """

    name: str
    kind: Kind
    size: int
    data: bytes | None = None
    problem: str | None = None
    offset: int | None = None


@dataclass(frozen=True)
class Failure:
    """How an archive ended before its end: ``truncated``, ``corrupt_archive``, or ``trailing_data`` after its end.

    ``cut_member`` is the member whose data were not all there, if it ended within one.
    """

    kind: FailureKind
    reason: str
    cut_member: str | None = None


class ReadError(Exception):
    """The stream itself could not be read, which says nothing about the archive; the cause is its ``__cause__``."""


class Archive:
    """Iterates once over the members of a tar stream; ``failure`` is then None if all of it was read.

    Members that a well-formed header describes are given up to the first damage. What stands behind it is not guessed
    at: a header that looks right there may be part of a file.

    Raises:
        ReadError: (iterating) the stream raised an error.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        self.failure: Failure | None = None
        self._source = _decompressed(stream)
        self._position = 0  # in the stream, decompressed
        self._last: str | None = None  # name of the member before, for the reason
        self._padding = 0  # bytes up to the next header
        self._unended = False  # a compressed stream was cut
        self._missing = False  # the stream ended before what was last asked for

    def __iter__(self) -> Iterator[Member]:
        try:
            yield from self._members()
        except _Damage as damage:
            self.failure = damage.failure
        except _Undecodable as error:
            self.failure = Failure("corrupt_archive", f"archive is not readable {self._where()}: {error}")

    def _members(self) -> Iterator[Member]:
        extra = _Extra()
        fixed = _Extra()  # by global headers
        while (block := self._block()) != _ZEROS:
            if len(block) < BLOCK:
                missing = "its end-of-archive block is missing" if not block else "it ends inside a header"
                raise _Damage("truncated", f"archive is truncated {self._where()}: {missing}")
            header = _Header.parse(block)
            if isinstance(header, str):
                what = "is corrupt" if self._last is not None else "is no tar archive, or corrupt,"
                if self._last is None and block.startswith(b"PK\3\4"):
                    raise _Damage("corrupt_archive", "archive is a zip, no tar: `curate import` makes shards of it")
                raise _Damage("corrupt_archive", f"archive {what} {self._where()}: {header}")
            if header.type in _EXTENDED:
                (fixed if header.type == _GLOBAL else extra).add(header, self._extension(header))
                continue
            extra.fill_from(fixed)
            yield self._member(header, extra)
            extra = _Extra()
        if extra.any():
            reason = f"archive is corrupt {self._where()}: an extended header without its member"
            raise _Damage("corrupt_archive", reason)
        self._read_to_the_end()

    def _block(self) -> bytes:
        """The next header. The padding before it belongs to no member: one that is cut there is whole."""
        padding, self._padding = self._padding, 0
        self._take(padding)
        return self._take(BLOCK)

    def _member(self, header: _Header, extra: _Extra) -> Member:
        name = header.name if extra.name is None else extra.name
        size = header.size if extra.size is None else extra.size
        text = name.decode("utf-8", "surrogateescape")
        kind = _KINDS.get(header.type, "other")
        if header.type == b"\0" and name.endswith(b"/"):
            kind = "folder"  # as V7 wrote them
        if kind in ("link", "device", "folder"):
            size = 0  # whatever their header says
        if extra.sparse or header.type == _SPARSE:
            kind = "other"
        if header.type == _SPARSE:
            self._skip_sparse_map(block_goes_on=header.sparse_goes_on, name=text)
        wanted = kind == "file" and extra.problem is None and size <= MAX_MEMBER_BYTES
        offset = self._position if isinstance(self._source, _Source) else None
        try:
            data = (self._take if wanted else self._skip)(size)
        except _Undecodable as error:
            reason = f"archive is not readable inside member {shown(text)}: {error}"
            raise _Damage("corrupt_archive", reason, text) from error
        if self._missing:
            raise _Damage("truncated", f"archive is truncated inside member {shown(text)}", text)
        self._padding = -size % BLOCK
        self._last = text
        return Member(text, kind, size, data, extra.problem, offset)

    def _extension(self, header: _Header) -> bytes | None:
        """Contents of an extended header; None, and skipped, if it is too large."""
        data = (self._take if header.size <= MAX_EXTENDED_HEADER_BYTES else self._skip)(header.size)
        self._padding = -header.size % BLOCK
        if self._missing:
            raise _Damage("truncated", f"archive is truncated {self._where()}: it ends inside an extended header")
        return data

    def _skip_sparse_map(self, block_goes_on: bool, name: str) -> None:
        while block_goes_on:
            block = self._take(BLOCK)
            if len(block) < BLOCK:
                raise _Damage("truncated", f"archive is truncated inside member {shown(name)}", name)
            block_goes_on = block[504] != 0

    def _take(self, size: int) -> bytes:
        """``size`` bytes, or fewer, and ``_missing``, where the stream ends."""
        pieces = []
        while size > 0 and not self._missing:
            piece = self._piece(size)
            self._missing = not piece
            pieces.append(piece)
            size -= len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _piece(self, at_most: int) -> bytes:
        """The next bytes of the stream, none at its end."""
        try:
            piece = self._source.read(min(at_most, _PIECE))
            self._position += len(piece)
            return piece
        except ReadError:
            raise
        except EOFError:  # of a decompressor, whose stream does not end
            self._unended = True
            return b""
        except MemoryError as error:  # a trouble of the machine, not of the archive
            raise ReadError(f"out of memory {self._where()}") from error
        except Exception as error:  # each decompressor raises its own kinds
            raise _Undecodable(reason(error)) from error

    def _skip(self, size: int) -> bytes | None:
        """Read ``size`` bytes and forget them, or fewer, and ``_missing``, where the stream ends."""
        while size > 0 and not self._missing:
            size -= len(self._take(min(size, _PIECE)))
        return None

    def _read_to_the_end(self) -> None:
        """A compressed archive is known to be whole only where its stream ends; zeros may stand for what was lost."""
        ends = -(-(self._position + BLOCK) // RECORD) * RECORD  # with a second block of zeros, and padding
        while piece := self._piece(_PIECE):
            if piece.count(0) != len(piece):
                reason = f"archive goes on behind its end-of-archive block, {self._where()} (archives joined by cat?)"
                raise _Damage("trailing_data", f"{reason}: what follows is not read")
        if self._unended:
            raise _Damage("truncated", f"archive is truncated {self._where()}: its compressed stream does not end")
        if (surplus := self._position - ends) > RECORD:
            what = f"{surplus} zero bytes stand behind its end, more than tar's padding: what was there may be lost"
            raise _Damage("truncated", f"archive is truncated {self._where()}: {what}")

    def _where(self) -> str:
        return f"after member {shown(self._last)}" if self._last is not None else "at its start"


def shown(name: str, at_most: int = 200) -> str:
    """A member's name for a message: quoted, printable, and no longer than messages are read."""
    return f"'{printable(name if len(name) <= at_most else name[:at_most] + '…')}'"


@dataclass(frozen=True)
class _Header:
    name: bytes
    type: bytes
    size: int
    sparse_goes_on: bool

    @classmethod
    def parse(cls, block: bytes) -> _Header | str:
        """The header that a block holds, or what is wrong with it."""
        checksum, size = _number(block[148:156]), _number(block[124:136])
        if checksum is None or checksum not in _checksums(block):
            return "bad checksum"
        if size is None:
            return "a header gives no valid size"
        name = _until_nul(block[:100])
        if block[257:263] == b"ustar\0" and (prefix := _until_nul(block[345:500])):
            name = prefix + b"/" + name
        return cls(name, block[156:157], size, sparse_goes_on=block[482] != 0)


class _Extra:
    """What extended headers say of the member that follows them."""

    def __init__(self) -> None:
        self.name: bytes | None = None
        self.size: int | None = None
        self.sparse = False
        self.problem: str | None = None
        self._added = False

    def add(self, header: _Header, data: bytes | None) -> None:
        self._added = True
        if data is None:
            self.problem = f"its extended header has {header.size} bytes, more than {MAX_EXTENDED_HEADER_BYTES}"
        elif header.type == _LONG_NAME:
            self.name = _until_nul(data)
        elif header.type != _LONG_LINK:
            records = _records(data)
            if records is None:
                self.problem = "its extended header is malformed"
                return
            if path := records.get(b"GNU.sparse.name", records.get(b"path")):
                self.name = path
            if size := records.get(b"size"):
                if size.isdigit() and len(size) < 20:
                    self.size = int(size)
                else:
                    self.problem = "its extended header gives no valid size"
            self.sparse = self.sparse or any(keyword.startswith(b"GNU.sparse.") for keyword in records)

    def fill_from(self, fixed: _Extra) -> None:
        """Take over what global headers say. One name or size for all members is no archive of samples."""
        self.problem = self.problem or fixed.problem
        if fixed.name is not None or fixed.size is not None or fixed.sparse:
            self.problem = self.problem or "its name or size stands in a global header"

    def any(self) -> bool:
        return self._added


def _records(data: bytes) -> dict[bytes, bytes] | None:
    """The ``length keyword=value`` lines of a PAX header; None if they are malformed."""
    data = data.rstrip(b"\0")
    records: dict[bytes, bytes] = {}
    start = 0
    while start < len(data):
        space = data.find(b" ", start, start + 8)
        length = data[start : max(space, start)]
        end = start + int(length) if length.isdigit() else 0
        if not space < end <= len(data) or data[end - 1 : end] != b"\n":
            return None
        keyword, equals, value = data[space + 1 : end - 1].partition(b"=")
        if not equals:
            return None
        records[keyword] = value
        start = end
    return records


def _number(field: bytes) -> int | None:
    """An octal number field, or a base-256 one as large files have it; None if it is neither, or negative."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.split(b"\0", 1)[0].strip(b" ")
    return int(digits or b"0", 8) if not digits.strip(b"01234567") else None


def _checksums(block: bytes) -> tuple[int, int]:
    """The sum of a header's bytes, its own field counted as spaces; and that of signed bytes, as old tars had it."""
    counted = block[:148] + b"        " + block[156:]
    # Adler-32's lower half is 1 + the sum of the bytes modulo 65521, which 256 of them do not reach: faster than sum().
    unsigned = zlib.adler32(counted[:256]) % 65536 + zlib.adler32(counted[256:]) % 65536 - 2
    return unsigned, unsigned - 256 * (0 if counted.isascii() else sum(byte > 127 for byte in counted))


def _until_nul(field: bytes) -> bytes:
    return field.split(b"\0", 1)[0]


class _Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


class _Damage(Exception):
    """What ends the reading of an archive."""

    def __init__(self, kind: FailureKind, reason: str, cut_member: str | None = None) -> None:
        super().__init__(reason)
        self.failure = Failure(kind, reason, cut_member)


class _Undecodable(Exception):
    """A compressed stream is damaged; the message says how."""


class _Source:
    """A stream whose first bytes were read already; its errors are told from those of a decompressor."""

    def __init__(self, head: bytes, stream: IO[bytes]) -> None:
        self._head, self._stream = head, stream

    def read(self, size: int = -1) -> bytes:
        if self._head:
            piece, self._head = (self._head, b"") if size < 0 else (self._head[:size], self._head[size:])
            return piece
        return _read(self._stream, size)


def _read(stream: IO[bytes], size: int) -> bytes:
    try:
        return stream.read(size)
    except Exception as error:  # fsspec's file systems raise their own kinds
        raise ReadError(reason(error)) from error


def _decompressed(stream: IO[bytes]) -> _Readable:
    head = _read(stream, 6)
    whole: Any = _Source(head, stream)  # decompressors only read it
    if head.startswith(b"\x1f\x8b"):
        import gzip

        return gzip.GzipFile(fileobj=whole, mode="rb")
    if head.startswith(b"BZh"):
        import bz2

        return bz2.BZ2File(whole, "rb")
    if head.startswith((b"\xfd7zXZ\0", b"\x5d\0\0\x80")):
        import lzma

        return lzma.LZMAFile(whole, "rb")
    return whole

