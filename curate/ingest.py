"""``curate import``: other forms of captioned images into the tar shards that curation reads.

Rows of a source (:mod:`curate.importing.sources`) become samples, and shards are written as they fill: ``000000.tar``
and so on, each followed by the account of the rows it took in, ``work/000000.parquet``. A stopped run is continued
behind the last shard whose account stands there. At the end the accounts become ``import.parquet``, and
``summary.json`` says that the folder is finished. Two samples are held in memory at a time, whatever the number of
rows. At a URL (:mod:`afresh.storage`) there lies the same, and here the shard that is being written.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from afresh.errors import UsageError, UserError
from afresh.files import write_atomic
from afresh.progress import Progress, get_logger, progress
from afresh.runs import locked, refuse_other_settings
from afresh.storage import Store, open_output
from curate.config import ImportConfig
from curate.importing.members import sample_members
from curate.importing.rows import Row, RowError, Source
from curate.importing.sources import open_source
from curate.reading.writing import write_shard
from curate.results.ledger import write_table

log = get_logger(__name__)
IMPORTED, SKIPPED = "imported", "skipped"
SCHEMA = pa.schema(
    [
        pa.field("source", pa.string(), nullable=False),  # path below the folder, or table#row
        pa.field("shard", pa.string()),  # null when skipped, like the key
        pa.field("key", pa.string()),
        pa.field("status", pa.string(), nullable=False),  # imported | skipped
        pa.field("reason", pa.string()),  # why skipped, or what an imported sample lacks; its kind before the colon
    ]
)
_TAR_BLOCK = 512


class _Sample(NamedTuple):
    row: Row
    members: Mapping[str, bytes]
    remark: str | None
    size: int  # in a tar


def run_import(config: ImportConfig) -> dict[str, Any]:
    """Import ``config.src`` into shards of ``config.out``.

    Returns:
        ``samples`` (rows of the source), ``imported``, ``skipped``, ``reasons`` (how many were skipped for which kind
        of reason), ``remarks`` (what imported samples lack: a caption, say), ``shards``, ``bytes`` (of the shards) and
        ``seconds``. ``summary.json`` has all but the seconds.

    Raises:
        UsageError: a setting is out of range, the source is not there or does not tell its columns, or ``out`` is
            foreign, or was begun from another source or with other settings.
        UserError: the source stops being readable, ``out`` is full, or no row can be imported.
    """
    start = time.monotonic()
    _check_settings(config)
    out = open_output(config.out, config.work_dir)
    _check_place(out, config)
    source = open_source(config)
    _prepare(out, config, source)
    with locked(out.where, out.made_in / "work" / "lock"):
        out.sweep()
        if not out.has("summary.json"):
            _import(source, out, config)
            out.write_json("summary.json", _publish(out))
        else:
            log.info("%s holds this import to its end", out)
        out.remove_folder("work")
    if out.remote:
        shutil.rmtree(out.made_in, ignore_errors=True)
    summary = json.loads(out.read("summary.json"))
    if not summary["imported"]:
        reasons = ", ".join(f"{count} times {reason}" for reason, count in summary["reasons"].items())
        where = out.at("import.parquet")
        raise UserError(f"none of the {summary['samples']} rows can be imported ({reasons}); see {where}")
    return {**summary, "seconds": round(time.monotonic() - start, 3)}


def _check_settings(config: ImportConfig) -> None:
    for name in ("max_pixels", "samples_per_shard", "shard_bytes"):
        value = getattr(config, name)
        if value < 1:
            raise UsageError(f"{name} must be at least 1, got {value}")


def _check_place(out: Store, config: ImportConfig) -> None:
    """See that ``out`` does not lie in the source, nor the source there, nor anything foreign."""
    for src in config.src:
        if "://" in src or Path(src).expanduser().is_dir():
            if Store(src).holds(out.where):
                raise UsageError(f"out: {out} lies in the source {src}; name a folder outside")
            if out.holds(src):
                raise UsageError(f"out: {out} holds the source {src}; name another folder")
    out.refuse_foreign("import", ("run.json",))


def _prepare(out: Store, config: ImportConfig, source: Source) -> None:
    """Begin or continue: ``run.json`` holds the settings that the result depends on."""
    given = {key: value for key, value in dataclasses.asdict(config).items() if key not in ("out", "work_dir")}
    settings = {"job": "curate import", **given, "what the source holds": source.contents}
    try:
        refuse_other_settings(out, json.loads(out.read("run.json")), settings)
    except FileNotFoundError:
        out.prepare()
        out.write_json("run.json", settings)
    out.make_folders("work")


def _import(source: Source, out: Store, config: ImportConfig) -> None:
    """Write the shards that are missing, each with the account of its rows behind it."""
    rows = _rows_of_shards(out)
    number, first = len(rows), sum(rows)
    if first:
        log.info("%d rows were imported into %d shards before", first, number)
    with progress(total=source.total, desc="importing", unit="rows") as bar:
        bar.update(first)
        samples = _Samples(source.rows(first), config, bar)
        while samples.ahead is not None or samples.account or number == 0:
            shard = f"{number:06d}.tar"
            size = 0
            if samples.ahead is not None:
                write_shard(out.made_in / shard, samples.of_shard(shard))
                size = (out.made_in / shard).stat().st_size
                out.deliver(shard)
            _write_account(out, number, samples.account, size)
            samples.account = []
            number += 1


class _Samples:
    """Samples of a source in order, with a look at the next one.

    Attributes:
        ahead: the next sample; None when there is none any more.
        account: the rows that have gone by, in SCHEMA's columns.
    """

    def __init__(self, rows: Iterator[Row], config: ImportConfig, bar: Progress) -> None:
        self.rows, self.config, self.bar = rows, config, bar
        self.account: list[tuple[str, str | None, str | None, str, str | None]] = []
        self.ahead = self._advance()

    def of_shard(self, shard: str) -> Iterator[tuple[str, Mapping[str, bytes]]]:
        """Key and members of as many samples as belong into one shard, at least one."""
        count = size = 0
        while self.ahead is not None and count < self.config.samples_per_shard:
            sample = self.ahead
            if count and size + sample.size > self.config.shard_bytes:
                return
            count, size = count + 1, size + sample.size
            yield sample.row.key, sample.members
            self._note(sample.row.source, shard, sample.row.key, IMPORTED, sample.remark)
            self.ahead = self._advance()

    def _advance(self) -> _Sample | None:
        for row in self.rows:
            try:
                members, remark = sample_members(row.source, row.read(), self.config)
            except RowError as error:
                self._note(row.source, None, None, SKIPPED, str(error))
            else:
                blocks = sum(1 - len(data) // -_TAR_BLOCK for data in members.values())
                return _Sample(row, members, remark, blocks * _TAR_BLOCK)
        return None

    def _note(self, *account: Any) -> None:
        self.account.append(account)
        self.bar.update(1)


def _write_account(out: Store, number: int, account: list[Any], size: int) -> None:
    columns = zip(*account, strict=True) if account else [()] * len(SCHEMA)
    arrays = [pa.array(column, kind) for column, kind in zip(columns, SCHEMA.types, strict=True)]
    table = pa.table(arrays, schema=SCHEMA.with_metadata({"bytes": str(size)}))
    write_table(table, out.made_in / _account(number))
    out.deliver(_account(number))


def _account(number: int) -> str:
    return f"work/{number:06d}.parquet"


def _rows_of_shards(out: Store) -> list[int]:
    """How many rows of the source each shard stands for, up to the first that is not finished."""
    sizes, accounts = out.entries(), out.entries("work")
    present = itertools.takewhile(lambda n: Path(_account(n)).name in accounts, itertools.count())
    rows = []
    for number, account in enumerate(out.read_many([_account(n) for n in present])):
        try:
            footer = pq.read_metadata(pa.BufferReader(account or b""))
        except pa.ArrowException:
            break
        if int(footer.metadata[b"bytes"]) != (sizes.get(f"{number:06d}.tar") or 0):
            break
        rows.append(footer.num_rows)
    return rows


def _publish(out: Store) -> dict[str, Any]:
    """Join the accounts to ``import.parquet``, and sum them up."""
    reasons: dict[str, Counter[str]] = {IMPORTED: Counter(), SKIPPED: Counter()}
    status: Counter[str] = Counter()
    accounts = [f"work/{name}" for name in out.entries("work") if fnmatch(name, "[0-9]*.parquet")]
    with (
        write_atomic(out.made_in / "import.parquet") as temporary,
        pq.ParquetWriter(temporary, SCHEMA, compression="zstd", version="2.6") as writer,
    ):
        for account in out.read_many(accounts):
            table = pq.read_table(pa.BufferReader(account or b""))
            writer.write_table(table.replace_schema_metadata(None))
            status.update(table["status"].to_pylist())
            for what, reason in zip(table["status"].to_pylist(), table["reason"].to_pylist(), strict=True):
                if reason is not None:
                    reasons[what][reason.partition(":")[0]] += 1
    out.deliver("import.parquet")
    shards = [size or 0 for name, size in out.entries().items() if fnmatch(name, "[0-9]*.tar")]
    return {
        "samples": status.total(),
        IMPORTED: status[IMPORTED],
        SKIPPED: status[SKIPPED],
        "reasons": dict(sorted(reasons[SKIPPED].items())),
        "remarks": dict(sorted(reasons[IMPORTED].items())),
        "shards": len(shards),
        "bytes": sum(shards),
    }

