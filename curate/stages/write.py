"""The write stage of curation: kept (or dropped) samples, with the bytes they came with, into shards of their own.

Which sample goes where is planned first; each shard is then written by itself, and not again while its plan stands.
What is taken from an input shard is told by its place there, which webdataset's pipelines do not keep.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from afresh.errors import UserError
from afresh.files import digest
from afresh.storage import Store
from curate.engines.protocol import Engine
from curate.reading.captions import MAX_JSON_BYTES
from curate.reading.samples import Sample, read_samples
from curate.reading.urls import fingerprint, shard_names
from curate.reading.writing import write_shard
from curate.stages.rows import Rows

if TYPE_CHECKING:
    from curate.decisions.rules import Verdicts


PLAN_FORMAT = 1


@dataclass(frozen=True)
class WriteTask:
    """One output shard: which samples of which input shards, and what their json members gain.

    Attributes:
        out: where it is written.
        shard: its name there.
        sources: of each input shard the URL, the name, and the samples as (ordinal, key, gain).
        plan: changes when what is to be written does.
    """

    out: Store
    shard: str
    sources: tuple[tuple[str, str, tuple[tuple[int, str, str | None], ...]], ...]
    plan: str

    @property
    def marker(self) -> str:
        """The file that says which plan the shard was written by."""
        return f"work/{self.shard.removesuffix('.tar')}.json"


def plan_shards(
    out: Store, folder: str, rows: Rows, verdicts: Verdicts, urls: Sequence[str], per_shard: int, *, kept: bool
) -> list[WriteTask]:
    """Which kept (or dropped) samples go where in ``folder`` of ``out``, in input order.

    A shard is full at ``per_shard`` samples, or when a key would stand in it twice: keys repeat across input
    shards, and a sample keeps its key.
    """
    names = shard_names(urls)
    keys = rows.table["key"].to_pylist()
    tasks: list[WriteTask] = []
    duplicates = np.bincount(verdicts.kept_by[verdicts.kept_by >= 0], minlength=len(rows.readable))
    sources: dict[int, list[tuple[int, str, str | None]]] = {}
    used: set[str] = set()
    input_as_it_is = cache(fingerprint)

    def close() -> None:
        picked = [(urls[shard], names[shard], tuple(samples)) for shard, samples in sources.items()]
        plan = digest([PLAN_FORMAT, [[input_as_it_is(url), samples] for url, _, samples in picked]])
        tasks.append(WriteTask(out, f"{folder}/{len(tasks):06d}.tar", tuple(picked), plan))
        sources.clear()
        used.clear()

    for sample, row in enumerate(rows.readable.tolist()):
        if verdicts.kept[sample] != kept:
            continue
        key = keys[row]
        if len(used) == per_shard or key in used:
            close()
        used.add(key)
        gain = None
        if pooled := verdicts.pooled.get(sample):  # of kept samples alone
            gain = json.dumps({"duplicates": int(duplicates[sample]), "captions": list(pooled)})
        sources.setdefault(int(rows.shard_number[row]), []).append((int(rows.ordinal[row]), key, gain))
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
    engine.map(_write_shard, [task for task in plan if task.shard not in written], desc="writing")


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
    for url, name, picked in task.sources:
        wanted = {ordinal: (key, gain) for ordinal, key, gain in picked}
        for ordinal, item in enumerate(read_samples(url, name=name)):
            if ordinal not in wanted:
                continue
            key, gain = wanted.pop(ordinal)
            if not isinstance(item, Sample) or item.key != key:
                raise UserError(f"shard {url} changed while it was curated (sample {key!r}); run again")
            yield key, with_account(item.members, json.loads(gain)) if gain else item.members
            if not wanted:
                break
        if wanted:
            key = next(iter(wanted.values()))[0]
            raise UserError(f"shard {url} changed while it was curated (sample {key!r} is gone); run again")


def with_account(members: Mapping[str, bytes], account: Mapping[str, Any]) -> dict[str, bytes]:
    """Members whose json gains ``afresh: account``; the others keep their bytes.

    A sample without json gets one; where its json is not an object, or too large, too deep or out of range to be
    written again as it was read, the account is a member ``afresh.json``.
    """
    ext = next((name for name in members if name.lower() == "json"), None)
    if ext is None:
        return {**members, "json": _json_bytes({"afresh": account})}
    if len(members[ext]) <= MAX_JSON_BYTES:
        with contextlib.suppress(ValueError, RecursionError):
            fields = json.loads(members[ext])
            if isinstance(fields, dict):
                return {**members, ext: _json_bytes({**fields, "afresh": account})}
    return {**members, "afresh.json": _json_bytes(account)}


def _json_bytes(fields: Any) -> bytes:
    return json.dumps(fields, ensure_ascii=False, allow_nan=False).encode("utf-8", "backslashreplace")

