"""Lists of samples by identity, a line ``shard<TAB>key`` each: what a training run found, for curation to leave out.

A shard is named as a ledger names it, by its file name and as many parent folders as tell it from the others
(:func:`curate.reading.urls.shard_names`). So a list fits the shards that it was made from wherever they lie now, and
among others, too.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence, Set
from pathlib import Path

from afresh.errors import UsageError, UserError, printable
from afresh.files import decode_text, digest, text_lines, write_atomic
from afresh.progress import get_logger
from curate.reading.urls import find_shards

log = get_logger(__name__)


def write_ids(path: str | os.PathLike[str], ids: Iterable[tuple[str, str]]) -> int:
    """Write a list of ``(shard, key)``, sorted, each once; how many there are.

    Raises:
        UserError: a name holds a tab or the end of a line.
    """
    lines = []
    for shard, key in sorted(set(ids)):
        if any(mark in name for name in (shard, key) for mark in "\t\n\r"):
            name = printable(f"{shard}/{key}")
            raise UserError(f"sample {name} has a tab or line end in its name, which a list of lines cannot hold")
        lines.append(f"{shard}\t{key}\n")
    with write_atomic(path) as temporary:
        temporary.write_text("".join(lines), encoding="utf-8", newline="\n")
    return len(lines)


def read_ids(path: str | os.PathLike[str]) -> list[tuple[str, str]]:
    """The ``(shard, key)`` of a list; empty lines are passed over.

    Raises:
        UsageError: there is no such list, or a line is none of it.
    """
    try:
        lines = text_lines(decode_text(Path(path).read_bytes()))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read as a list of samples: {error}") from error
    ids = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        shard, tab, key = line.partition("\t")
        if not (shard and tab and key) or "\t" in key:
            raise UsageError(f"{path}, line {number}: expected a shard's name, a tab and a key, got {printable(line)}")
        ids.append((shard, key))
    return ids


def listed_keys(path: str | os.PathLike[str], urls: Sequence[str]) -> list[set[str]]:
    """The keys that a list names in each of the shards at ``urls``.

    Raises:
        UsageError: the list cannot be read, a name in it means several shards, or it names none of these shards.
    """
    ids = read_ids(path)
    found = find_shards((shard for shard, _ in ids), urls, str(path))
    if ids and not found:
        raise UsageError(f"{path}: names none of the shards that are read; its first is {printable(ids[0][0])}")
    keys: list[set[str]] = [set() for _ in urls]
    elsewhere = 0
    for shard, key in ids:
        if shard in found:
            keys[found[shard]].add(key)
        else:
            elsewhere += 1
    if elsewhere:
        log.info("%s: %d of %d samples are of other shards than those that are read", path, elsewhere, len(ids))
    return keys


def refuse_missing(
    path: str | os.PathLike[str], names: Sequence[str], listed: Sequence[Set[str]], there: Sequence[Set[str]]
) -> None:
    """See that every listed sample was found.

    Args:
        path: of the list, for the message.
        names: of the shards, likewise.
        listed: keys that the list names in each shard.
        there: those among them that the shard holds.

    Raises:
        UserError: one is missing.
    """
    for name, wanted, found in zip(names, listed, there, strict=True):
        if gone := sorted(wanted - found):
            raise UserError(
                f"{path}: {printable(name)} has no sample {printable(gone[0])}: the list was made from another shard "
                "of that name, or the sample is gone from it since"
            )


def refuse_both(
    exclude: str,
    to_drop: Sequence[Set[str]] | None,
    keep: str,
    to_keep: Sequence[Set[str]] | None,
    names: Sequence[str],
) -> None:
    """See that no sample is to be dropped by one list and to be kept by another.

    Raises:
        UsageError: one is; the message names it, and the lists at ``exclude`` and ``keep``.
    """
    for name, dropped, kept in zip(names, to_drop or (), to_keep or (), strict=False):
        if both := sorted(dropped & kept):
            sample = f"{printable(name)}: {printable(both[0])}"
            raise UsageError(f"{sample} stands in {exclude} and in {keep}: take it off one")


def ids_digest(path: str | os.PathLike[str]) -> str:
    """What a list holds, as a short text that differs where the samples differ."""
    ids = sorted(set(read_ids(path)))
    return f"{len(ids)} samples ({digest([list(one) for one in ids])[:12]})"

