"""The write stage of curation: kept (or dropped) samples, with the bytes they came with, into shards of their own.

Which sample goes where is planned first; each shard is then written by itself, and not again while its plan stands.
What is taken from an input shard is told by its place there, which webdataset's pipelines do not keep.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Any, NamedTuple

from afresh.files import digest
from afresh.storage import Store
from curate.engines.protocol import Engine
from curate.reading.captions import MAX_JSON_BYTES
from curate.reading.samples import Sample, read_samples
from curate.reading.tar import shown
from curate.reading.urls import changed, refuse_changed, shard_names
from curate.reading.writing import write_shard
from curate.stages.accounts import added_to, copies_dropped
from curate.stages.rows import Rows

if TYPE_CHECKING:
    from curate.decisions.rules import Verdicts


PLAN_FORMAT = 2


class Picked(NamedTuple):
    """A sample to be written.

    Attributes:
        ordinal: which sample of its shard.
        key: its key.
        sha256: of its image, when it was judged.
        duplicates: copies of it that were dropped.
        captions: that it inherits from them.
    """

    ordinal: int
    key: str
    sha256: str
    duplicates: int
    captions: tuple[str, ...]


@dataclass(frozen=True)
class WriteTask:
    """One output shard: which samples of which input shards, and what their json members gain.

    Attributes:
        out: where it is written.
        shard: its name there.
        sources: of each input shard the URL, the name, its fingerprint when it was read, and what is taken from it.
        plan: changes when what is to be written does.
    """

    out: Store
    shard: str
    sources: tuple[tuple[str, str, Sequence[str | int], tuple[Picked, ...]], ...]
    plan: str

    @property
    def marker(self) -> str:
        """The file that says which plan the shard was written by."""
        return f"work/{self.shard.removesuffix('.tar')}.json"


def plan_shards(
    out: Store,
    folder: str,
    rows: Rows,
    verdicts: Verdicts,
    urls: Sequence[str],
    fingerprints: Sequence[Sequence[str | int]],
    per_shard: int,
    *,
    kept: bool,
) -> list[WriteTask]:
    """Which kept (or dropped) samples go where in ``folder`` of ``out``, in input order.

    A shard is full at ``per_shard`` samples, or when a key would stand in it twice: keys repeat across input
    shards, and a sample keeps its key.

    Args:
        out: the place.
        folder: in it.
        rows: of the input.
        verdicts: on them.
        urls: of the input shards.
        fingerprints: of these, when they were read.
        per_shard: samples that a shard holds at most.
        kept: whether the kept samples are meant, or the dropped ones.
    """
    names = shard_names(urls)
    keys, hashes = rows.table["key"].to_pylist(), rows.column("sha256")
    tasks: list[WriteTask] = []
    duplicates = copies_dropped(verdicts, rows.column("duplicates"))
    sources: dict[int, list[Picked]] = {}
    used: set[str] = set()

    def close() -> None:
        picked = tuple((urls[n], names[n], fingerprints[n], tuple(samples)) for n, samples in sources.items())
        plan = digest([PLAN_FORMAT, [[fingerprint, samples] for _, _, fingerprint, samples in picked]])
        tasks.append(WriteTask(out, f"{folder}/{len(tasks):06d}.tar", picked, plan))
        sources.clear()
        used.clear()

    for sample, row in enumerate(rows.readable.tolist()):
        if verdicts.kept[sample] != kept:
            continue
        key = keys[row]
        if len(used) == per_shard or key in used:
            close()
        used.add(key)
        account = int(duplicates[sample]), tuple(verdicts.pooled.get(sample, ()))  # of dropped samples nothing
        one = Picked(int(rows.ordinal[row]), key, hashes[sample], *account)
        sources.setdefault(int(rows.shard_number[row]), []).append(one)
    if used:
        close()
    return tasks


def write_stage(engine: Engine, out: Store, plan: Sequence[WriteTask]) -> None:
    """Write what is planned and not there yet; remove what is there and not planned."""
    planned = {task.shard for task in plan}
    there: dict[str, int | None] = {}
    for folder in ("shards", "dropped"):
        there |= {f"{folder}/{name}": size for name, size in out.entries(folder).items() if fnmatch(name, "[0-9]*.tar")}
    for shard in there.keys() - planned:
        out.remove("summary.json")  # which speaks of it
        out.remove(shard)
    if not out.remote:
        with contextlib.suppress(OSError):  # it is not there, or not empty
            (out.made_in / "dropped").rmdir()
    found = [task for task in plan if task.shard in there]
    markers = out.read_many([task.marker for task in found])
    written = {
        task.shard
        for task, marker in zip(found, markers, strict=True)
        if marker is not None and _parsed(marker) == {"plan": task.plan, "bytes": there[task.shard]}
    }
    missing = [task for task in plan if task.shard not in written]
    if missing:
        out.remove("summary.json")  # which speaks of them
    engine.map(_write_shard, missing, desc="writing")


def _parsed(marker: bytes) -> Any:
    try:
        return json.loads(marker)
    except ValueError:
        return None


def _write_shard(task: WriteTask) -> None:
    path = task.out.made_in / task.shard
    task.out.remove(task.marker)
    write_shard(path, _picked(task))
    size = path.stat().st_size
    task.out.deliver(task.shard)
    task.out.write_json(task.marker, {"plan": task.plan, "bytes": size})


def _picked(task: WriteTask) -> Iterator[tuple[str, Mapping[str, bytes]]]:
    for url, name, as_read, picked in task.sources:
        wanted = {one.ordinal: one for one in picked}
        for ordinal, item in enumerate(read_samples(url, name=name)):
            if (one := wanted.pop(ordinal, None)) is None:
                continue
            if not isinstance(item, Sample) or item.key != one.key or not is_as_judged(item, one.sha256):
                raise changed(url, f"sample {shown(one.key)}")
            members = item.members
            if one.duplicates or one.captions:
                members = with_account(members, added_to(item, one.duplicates, one.captions))
            yield one.key, members
            if not wanted:
                break
        if wanted:
            raise changed(url, f"sample {shown(next(iter(wanted.values())).key)} is gone")
        refuse_changed(url, as_read)


def is_as_judged(sample: Sample, sha256: str) -> bool:
    """Whether a sample's image is the one of which the ledger tells."""
    return hashlib.sha256(sample.image).hexdigest() == sha256


def with_account(members: Mapping[str, bytes], account: Mapping[str, Any]) -> dict[str, bytes]:
    """Members whose json gains ``afresh: account``; the others keep their bytes.

    A sample without json gets one; where its json is not an object, or too large, too deep or out of range to be
    written again as it was read, or has an ``afresh`` of somebody else's, the account is a member ``afresh.json``.
    """
    ext = next((name for name in members if name.lower() == "json"), None)
    if ext is None:
        return {**members, "json": _json_bytes({"afresh": account})}
    if len(members[ext]) <= MAX_JSON_BYTES:
        with contextlib.suppress(ValueError, RecursionError):
            fields = json.loads(members[ext])
            if isinstance(fields, dict) and isinstance(fields.get("afresh", {}), dict):
                return {**members, ext: _json_bytes({**fields, "afresh": account})}
    beside = next((name for name in members if name.lower() == "afresh.json"), "afresh.json")
    return {**members, beside: _json_bytes(account)}


def _json_bytes(fields: Any) -> bytes:
    return json.dumps(fields, ensure_ascii=False, allow_nan=False).encode("utf-8", "backslashreplace")

