"""The user's own files, read only: a folder on local disk or on S3-compatible storage.

Nothing outside the folder is ever read: names with `..`, absolute names and symlinks that lead out
are refused, as are pipes and devices.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

import fsspec

from engine.core.errors import DataError
from engine.core.images import MAX_BYTES, Rejected


class Source:
    """Files below `root`, by their path relative to it. Picklable."""

    def __init__(self, root: str) -> None:
        protocol = fsspec.utils.get_protocol(root)
        self.local = protocol in ("file", "local")
        try:
            self.root = (
                os.path.realpath(root.removeprefix("file://")) if self.local else root.rstrip("/")
            )
            self._open()
            found = self._fs.exists(self._root)
        except Exception as error:  # every storage library has its own: credentials, protocols, NUL
            raise DataError(f"reader.root: {root!r} cannot be opened: {error}") from error
        if not found:
            raise DataError(
                f"reader.root: {root} does not exist (relative paths start at the current folder)"
            )

    def _open(self) -> None:
        self._fs, self._root = fsspec.core.url_to_fs(self.root, use_listings_cache=False)

    def __getstate__(self) -> dict[str, Any]:
        return {"root": self.root, "local": self.local}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def files(self, extensions: tuple[str, ...]) -> Iterator[str]:
        """Relative paths of all files with one of these extensions, sorted; links out are listed,
        never read."""
        if self.local:
            found = (
                os.path.relpath(f"{folder}/{name}", self.root).replace(os.sep, "/")
                for folder, _, names in os.walk(self.root)
                for name in names
            )
        else:
            start = len(self._root) + 1
            found = (path[start:] for path in self._fs.find(self._root))
        yield from sorted(
            name for name in found if PurePosixPath(name).suffix.lower() in extensions
        )

    def folders(self) -> list[str]:
        """Names of the folders directly below the root, sorted."""
        entries = self._fs.ls(self._root, detail=True)
        return sorted(PurePosixPath(e["name"]).name for e in entries if e["type"] == "directory")

    def read(self, uri: str) -> bytes:
        """Bytes of one file. Raises `Rejected` for what must not or cannot be read."""
        path = PurePosixPath(uri)
        if not uri or path.is_absolute() or ".." in path.parts or "\0" in uri or "\\" in uri:
            raise Rejected("path_not_allowed", uri[:100])
        full = f"{self._root}/{uri}"
        try:
            if not self.local:
                if self._fs.size(full) > MAX_BYTES:
                    raise Rejected("too_large", uri)
                return bytes(self._fs.cat_file(full))
            real = os.path.realpath(full)
            if os.path.commonpath([real, self.root]) != self.root:
                raise Rejected("path_not_allowed", f"{uri} leads out of the folder")
            # O_NONBLOCK: opening a pipe must not wait for a writer.
            handle = os.open(real, os.O_RDONLY | os.O_NONBLOCK)
            with os.fdopen(handle, "rb") as file:
                status = os.fstat(handle)
                if not stat.S_ISREG(status.st_mode):
                    raise Rejected("path_not_allowed", f"{uri} is no regular file")
                if status.st_size > MAX_BYTES:
                    raise Rejected("too_large", f"{status.st_size:,} bytes")
                return file.read()
        except FileNotFoundError:
            raise Rejected("missing", uri) from None
        except (PermissionError, IsADirectoryError) as error:
            raise Rejected("not_readable", f"{uri}: {error.strerror}") from None
        except OSError as error:
            # ENXIO: a socket or a pipe without reader; ENAMETOOLONG: a name from a hostile table.
            raise Rejected("path_not_allowed", f"{uri[:100]}: {error.strerror}") from None
