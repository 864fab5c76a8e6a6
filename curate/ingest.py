"""``curate import``: other forms of captioned images into the tar shards that curation reads.

Rows of a source (:mod:`curate.sources`) become samples, and shards are written as they fill: ``000000.tar`` and so
on, each followed by the account of the rows it took in, ``work/000000.parquet``. A stopped run is continued behind the
last shard whose account stands there. At the end the accounts become ``import.parquet``, and ``summary.json`` says
that the folder is finished. Two samples are held in memory at a time, whatever the number of rows.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from curate.config import ImportConfig
from curate.console import (
    Progress,
    UsageError,
    UserError,
    claim,
    get_logger,
    locked,
    progress,
    to_json,
    write_atomic,
    write_json,
)
from curate.images import CONVERTED_FORMATS, ImageError, image_format, to_png
from curate.ledger import write_table
from curate.shards import IMAGE_EXTENSIONS, MAX_MEMBER_BYTES, write_shard
from curate.sources import Content, Row, RowError, Source, open_source

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
    out = _check_settings(config)
    source = open_source(config)
    _prepare(out, config, source)
    with locked(out, out / "work" / "lock"):
        for left_over in [*out.glob(".tmp-*"), *out.glob("work/.tmp-*")]:
            left_over.unlink()
        if not (out / "summary.json").is_file():
            _import(source, out, config)
            write_json(out / "summary.json", _publish(out))
        else:
            log.info("%s holds this import to its end", out)
        shutil.rmtree(out / "work")
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    if not summary["imported"]:
        reasons = ", ".join(f"{count} times {reason}" for reason, count in summary["reasons"].items())
        raise UserError(f"none of the {summary['samples']} rows can be imported ({reasons}); see {out}/import.parquet")
    return {**summary, "seconds": round(time.monotonic() - start, 3)}


# ------------------------------------------------------------------------------------------- before the work


def _check_settings(config: ImportConfig) -> Path:
    for name in ("max_pixels", "samples_per_shard", "shard_bytes"):
        value = getattr(config, name)
        if value < 1:
            raise UsageError(f"{name} must be at least 1, got {value}")
    if not config.out:
        raise UsageError("out: name the folder to write to")
    if "://" in config.out:
        raise UsageError(f"out: {config.out} must be a local folder; copy the shards from there")
    out = Path(config.out).expanduser()
    for src in config.src:
        local = Path(src).expanduser()
        if "://" not in src and local.is_dir():
            if out.resolve().is_relative_to(local.resolve()):
                raise UsageError(f"out: {out} lies in the source {src}; name a folder outside")
            if local.resolve().is_relative_to(out.resolve()):
                raise UsageError(f"out: {out} holds the source {src}; name another folder")
    if out.exists() and not out.is_dir():
        raise UsageError(f"out: {out} is a file, not a folder")
    if out.is_dir() and not (out / "run.json").is_file():
        foreign = min((path.name for path in out.iterdir() if not path.name.startswith(".tmp-")), default=None)
        if foreign is not None:
            raise UsageError(f"out: {out} is not empty and no import ({foreign}); name a new folder")
    return out


def _prepare(out: Path, config: ImportConfig, source: Source) -> None:
    settings = {key: value for key, value in dataclasses.asdict(config).items() if key != "out"}
    claim(out, {"job": "curate import", **settings, "what the source holds": source.contents})
    try:
        (out / "work").mkdir(exist_ok=True)
    except OSError as error:
        raise UsageError(f"out: cannot write to {out}: {error.strerror or error}") from error


# ------------------------------------------------------------------------------------------------- the work


def _import(source: Source, out: Path, config: ImportConfig) -> None:
    """Write the shards that are missing, each with the account of its rows behind it."""
    number = first = 0
    while (rows := _rows_of_shard(out, number)) is not None:
        number, first = number + 1, first + rows
    if first:
        log.info("%d rows were imported into %d shards before", first, number)
    with progress(total=source.total, desc="importing", unit="rows") as bar:
        bar.update(first)
        samples = _Samples(source.rows(first), config, bar)
        while samples.ahead is not None or samples.account or number == 0:
            path = out / f"{number:06d}.tar"
            try:
                if samples.ahead is not None:
                    write_shard(path, samples.of_shard(path.name))
                _write_account(samples.account, path)
            except OSError as error:  # a source's own errors come as RowError or UserError
                reason = error.strerror or error
                raise UserError(
                    f"{path} cannot be written: {reason}; the same command goes on there once it can"
                ) from error
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
                members, remark = _members(row.source, row.read(), self.config)
            except RowError as error:
                self._note(row.source, None, None, SKIPPED, str(error))
            else:
                blocks = sum(1 - len(data) // -_TAR_BLOCK for data in members.values())
                return _Sample(row, members, remark, blocks * _TAR_BLOCK)
        return None

    def _note(self, *account: Any) -> None:
        self.account.append(account)
        self.bar.update(1)


def _members(source: str, content: Content, config: ImportConfig) -> tuple[dict[str, bytes], str | None]:
    """Members of a sample, and what is to be said of it. Raises ``RowError`` when it is to be skipped."""
    caption, remark = content.caption, content.problem
    if caption is not None:
        try:
            remark = None if caption.decode("utf-8-sig").strip() else "no caption: the text is empty"
        except UnicodeDecodeError:
            remark = "caption is not UTF-8"
    if remark is not None and config.require_caption:
        raise RowError(remark)
    extension, image = str(image_format(content.image)), content.image
    if extension not in IMAGE_EXTENSIONS:
        image = _converted(image, extension, config)
        remark = "; ".join(filter(None, [f"converted from {extension}", remark]))
        extension = "png"
    members = {extension: image}
    if caption is not None:
        members["txt"] = caption
    fields = dict(content.fields)
    # Names that mean something to whoever reads the shard; another's field of that name moves aside.
    taken = ["source"] if caption is not None else ["source", "caption"]
    for name in taken:
        if name in fields:
            aside = f"{name}_"
            while aside in fields:
                aside += "_"
            fields[aside] = fields.pop(name)
    text = json.dumps(to_json({**fields, "source": source}), ensure_ascii=False)
    members["json"] = text.encode("utf-8", "backslashreplace")
    if len(members["json"]) > MAX_MEMBER_BYTES or (caption is not None and len(caption) > MAX_MEMBER_BYTES):
        raise RowError(f"too large: its caption or fields have more than {MAX_MEMBER_BYTES} bytes")
    return members, remark


def _converted(image: bytes, extension: str, config: ImportConfig) -> bytes:
    if extension.upper() not in CONVERTED_FORMATS:
        raise RowError(f"format: {extension} images do not stand in shards, and cannot be converted here")
    if not config.convert:
        raise RowError(f"format: {extension} images do not stand in shards; --convert true makes them PNG")
    try:
        return to_png(image, max_pixels=config.max_pixels)
    except ImageError as error:
        raise RowError(f"cannot be converted: {extension}: {error}") from error


# -------------------------------------------------------------------------------------------------- accounts


def _write_account(account: list[Any], shard: Path) -> None:
    columns = zip(*account, strict=True) if account else [()] * len(SCHEMA)
    arrays = [pa.array(column, kind) for column, kind in zip(columns, SCHEMA.types, strict=True)]
    size = shard.stat().st_size if shard.is_file() else 0
    table = pa.table(arrays, schema=SCHEMA.with_metadata({"bytes": str(size)}))
    write_table(table, _account_of(shard.parent, int(shard.stem)))


def _account_of(out: Path, number: int) -> Path:
    return out / "work" / f"{number:06d}.parquet"


def _rows_of_shard(out: Path, number: int) -> int | None:
    """How many rows of the source a finished shard stands for; None when it is not finished."""
    path, account = out / f"{number:06d}.tar", _account_of(out, number)
    try:
        footer = pq.read_metadata(account)
    except (OSError, pa.ArrowException):
        return None
    size = int(footer.metadata[b"bytes"])
    return footer.num_rows if size == (path.stat().st_size if path.is_file() else 0) else None


def _publish(out: Path) -> dict[str, Any]:
    """Join the accounts to ``import.parquet``, and sum them up."""
    reasons: dict[str, Counter[str]] = {IMPORTED: Counter(), SKIPPED: Counter()}
    status: Counter[str] = Counter()
    with (
        write_atomic(out / "import.parquet") as temporary,
        pq.ParquetWriter(temporary, SCHEMA, compression="zstd", version="2.6") as writer,
    ):
        for account in sorted((out / "work").glob("[0-9]*.parquet")):
            table = pq.read_table(account)
            writer.write_table(table.replace_schema_metadata(None))
            status.update(table["status"].to_pylist())
            for what, reason in zip(table["status"].to_pylist(), table["reason"].to_pylist(), strict=True):
                if reason is not None:
                    reasons[what][reason.partition(":")[0]] += 1
    shards = sorted(out.glob("[0-9]*.tar"))
    return {
        "samples": status.total(),
        IMPORTED: status[IMPORTED],
        SKIPPED: status[SKIPPED],
        "reasons": dict(sorted(reasons[SKIPPED].items())),
        "remarks": dict(sorted(reasons[IMPORTED].items())),
        "shards": len(shards),
        "bytes": sum(shard.stat().st_size for shard in shards),
    }
