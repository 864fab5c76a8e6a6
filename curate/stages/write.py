"""The write stage of curation: kept (or dropped) samples, with the bytes they came with, into shards of their own.

Which sample goes where is planned first; shards are then written a few at a time, so that an input shard is read once
for all that it feeds, and not again while their plan stands. What is taken from an input shard is told by its place
there, which webdataset's pipelines do not keep.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from afresh.files import digest
from afresh.storage import Store
from curate.engines.protocol import Engine
from curate.reading.captions import MAX_JSON_BYTES
from curate.reading.members import name_apart
from curate.reading.samples import Sample, read_samples
from curate.reading.tar import shown
from curate.reading.urls import changed, refuse_changed, shard_names
from curate.reading.writing import write_shard
from curate.stages.accounts import added_to, copies_dropped
from curate.stages.rows import Rows

if TYPE_CHECKING:
    from curate.decisions.rules import Verdicts


PLAN_FORMAT = 3
TASK_SAMPLES = 100_000  # that a task holds at most, unless an output shard or an input shard has more


class Picked(NamedTuple):
    """A sample to be written.

    Attributes:
        source: number of its input shard.
        ordinal: which sample of that shard.
        key: its key there.
        name: its key where it is written.
        sha256: of its image, when it was judged.
        duplicates: copies of it that were dropped.
        captions: that it inherits from them.
    """

    source: int
    ordinal: int
    key: str
    name: str
    sha256: str
    duplicates: int
    captions: tuple[str, ...]


class Output(NamedTuple):
    """One output shard.

    Attributes:
        shard: its name.
        start, stop: which of the samples that are written.
        plan: changes when what is to be written does.
        first, last: numbers of the input shards that its samples come from.
    """

    shard: str
    start: int
    stop: int
    plan: str
    first: int
    last: int

    @property
    def marker(self) -> str:
        """The file that says which plan the shard was written by."""
        return f"work/{self.shard.removesuffix('.tar')}.json"


@dataclass(frozen=True)
class WriteTask:
    """Some output shards, one after the other, for which each input shard is read once.

    Attributes:
        out: where they are written.
        outputs: their names, markers and plans, and the number of samples of each.
        sources: URL, name and fingerprint when it was read of each input shard, by number.
        picked: all samples, in input order.
    """

    out: Store
    outputs: tuple[tuple[Output, int], ...]
    sources: Mapping[int, tuple[str, str, Sequence[str | int]]]
    picked: tuple[Picked, ...]

    @property
    def label(self) -> str:
        return self.outputs[0][0].shard


class Plan:
    """Which kept (or dropped) samples go where in ``folder`` of ``out``, in input order, ``per_shard`` into each.

    What is to be written of a sample is made when it is asked for: memory holds a number a sample.

    Args:
        out: the place.
        folder: in it.
        rows: of the input.
        verdicts: on them.
        urls: of the input shards.
        fingerprints: of these, when they were read.
        per_shard: samples that a shard holds, but for the last.
        kept: whether the kept samples are meant, or the dropped ones.
    """

    def __init__(
        self,
        out: Store,
        folder: str,
        rows: Rows,
        verdicts: Verdicts,
        urls: Sequence[str],
        fingerprints: Sequence[Sequence[str | int]],
        per_shard: int,
        *,
        kept: bool,
    ) -> None:
        self.out, self.rows, self.verdicts = out, rows, verdicts
        self.sources = list(zip(urls, shard_names(urls), fingerprints, strict=True))
        self.chosen = np.flatnonzero(verdicts.kept == kept)
        self._duplicates = copies_dropped(verdicts, rows.column("duplicates"))
        starts = range(0, len(self.chosen), per_shard)
        self.outputs = [self._output(f"{folder}/{n:06d}.tar", at, at + per_shard) for n, at in enumerate(starts)]

    def __len__(self) -> int:
        """The number of output shards."""
        return len(self.outputs)

    def _output(self, shard: str, start: int, stop: int) -> Output:
        stop = min(stop, len(self.chosen))
        picked = self.picked(start, stop)
        by_source = itertools.groupby(picked, key=lambda one: one.source)
        plan = digest([PLAN_FORMAT, [[self.sources[n][2], [one[1:] for one in some]] for n, some in by_source]])
        return Output(shard, start, stop, plan, picked[0].source, picked[-1].source)

    def picked(self, start: int, stop: int) -> list[Picked]:
        """The samples of one output shard.

        Keys repeat across input shards. One that stands there already has its input shard's name before it.
        """
        samples = self.chosen[start:stop]
        rows = self.rows.readable[samples]
        numbers, ordinals = self.rows.places(rows)
        used: set[str] = set()
        found = []
        for sample, source, ordinal, key, sha256 in zip(
            samples.tolist(), numbers.tolist(), ordinals.tolist(),
            self.rows.texts("key").take(rows), self.rows.texts("sha256").take(rows), strict=True,
        ):  # fmt: skip
            name = key if key not in used else name_apart(key, self.sources[source][1], used)
            used.add(name)
            account = int(self._duplicates[sample]), tuple(self.verdicts.pooled.get(sample, ()))  # of dropped none
            found.append(Picked(source, ordinal, key, name, sha256, *account))
        return found

    def task(self, outputs: Sequence[Output]) -> WriteTask:
        """What writes some output shards."""
        picked = [self.picked(output.start, output.stop) for output in outputs]
        every = tuple(itertools.chain.from_iterable(picked))
        sources = {number: self.sources[number] for number in {one.source for one in every}}
        sizes = tuple((output, len(some)) for output, some in zip(outputs, picked, strict=True))
        return WriteTask(self.out, sizes, sources, every)


def write_stage(engine: Engine, out: Store, plans: Sequence[Plan]) -> None:
    """Write what is planned and not there yet; remove what is there and not planned."""
    planned = {output.shard for plan in plans for output in plan.outputs}
    there: dict[str, int | None] = {}
    for folder in ("shards", "dropped"):
        there |= {f"{folder}/{name}": size for name, size in out.entries(folder).items() if fnmatch(name, "[0-9]*.tar")}
    for shard in there.keys() - planned:
        out.remove("summary.json")  # which speaks of it
        out.remove(shard)
    if not out.remote:
        with contextlib.suppress(OSError):  # it is not there, or not empty
            (out.made_in / "dropped").rmdir()
    groups = []
    for plan in plans:
        found = [output for output in plan.outputs if output.shard in there]
        markers = out.read_many([output.marker for output in found])
        written = {
            output.shard
            for output, marker in zip(found, markers, strict=True)
            if marker is not None and _parsed(marker) == {"plan": output.plan, "bytes": there[output.shard]}
        }
        missing = [output for output in plan.outputs if output.shard not in written]
        groups += [(plan, some) for some in together(missing, getattr(engine, "workers", 1) or 1)]
    if groups:
        out.remove("summary.json")  # which speaks of them
    engine.map(_write_shards, _Tasks(groups), desc="writing")


class _Tasks(Sequence[WriteTask]):
    """The tasks, each made when it is asked for."""

    def __init__(self, groups: Sequence[tuple[Plan, Sequence[Output]]]) -> None:
        self._groups = groups

    def __len__(self) -> int:
        return len(self._groups)

    def __getitem__(self, at: Any) -> Any:
        plan, outputs = self._groups[at]
        return plan.task(outputs)


def together(outputs: Sequence[Output], workers: int) -> list[list[Output]]:
    """Output shards by task: few and even ones, four a worker.

    One task reads an input shard once, whatever it feeds. Two tasks meet inside an input shard where no other cut is
    near, and at most once in each: then both read it.
    """
    total = sum(output.stop - output.start for output in outputs)
    share = total if workers == 1 else -(-total // (4 * workers))
    share = min(share, TASK_SAMPLES)
    groups: list[list[Output]] = []
    held = 0
    for output in outputs:
        last = groups[-1][-1] if groups else None
        apart = last is None or output.first > last.last
        within = last is not None and output.first > groups[-1][0].first
        if apart and held >= share // 2 or within and held >= share or last is None:
            groups.append([])
            held = 0
        groups[-1].append(output)
        held += output.stop - output.start
    return groups


def _parsed(marker: bytes) -> Any:
    try:
        return json.loads(marker)
    except ValueError:
        return None


def _write_shards(task: WriteTask) -> None:
    samples = _picked(task)
    for output, size in task.outputs:
        path = task.out.made_in / output.shard
        task.out.remove(output.marker)
        write_shard(path, itertools.islice(samples, size))
        written = path.stat().st_size
        task.out.deliver(output.shard)
        task.out.write_json(output.marker, {"plan": output.plan, "bytes": written})
    next(samples, None)  # sees that the last input shard is as it was read


def _picked(task: WriteTask) -> Iterator[tuple[str, Mapping[str, bytes]]]:
    for number, some in itertools.groupby(task.picked, key=lambda one: one.source):
        url, name, as_read = task.sources[number]
        ahead = enumerate(read_samples(url, name=name))
        for one in some:
            item = next((item for ordinal, item in ahead if ordinal == one.ordinal), None)
            if item is None:
                raise changed(url, f"sample {shown(one.key)} is gone")
            if not isinstance(item, Sample) or item.key != one.key or not is_as_judged(item, one.sha256):
                raise changed(url, f"sample {shown(one.key)}")
            members = item.members
            if one.duplicates or one.captions:
                members = with_account(members, added_to(item, one.duplicates, one.captions))
            yield one.name, members
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

