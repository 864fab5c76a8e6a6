"""``curate export``: what a curation kept, in the forms that other tools read.

Images leave with the bytes that they came with. Whatever is written appears whole: a folder is filled beside its
place, under a name that begins with ``.tmp-``, and then renamed.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from afresh.errors import UsageError, UserError, reason
from afresh.files import write_atomic
from afresh.progress import progress
from afresh.runs import locked
from afresh.storage import Store
from curate.config import TRAINERS, ExportConfig
from curate.exporting.trainers import write_for_trainer
from curate.importing.folders import hashed_key, path_key
from curate.reading.samples import BadSample, Sample, read_samples
from curate.results.ledger import KEPT, read_ledger
from curate.results.report_page import read_summary

ROWS_PER_GROUP = 100  # of a parquet file: what a reader takes at a time
GROUP_BYTES = 100_000_000
COLUMNS = ("image", "caption", "captions", "key", "shard", "json")
_TYPES = {
    "image": pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    "captions": pa.list_(pa.string()),
}
# How `datasets` knows a column of encoded images from any other struct.
_FEATURES = {
    name: {"_type": "Image"}
    if name == "image"
    else {"_type": "List", "feature": {"dtype": "string", "_type": "Value"}}
    if name == "captions"
    else {"dtype": "string", "_type": "Value"}
    for name in COLUMNS
}


def run_export(config: ExportConfig) -> dict[str, Any]:
    """Write what the curation in ``config.out`` kept to ``config.dest``.

    A dataset and parquet files have the columns ``image`` (the bytes, and ``key.ext`` as their path), ``caption`` (null
    when there is none), ``captions`` (that one and those of the dropped copies, each once), ``key`` and ``shard`` (of
    the input sample) and ``json`` (its json member as text, or null). An id list has a line ``shard/key`` for every
    input sample of ``config.status``, in the order of their UTF-8 bytes, as ``LC_ALL=C sort`` has it. What a trainer's
    folder holds, :mod:`curate.exporting.trainers` says.

    Returns:
        ``samples, dest, bytes, seconds``.

    Raises:
        UsageError: ``dest`` exists, or cannot be written, or a setting does not go with the format.
        UserError: ``out`` is not a finished curation, or its shards and ledger do not agree.
    """
    start = time.monotonic()
    out, dest = config.out, Path(config.dest).expanduser()
    _check_settings(config, dest)
    kept = read_summary(out)["kept"]  # says so when the curation is unfinished
    if config.format == "ids":
        samples = _write_ids(out, dest, config.status)
    else:
        with _written_aside(dest) as folder:
            if config.format == "dataset":
                samples = _write_dataset(out, folder, kept)
            elif config.format in TRAINERS:
                named = progress(_named(out), total=kept, desc="exporting", unit="samples")
                samples = write_for_trainer(named, folder, dest.absolute(), config)
            else:
                samples = _write_parquet(out, folder, kept, config.file_bytes)
    files = [dest] if dest.is_file() else [path for path in dest.rglob("*") if path.is_file()]
    return {
        "samples": samples,
        "dest": str(dest),
        "bytes": sum(path.stat().st_size for path in files),
        "seconds": round(time.monotonic() - start, 3),
    }


def _check_settings(config: ExportConfig, dest: Path) -> None:
    if not config.dest:
        raise UsageError("dest: name what to write")
    if "://" in config.dest:
        raise UsageError(f"dest: {config.dest} must be local; copy it from there")
    if config.file_bytes < 1:
        raise UsageError(f"file_bytes must be at least 1, got {config.file_bytes}")
    if config.concept in ("", ".", "..") or "/" in config.concept or not config.concept.isprintable():
        raise UsageError(f"concept: {config.concept!r} is no folder's name")
    if config.format != "ids" and config.status != KEPT:
        raise UsageError(f"status: a {config.format} export holds kept samples; {config.status} ones have --format ids")
    if dest.is_dir() and config.format == "ids":
        raise UsageError(f"dest: {dest} is a folder; an id list is a file")
    if dest.exists() and config.format != "ids":
        raise UsageError(f"dest: {dest} exists; name a new folder, or remove it")


@contextlib.contextmanager
def _written_aside(dest: Path) -> Iterator[Path]:
    """A folder to fill, which becomes ``dest`` when the block ends well; what a killed run left is cleared."""
    aside = dest.parent / f".tmp-{dest.name}"
    try:
        aside.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"dest: cannot write to {dest.parent}: {reason(error)}") from error
    with locked(dest, aside / "lock"):
        try:
            for left_over in (aside / "result", aside / "cache"):
                shutil.rmtree(left_over, ignore_errors=True)
            (aside / "result").mkdir()
            yield aside / "result"
            (aside / "result").rename(dest)
        except OSError as error:
            raise UserError(f"{dest} cannot be written: {reason(error)}") from error
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def kept_samples(out: str) -> Iterator[tuple[Sample, str]]:
    """Kept samples in their order, and the shard that each came in.

    Raises:
        UserError: shards and ledger do not agree.
    """
    ledger = read_ledger(out, ["shard", "key", "status"])
    ledger = ledger.filter(pc.equal(ledger["status"], KEPT))
    place = Store(out)
    shards = [place.at(f"shards/{name}") for name in place.entries("shards") if name.endswith(".tar")]
    field = read_summary(out)["settings"].get("caption_field", "")
    samples = (sample for url in shards for sample in read_samples(url, caption_field=field))
    for batch in ledger.to_batches(max_chunksize=1024):
        for shard, key in zip(batch["shard"].to_pylist(), batch["key"].to_pylist(), strict=True):
            sample = next(samples, None)
            if not isinstance(sample, Sample) or sample.key != key:
                raise _disagreement(out, sample, f"kept sample {key!r} of {shard}")
            yield sample, shard
    if (sample := next(samples, None)) is not None:
        raise _disagreement(out, sample, "no further sample")


def _disagreement(out: str, found: Sample | BadSample | None, expected: str) -> UserError:
    what = "nothing" if found is None else f"{found.key!r} of {found.shard}"
    if isinstance(found, BadSample):
        what += f" ({found.reason})"
    return UserError(f"{out}: the shards hold {what} where the ledger has {expected}; run `curate dedup` again")


def _named(out: str) -> Iterator[tuple[str, Sample, str]]:
    """The same, each under a name that no other has: its key, and a hash where that tells it from others alone."""
    met: set[str] = set()
    twice: set[str] = set()
    keys = read_ledger(out, ["key", "status"])
    for key in keys.filter(pc.equal(keys["status"], KEPT))["key"].to_pylist():
        name = path_key(f"{key}.").casefold()  # for file systems that do not tell upper case from lower
        (twice if name in met else met).add(name)
    for sample, shard in kept_samples(out):
        name = path_key(f"{sample.key}.")
        if name.casefold() in twice:
            name = hashed_key(f"{sample.key}.", f"{shard}/{sample.key}")
        yield name, sample, shard


def _as_row(sample: Sample, shard: str) -> dict[str, Any]:
    """A row of COLUMNS."""
    members = {ext.lower(): data for ext, data in sample.members.items()}
    return {
        "image": {"bytes": sample.image, "path": f"{sample.key}.{sample.image_ext}"},
        "caption": sample.caption,
        "captions": list(sample.captions),
        "key": sample.key,
        "shard": shard,
        "json": members["json"].decode("utf-8", "replace") if "json" in members else None,
    }


def _write_ids(out: str, dest: Path, status: str) -> int:
    ledger = read_ledger(out, ["shard", "key", "status"])
    ledger = ledger.filter(pc.equal(ledger["status"], status))
    ids = pc.binary_join_element_wise(ledger["shard"], ledger["key"], "/").to_pylist()
    broken = next((one for one in ids if "\n" in one or "\r" in one), None)
    if broken is not None:
        raise UserError(f"sample {broken!r} has a line break in its name, which a list of lines cannot hold")
    with write_atomic(dest) as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(f"{one}\n" for one in sorted(ids))
    return len(ids)


def _write_dataset(out: str, folder: Path, kept: int) -> int:
    import datasets

    bars = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        written = datasets.Dataset.from_generator(
            _generated,
            features=datasets.Features.from_dict(_FEATURES),
            gen_kwargs={"out": out, "kept": kept},
            cache_dir=str(folder.parent / "cache"),
        )
        written.save_to_disk(str(folder))
    except Exception as error:
        for cause in (error, error.__cause__, error.__context__):  # datasets wraps what its generator raises
            if isinstance(cause, (UserError, OSError)):
                raise cause from None
        raise
    finally:
        if not bars:
            datasets.enable_progress_bars()
    return len(written)


def _generated(out: str, kept: int) -> Iterator[dict[str, Any]]:
    for sample, shard in progress(kept_samples(out), total=kept, desc="exporting", unit="samples"):
        yield _as_row(sample, shard)


def _write_parquet(out: str, folder: Path, kept: int, file_bytes: int) -> int:
    schema = pa.schema([(name, _TYPES.get(name, pa.string())) for name in COLUMNS])
    schema = schema.with_metadata({"huggingface": json.dumps({"info": {"features": _FEATURES}})})
    samples = _generated(out, kept)
    ahead: Mapping[str, Any] | None = next(samples, None)
    count = number = 0
    while ahead is not None:
        path, size = folder / f"{number:06d}.parquet", 0
        with pq.ParquetWriter(path, schema, compression="zstd", version="2.6") as writer:
            while ahead is not None and (size == 0 or size + _image_bytes(ahead) <= file_bytes):
                group: list[Mapping[str, Any]] = []
                held = 0
                while ahead is not None and len(group) < ROWS_PER_GROUP:
                    grown = held + _image_bytes(ahead)
                    if group and (grown > GROUP_BYTES or size + grown > file_bytes):
                        break
                    group.append(ahead)
                    held, ahead = grown, next(samples, None)
                writer.write_table(pa.Table.from_pylist(group, schema))
                count, size = count + len(group), size + held
        number += 1
    return count


def _image_bytes(row: Mapping[str, Any]) -> int:
    return len(row["image"]["bytes"])

