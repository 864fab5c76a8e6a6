"""Where the result of a job lies: a local folder, or a folder at any fsspec URL.

A job makes its files below :attr:`Store.made_in`, as it would make them anywhere, and hands each over with
:meth:`Store.deliver` when it is whole. Where the place is a local folder the two are one and nothing is left to do;
where it is a URL, the file is sent there and removed here, so that the local disk holds the files of the moment and
caches. Nothing keeps two machines from writing to one URL at a time.
"""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING

from afresh.cores import in_order
from afresh.errors import UsageError, UserError, reason
from afresh.files import digest, temporary_name, write_atomic, write_json

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem


EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "http": "http", "https": "http"}  # by protocol
REQUESTS = 16  # to a store at a time, where many small files are asked for
_COPYING = threading.Lock()
"""Held while files are copied here: threads that want the same ones wait for one copy, and fsspec's file system in
memory gives all readers of a file one position in it."""


@dataclass(frozen=True)
class Store:
    """A folder of results. Names of files in it are relative, with ``/`` between their parts.

    An object store shows an object when all of it has arrived. Other file systems that have a move of their own
    (``file://``, SFTP, SMB, HDFS) get a file under a temporary name first: none shows a part under the final one.

    Attributes:
        where: path of a local folder, or a URL.
        work_dir: folder below which the local files of a URL lie; None for the user's cache folder.

    All methods raise ``UserError`` when a store fails, and ``UsageError`` when it refuses or cannot be opened.
    """

    where: str
    work_dir: str | None = None

    @property
    def remote(self) -> bool:
        return "://" in self.where

    @property
    def made_in(self) -> Path:
        """The local folder in which files are made and caches lie: of a URL, one of its own."""
        if not self.remote:
            return Path(self.where).expanduser()
        below = Path(self.work_dir).expanduser() if self.work_dir else cache_folder()
        return below / f"out-{digest(self.where.rstrip('/'))}"

    @property
    def in_memory(self) -> bool:
        """Whether what is written here is seen by this process alone."""
        return self.remote and self._opened()[0].protocol == "memory"

    def __str__(self) -> str:
        return self.where if self.remote else str(self.made_in)

    def at(self, name: str) -> str:
        """Path or URL of a file."""
        return f"{self.where.rstrip('/')}/{name}" if self.remote else str(self.made_in / name)

    def holds(self, other: str) -> bool:
        """Whether another path or URL is this folder, or lies in it."""
        (files, root), (of_other, path) = self._opened(), _open(other)
        if type(files) is not type(of_other):
            return False
        if getattr(files, "local_file", False):
            return Path(path).resolve().is_relative_to(Path(root).resolve())
        return f"{path}/".startswith(f"{root}/")

    # ---------------------------------------------------------------------------------------------- reading

    def entries(self, folder: str = "") -> dict[str, int | None]:
        """Names in a folder: files with their bytes, folders with None. Empty where there is no such folder."""
        try:
            with self._answering():
                files, path = self._opened(folder)
                files.invalidate_cache(path)
                found = files.ls(path, detail=True)
        except FileNotFoundError:
            return {}
        sizes = {entry["name"].rstrip("/"): entry["size"] if entry["type"] == "file" else None for entry in found}
        sizes.pop(path.rstrip("/"), None)  # some stores list a folder in itself
        return {PurePosixPath(name).name: size for name, size in sorted(sizes.items())}

    def has(self, name: str) -> bool:
        """Whether there is such a file."""
        try:
            with self._answering():
                files, path = self._opened(name)
                return files.info(path)["type"] == "file"
        except FileNotFoundError:
            return False

    def read(self, name: str) -> bytes:
        """A file's bytes. Raises ``FileNotFoundError`` when it is not there."""
        with self._answering():
            files, path = self._opened(name)
            return files.cat_file(path)

    def read_many(self, names: Sequence[str]) -> Iterator[bytes | None]:
        """The bytes of many small files, in their order; None for one that is not there."""
        threads = REQUESTS if self.remote else 1
        return in_order(self._read_if_there, names, threads, at_most=4 * REQUESTS, weigh=lambda _: 0, weight=1)

    def _read_if_there(self, name: str) -> bytes | None:
        try:
            return self.read(name)
        except FileNotFoundError:
            return None

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[IO[bytes]]:
        """A file to read from anywhere in it, for readers that need parts. Raises ``FileNotFoundError``."""
        with self._answering():
            files, path = self._opened(name)
            opened = files.open(path, "rb")
        with opened:
            yield opened

    def local_folder(self, names: Sequence[str]) -> Path:
        """The local folder of some files of one folder, to be memory-mapped: their own, or that of a copy.

        Copies lie in the user's cache folder. They are made once for each version of the files, and replace the
        version before.
        """
        if not self.remote:
            return (self.made_in / names[0]).parent
        with self._answering():
            sources = [self._opened(name) for name in names]
            versions = digest([version(*source) for source in sources])
        copies = cache_folder() / f"copy-{digest([self.at(name) for name in names])}"
        folder = copies / versions
        with _COPYING:
            for name, (files, path) in zip(names, sources, strict=True):
                copy = folder / PurePosixPath(name).name
                if not copy.is_file():
                    with self._answering(), write_atomic(copy) as temporary:  # which knows a full disk
                        files.get_file(path, str(temporary))
            for other in copies.iterdir():
                if other != folder:
                    shutil.rmtree(other, ignore_errors=True)
        return folder

    # ---------------------------------------------------------------------------------------------- writing

    def prepare(self) -> None:
        """Make the folder, and see that it can be written.

        Raises:
            UsageError: it cannot.
        """
        probe = temporary_name("probe")
        self.make_folders("")
        try:
            (self.made_in / probe).write_bytes(b"")
        except OSError as error:
            raise UsageError(f"out: cannot write to {self.made_in}: {reason(error)}") from error
        try:
            if self.remote:
                self._send(self.made_in / probe, probe)
            self.remove(probe)
        except Exception as error:  # each file system has its own kinds
            raise UsageError(f"out: cannot write to {self}: {reason(error)}") from error
        finally:
            (self.made_in / probe).unlink(missing_ok=True)

    def make_folders(self, *names: str) -> None:
        """Make folders below ``made_in`` to make files in, with all above them. Raises ``UsageError``."""
        try:
            for name in names:
                (self.made_in / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"out: cannot write to {self.made_in}: {reason(error)}") from error

    def refuse_foreign(self, job: str, marks: Sequence[str]) -> None:
        """See that the folder is empty, or that a file or folder in it marks it as a job's. Raises ``UsageError``."""
        there = self.entries()
        foreign = next((name for name in there if not name.startswith(".tmp-")), None)
        if foreign is not None and not any(mark in there for mark in marks):
            raise UsageError(f"out: {self} is not empty and no {job} ({foreign}); name a new folder")

    def deliver(self, name: str) -> None:
        """Hand over a file that stands whole below ``made_in``; there is nothing to do where that is the place."""
        if not self.remote:
            return
        source = self.made_in / name
        try:
            self._send(source, name)
        except Exception as error:
            why = f"{reason(error)}; the same command goes on there once it can"
            raise UserError(f"{self.at(name)} cannot be written: {why}") from error
        finally:
            source.unlink(missing_ok=True)

    def _send(self, source: Path, name: str) -> None:
        files, path = self._opened(name)
        if not _moves(files):
            files.put_file(str(source), path)
            return
        folder, _, last = path.rpartition("/")
        aside = f"{folder}/{temporary_name(last)}"
        files.makedirs(folder, exist_ok=True)
        try:
            files.put_file(str(source), aside)
            if files.exists(path):  # not every file system moves onto a file
                files.rm_file(path)
            files.mv(aside, path)
        except BaseException:
            with contextlib.suppress(Exception):
                files.rm_file(aside)
            raise

    def write_json(self, name: str, obj: object) -> None:
        """:func:`afresh.files.write_json`, delivered."""
        write_json(self.made_in / name, obj)
        self.deliver(name)

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        with self._answering():
            files, path = self._opened(name)
            with contextlib.suppress(FileNotFoundError):
                files.rm_file(path)

    def remove_folder(self, name: str) -> None:
        """Remove a folder with all that it holds, if it is there."""
        with self._answering():
            files, path = self._opened(name)
            with contextlib.suppress(FileNotFoundError):
                files.rm(path, recursive=True)
        if self.remote:
            shutil.rmtree(self.made_in / name, ignore_errors=True)

    def sweep(self) -> None:
        """Remove what a killed run left half-written, or whole and not delivered. Only for whoever holds the lock."""
        self.sweep_here()
        if self.remote:
            with self._answering():
                files, root = self._opened()
                for path in files.find(root) if _moves(files) else ():
                    if PurePosixPath(path).name.startswith(".tmp-"):
                        files.rm_file(path)

    def sweep_here(self) -> None:
        """The local part of :meth:`sweep`."""
        for pattern in (".tmp-*", "*/.tmp-*", "work/*/.tmp-*"):
            for left_over in self.made_in.glob(pattern):
                if left_over.is_file():
                    left_over.unlink()
        if self.remote:
            for path in self.made_in.iterdir():
                if path.is_file():
                    path.unlink()
                elif path.name != "work":
                    shutil.rmtree(path)

    # ------------------------------------------------------------------------------------------- file systems

    def _opened(self, name: str = "") -> tuple[AbstractFileSystem, str]:
        """The file system, and the path in it of a file, or of the folder itself."""
        files, root = _open(self.where)
        return files, f"{root.rstrip('/')}/{name.strip('/')}" if name else root

    @contextlib.contextmanager
    def _answering(self) -> Iterator[None]:
        """What goes wrong with a store, said of this place; that a file is not there goes through."""
        try:
            yield
        except (FileNotFoundError, UserError):
            raise
        except NotADirectoryError as error:  # below a file
            raise FileNotFoundError(*error.args) from error
        except Exception as error:
            passing = isinstance(error, OSError) and not isinstance(error, PermissionError)
            raise (UserError if passing else UsageError)(f"{self}: {reason(error)}") from error


def open_output(out: str, work_dir: str | None) -> Store:
    """The place of a job's output.

    Raises:
        UsageError: it is not named, is a file, or cannot be opened: its file system is not known, or its package or
            credentials are missing.
    """
    if not out:
        raise UsageError("out: name the folder to write to")
    if "://" in out and glob.has_magic(out):
        raise UsageError(f"out: {out} has wildcards; name one folder")
    if work_dir is not None and "://" not in out:
        raise UsageError(f"work_dir goes with an out at a URL; {out} is a local folder, and is worked in itself")
    place = Store(out, work_dir)
    try:
        is_file = place.has("")
    except UserError as error:
        raise UsageError(f"out: {error}") from error
    if is_file:
        raise UsageError(f"out: {place} is a file, not a folder")
    return place


def cache_folder() -> Path:
    """The user's cache folder: ``$XDG_CACHE_HOME/afresh``, by default ``~/.cache/afresh``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "afresh"


def _open(where: str) -> tuple[AbstractFileSystem, str]:
    """The file system of a path or URL, and the path in it."""
    import fsspec

    if "://" not in where:
        return fsspec.filesystem("file"), os.path.abspath(os.path.expanduser(where))
    try:
        return fsspec.core.url_to_fs(where)
    except Exception as error:  # an unknown protocol, a package or credentials that are missing
        raise UsageError(f"{where} cannot be opened: {why(error, where)}") from error


def why(error: BaseException, url: str) -> str:
    """What is wrong with a URL, in one line; of a store whose package is missing, with the extra that brings it."""
    protocols = {part.partition("://")[0] for part in url.split("::")}
    extra = next((EXTRAS[name] for name in sorted(protocols & EXTRAS.keys())), None)
    return reason(error) + (f": pip install 'afresh[{extra}]'" if extra and isinstance(error, ImportError) else "")


def _moves(files: AbstractFileSystem) -> bool:
    """Whether a file system has a move of its own. Object stores copy and delete, and show what is whole."""
    from fsspec import AbstractFileSystem

    return type(files).mv is not AbstractFileSystem.mv


def version(filesystem: AbstractFileSystem, path: str) -> str:
    """What a store calls this version of a file: size and tag, which it gives alike in a listing and by itself.

    Stores without tags are asked for all they say of the file.
    """
    info = filesystem.info(path)
    tag = next((info[name] for name in ("ETag", "etag", "md5Hash") if info.get(name)), None)
    return f"{info['size']} {tag}" if tag else str(filesystem.ukey(path))
