"""Which members of an archive may be part of a sample, and of which: names, and what is refused."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Set

from afresh.errors import printable
from curate.reading.tar import MAX_MEMBER_BYTES, Member, shown

MAX_NAME = 4096  # characters of a member's name
_DRIVE = re.compile(r"[A-Za-z]:[/\\]")
# WebDataset's rule: the key ends at the first dot of the last path component.
_MEMBER_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)", re.DOTALL)
_LEFT_BEHIND = frozenset((".ds_store", "thumbs.db", "desktop.ini"))


def is_left_behind(name: str) -> bool:
    """Whether a file or member is what a system leaves beside others: ``._NAME``, ``__MACOSX/``, ``Thumbs.db``."""
    *folders, base = name.split("/")
    return base.startswith("._") or base.lower() in _LEFT_BEHIND or "__MACOSX" in folders


def key_and_extension(name: str) -> tuple[str, str] | None:
    """Those of a member that may be part of a sample; None if its name is refused or has none."""
    return split_name(name) if len(name) <= MAX_NAME and _plain(name) else None


def split_name(member: str) -> tuple[str, str] | None:
    """``"a/b.seg.png"`` → ``("a/b", "seg.png")``, WebDataset's rule; None if there is no key or extension."""
    match = _MEMBER_NAME.fullmatch(member)
    return (match[1], match[2]) if match else None


def refusal(member: Member) -> str | None:
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


def listed(extensions: Iterable[str]) -> str:
    """Extensions for a message, no longer than messages are read."""
    text = printable(", ".join(extensions))
    return text if len(text) <= 200 else text[:200] + "…"


def cut_name(key: str, extensions: Iterable[str], images: Iterable[str]) -> str:
    """What to add to the message that a sample has no image, where its name may have been cut at an earlier dot."""
    cut = next((ext for ext in extensions if "." in ext and ext.rpartition(".")[2].lower() in images), None)
    if cut is None:
        return ""
    return f"; a key ends at the first dot of its name, here {shown(f'{key} . {cut}')}: name files without other dots"


def safe_name(name: str) -> str:
    """A refused member's name as it may stand in a ledger."""
    return printable(name[:MAX_NAME])


def name_apart(key: str, shard: str, taken: Set[str]) -> str:
    """A key for a sample whose own one is taken where it is written: its shard's name in front, and a number if that
    is taken, too. ``0001`` of ``a/b.tar`` becomes ``a__b__0001``, then ``a__b-2__0001``.
    """
    name = (shard.partition("://")[2] or shard).removesuffix(".tar").replace("/", "__").replace(".", "_")
    names = (f"{name}{number}__{key}" for number in itertools.chain([""], (f"-{n}" for n in itertools.count(2))))
    return next(one for one in names if one not in taken)


def is_written_as(name: str, key: str) -> bool:
    """Whether a sample of a written shard may be the one that had this key in its input shard."""
    return name == key or name.endswith(f"__{key}")
