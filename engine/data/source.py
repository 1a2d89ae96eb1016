"""The user's own files, read only: a folder on local disk or on S3-compatible storage.

Files outside the folder are never read: names with `..`, absolute names and symlinks to the outside
are refused, as are pipes and devices.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import IO, Any, TypeVar, cast

import fsspec

from engine.core.errors import DataError, StorageError, brief
from engine.core.ledger import Ledger
from engine.core.paths import expanded
from engine.core.storage_faults import with_retries
from engine.data.images import MAX_BYTES, Rejected

# ENXIO: a socket or a pipe without a reader. ENAMETOOLONG, ELOOP: names from a hostile table.
_NO_FILE = (errno.ENXIO, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EINVAL)

_THUMBNAILS = (".thumbnails", "@eadir", "thumbs.db", "ehthumbs.db")
_SYSTEM = (
    "__macosx", "#recycle", "$recycle.bin", "system volume information", "lost+found",
    "desktop.ini", "icon\r",
)  # fmt: skip

R = TypeVar("R")


@dataclass(frozen=True)
class Listing:
    """Sorted relative paths of the files that were asked for, and the number of the others by
    reason."""

    names: list[str]
    skipped: dict[str, int]


def _state(path: str) -> str:
    try:
        status = os.stat(path)
    except OSError:  # a link to nowhere
        return "missing"
    return f"{status.st_size}:{status.st_mtime_ns}"


def ledger_of(listing: Listing, entries: Mapping[str, int] | None = None) -> Ledger:
    """The ledger of a reader that reads the files of `listing`."""
    read = len(listing.names)
    return Ledger(
        files=read + sum(listing.skipped.values()), read=read,
        skipped=dict(sorted(listing.skipped.items())), entries=dict(entries or {}),
    )  # fmt: skip


def not_data(name: str) -> str | None:
    """The reason why a relative path is a file of the system and not of a data set; None for
    data."""
    parts = [part.lower() for part in PurePosixPath(name).parts]
    if any(part in _THUMBNAILS for part in parts):
        return "thumbnails"
    if any(part in _SYSTEM for part in parts):
        return "system"
    return "hidden" if any(part.startswith(".") for part in parts) else None


class Reopening:
    """Pickled without private attributes: each process opens its own files and connections."""

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}


class Source(Reopening):
    """Files below `root`, by relative path; picklable."""

    def __init__(self, root: str, field: str = "reader.root") -> None:
        """field: of the study, for errors."""
        root = expanded(root)
        protocol = fsspec.utils.get_protocol(root)
        self.local = protocol in ("file", "local")
        try:
            self.root = (
                os.path.realpath(root.removeprefix("file://")) if self.local else root.rstrip("/")
            )
            self._open()
            exists = self._fs.exists(self._root)
        except Exception as error:  # storage libraries raise their own: credentials, protocols, NUL
            raise DataError(f"{field}: {root!r} cannot be opened: {error}") from error
        if self.local and os.path.isfile(self.root):
            raise DataError(
                f"{field}: {root} is a file, not a folder; unpack it, or name its folder"
            )
        if not exists:
            raise DataError(
                f"{field}: {root} does not exist (relative paths start at the current folder)"
            )

    def _open(self) -> None:
        self._fs, self._root = fsspec.core.url_to_fs(self.root, use_listings_cache=False)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def files(self, extensions: tuple[str, ...] | None) -> list[str]:
        """Sorted relative paths of all files with one of these extensions; None: of all files."""
        return self.listing(
            lambda name: extensions is None or PurePosixPath(name).suffix.lower() in extensions
        ).names

    def listing(self, wanted: Callable[[str], bool]) -> Listing:
        """All files below the root, divided. Files of the operating system, hidden files and
        thumbnails are never wanted.

        Links to the outside are listed, but never read.
        """
        names, skipped = [], Counter[str]()
        for name in self._walk():
            reason = not_data(name)
            if reason is None and wanted(name):
                names.append(name)
            else:
                skipped[reason or PurePosixPath(name).suffix.lower() or "no extension"] += 1
        return Listing(sorted(names), dict(skipped))

    def digest_of_states(self, names: Sequence[str]) -> str:
        """A digest of the sizes and times of change of files, or of the server's own digests."""
        if self.local:
            lines = [f"{name}:{_state(f'{self.root}/{name}')}" for name in names]
        else:
            found = self._fs.find(self._root, detail=True)
            entries = {name: found[f"{self._root}/{name}"] for name in names}
            lines = [
                f"{name}:{entry.get('size')}:{entry.get('ETag') or entry.get('mtime')}"
                for name, entry in entries.items()
            ]
        return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()

    def _walk(self) -> Iterator[str]:
        if not self.local:
            start = len(self._root) + 1
            yield from (path[start:] for path in self._fs.find(self._root))
            return
        for folder, _, names in os.walk(self.root):
            for name in names:
                yield os.path.relpath(f"{folder}/{name}", self.root).replace(os.sep, "/")

    def folders(self) -> list[str]:
        """Names of the data folders directly below the root, sorted."""
        entries = self._fs.ls(self._root, detail=True)
        names = (PurePosixPath(e["name"]).name for e in entries if e["type"] == "directory")
        return sorted(name for name in names if not_data(name) is None)

    def linked_folders(self) -> list[str]:
        """Relative paths of links to folders, which are not walked; sorted."""
        if not self.local:
            return []
        return sorted(
            os.path.relpath(path, self.root).replace(os.sep, "/")
            for folder, names, _ in os.walk(self.root)
            for name in names
            if os.path.islink(path := f"{folder}/{name}")
        )

    def read(self, uri: str) -> bytes:
        """The bytes of one file.

        Raises `Rejected` if the file must not or cannot be read, and `StorageError` if the
        storage fails, so that the run stops and can continue later.
        """
        return self._patiently(uri, self._read)

    def head(self, uri: str, size: int) -> bytes:
        """The first bytes of one file. Raises as `read` does."""

        def act(name: str) -> bytes:
            with self._opened(name) as file:
                return file.read(size)

        return self._patiently(uri, act)

    def open(self, uri: str) -> IO[bytes]:
        """One file of any size, open for random access. Raises as `read` does."""
        return self._patiently(uri, self._opened)

    def _patiently(self, uri: str, act: Callable[[str], R]) -> R:
        path = PurePosixPath(uri)
        if not uri or path.is_absolute() or ".." in path.parts or "\0" in uri or "\\" in uri:
            raise Rejected("path_not_allowed", uri[:100])
        try:
            return with_retries(lambda: act(uri))
        except Rejected:
            raise
        except Exception as error:  # storage libraries raise their own errors
            if isinstance(error, OSError) and (reason := self._refusal(error)):
                # "missing" says it all.
                why = "" if reason == "missing" else f": {error.strerror}"
                raise Rejected(reason, f"{uri[:100]}{why}") from None
            # A storage fault is not a property of the image, so it must not reject the image.
            raise self._fault(uri, error) from error

    def _refusal(self, error: OSError) -> str | None:
        """The reason of a rejection where the error is a property of the file; None for a storage
        fault."""
        if isinstance(error, FileNotFoundError):
            return "missing"
        if isinstance(error, IsADirectoryError):
            return "not_readable"
        if isinstance(error, PermissionError):
            # A local file may lack read permission; on a server the credentials are wrong.
            return "not_readable" if self.local else None
        return "path_not_allowed" if error.errno in _NO_FILE else None

    def _fault(self, uri: str, error: Exception) -> StorageError:
        reason = brief(error) or type(error).__name__
        return StorageError(
            f"reader.root: {self.root}: {uri[:100]} cannot be read: {reason}; run again when the"
            " storage is available"
        )

    def _read(self, uri: str) -> bytes:
        if not self.local:
            full = f"{self._root}/{uri}"
            if self._fs.size(full) > MAX_BYTES:
                raise Rejected("too_large", uri)
            return bytes(self._fs.cat_file(full))
        with self._opened(uri) as file:
            size = os.fstat(file.fileno()).st_size
            if size > MAX_BYTES:
                raise Rejected("too_large", f"{size:,} bytes")
            return file.read()

    def _opened(self, uri: str) -> IO[bytes]:
        full = f"{self._root}/{uri}"
        if not self.local:
            return cast("IO[bytes]", self._fs.open(full, "rb"))
        real = os.path.realpath(full)
        if os.path.commonpath([real, self.root]) != self.root:
            raise Rejected("path_not_allowed", f"{uri} leads out of the folder")
        # O_NONBLOCK: opening a pipe must not wait for a writer.
        handle = os.open(real, os.O_RDONLY | os.O_NONBLOCK)
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            os.close(handle)
            if stat.S_ISDIR(status.st_mode):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            raise Rejected("path_not_allowed", f"{uri} is not a regular file")
        return os.fdopen(handle, "rb")
