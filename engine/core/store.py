"""The store: the only owner of paths, on local disk and on S3-compatible storage alike (fsspec).

Layout under the storage root:

    steps/<kind>/<key>/manifest.json       what a finished step leaves behind (put if absent,
                                           written last)
    steps/<kind>/<key>/parts/…             data of a step, under names unique to the attempt
    steps/<kind>/<key>/commits/…           one record per committed shard (`engine.core.shards`)
    generated/<generator key>/…            shards of generated images, shared by requests of every
                                           size
    work/<key>/…                           checkpoints and progress of a fit; may be deleted when it
                                           is done
    pages/<study>/…                        pages and sheets for people; may be deleted at any time

Two operations carry all promises: `put_if_absent` (exactly one of many racing writers wins, and
what it wrote is whole) and `put_new` (data under a name that nobody else uses, size checked).
Neither "it exists"
nor "it opens" is ever taken for "it is complete": readers start from a commit record or a manifest.
"""

from __future__ import annotations

import errno
import functools
import os
import random
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from engine.core.errors import StorageError, StudyError

P = ParamSpec("P")
T = TypeVar("T")

ATTEMPTS = 5
_CLIENTS = ("botocore", "aiobotocore", "aiohttp", "gcsfs", "google", "azure", "adlfs")
_TRANSIENT = (errno.EIO, errno.EBUSY, errno.ETIMEDOUT, errno.ECONNRESET, errno.EAGAIN)


def may_pass(error: OSError) -> bool:
    """Time-outs, dropped connections and 5xx replies may pass; full disks, 403 and missing buckets
    will not."""
    return isinstance(error, TimeoutError | ConnectionError) or error.errno in _TRANSIENT


def back_off(attempt: int) -> None:
    """Wait before the next attempt, longer each time and never in step with others."""
    time.sleep(random.uniform(0.5, 1.0) * 0.2 * 2**attempt)


def _guarded(operation: Callable[P, T]) -> Callable[P, T]:
    """Retry what may pass, with backoff and jitter; turn the rest into one line that names the
    place."""

    @functools.wraps(operation)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        for attempt in range(ATTEMPTS):
            try:
                return operation(*args, **kwargs)
            except OSError as error:
                # Absence is an answer to a reader; a writer that gets it has no bucket or folder.
                reading = not operation.__name__.startswith("put")
                if isinstance(error, FileExistsError) or (
                    reading and isinstance(error, FileNotFoundError)
                ):
                    raise
                if may_pass(error) and attempt + 1 < ATTEMPTS:
                    back_off(attempt)
                    continue
                raise _fault(operation.__name__, args, error.strerror or str(error)) from error
            except Exception as error:
                # Libraries of object stores have errors of their own (no credentials, no route).
                if type(error).__module__.split(".")[0] not in _CLIENTS:
                    raise
                raise _fault(operation.__name__, args, str(error)) from error
        raise AssertionError("unreachable")

    return call


def _fault(operation: str, args: tuple[Any, ...], reason: str) -> StorageError:
    store, key = args[0], args[1] if len(args) > 1 else ""
    return StorageError(
        f"storage {getattr(store, 'url', '')}: cannot {operation.replace('_', ' ')} {key!s}:"
        f" {reason or 'no reason given'}; nothing is half-committed, run again when it is mended"
    )


def attempt_name() -> str:
    """A name that no other attempt, process or machine uses."""
    return uuid.uuid4().hex[:16]


class Store:
    """Files under one root. Keys are relative, with forward slashes. Picklable: workers open their
    own."""

    def __init__(self, url: str) -> None:
        protocol = fsspec.utils.get_protocol(url)
        self.local = protocol in ("file", "local")
        self.url = (
            os.path.abspath(os.path.expanduser(url.removeprefix("file://")))
            if self.local
            else url.rstrip("/")
        )
        try:
            self._open()
        except Exception as error:  # an unknown protocol, a library that is not installed
            text = " ".join(str(error).split())[:200]
            raise StudyError(f"profile: storage: {url!r} cannot be opened: {text}") from None

    def _open(self) -> None:
        # Listings are never cached: another driver may commit at any time.
        self._fs, self._root = fsspec.core.url_to_fs(self.url, use_listings_cache=False)

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url, "local": self.local}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Store) and other.url == self.url

    def __hash__(self) -> int:
        return hash(self.url)

    def __repr__(self) -> str:
        return f"Store({self.url!r})"

    # Layout -------------------------------------------------------------------------------------

    def step(self, kind: str, key: str) -> str:
        """Prefix of all that a step leaves behind."""
        return f"steps/{kind}/{key}"

    def manifest(self, kind: str, key: str) -> str:
        return f"{self.step(kind, key)}/manifest.json"

    def part(self, prefix: str, name: str, suffix: str = "parquet") -> str:
        """A new key for data of a step: no other attempt writes there."""
        return f"{prefix}/parts/{name}-{attempt_name()}.{suffix}"

    def generated(self, generator_key: str) -> str:
        """Prefix of the shards of one generator."""
        return f"generated/{generator_key}"

    def work(self, key: str) -> str:
        """Prefix of checkpoints and progress of a fit."""
        return f"work/{key}"

    def openings(self, test: str) -> str:
        """Where it is noted which studies have opened the test set of this digest."""
        return self.join("openings", test)

    def tracking(self, server: str, what: str) -> str:
        """The note that a server has been told of a result."""
        return self.join("tracking", server, f"{what}.json")

    def tracking_file(self) -> str:
        """The database of runs that a local storage holds."""
        return self.join("mlflow", "mlflow.db")

    def tensorboard(self, study: str, *run: str) -> str:
        """Where TensorBoard finds a study's trainings, or one of them."""
        return self.join("tensorboard", study, *run)

    def page(self, study: str, name: str) -> str:
        """Key of a page or sheet for people."""
        return f"pages/{study}/{name}"

    def join(self, *parts: str) -> str:
        return "/".join(parts)

    def location(self, key: str) -> str:
        """The full path or URL of a key, to show or to open elsewhere."""
        return f"{self._root}/{key}" if self.local else f"{self.url}/{key}"

    # Reading ------------------------------------------------------------------------------------

    @_guarded
    def read(self, key: str) -> bytes:
        """The content of `key`. Raises `FileNotFoundError`."""
        return bytes(self._fs.cat_file(f"{self._root}/{key}"))

    @_guarded
    def exists(self, key: str) -> bool:
        return bool(self._fs.exists(f"{self._root}/{key}"))

    @_guarded
    def size(self, key: str) -> int:
        """Bytes of `key`. Raises `FileNotFoundError`."""
        self._fs.invalidate_cache()
        return int(self._fs.size(f"{self._root}/{key}"))

    @_guarded
    def listing(self, prefix: str) -> list[str]:
        """All keys below `prefix`, sorted; none where there is no such prefix."""
        if self.local:
            base = f"{self._root}/{prefix}"
            found = (f"{folder}/{name}" for folder, _, names in os.walk(base) for name in names)
        else:
            found = iter(self._fs.find(f"{self._root}/{prefix}"))
        start = len(self._root) + 1
        return sorted(path[start:] for path in found)

    @_guarded
    def parquet(self, key: str) -> pq.ParquetFile:
        """Open a Parquet file; local ones are mapped into memory. Raises `StorageError` where it is
        none."""
        path = f"{self._root}/{key}"
        try:
            if self.local:
                return pq.ParquetFile(pa.memory_map(path))
            return pq.ParquetFile(self._fs.open(path, "rb", cache_type="readahead"))
        except pa.ArrowInvalid as error:
            raise StorageError(
                f"{self.location(key)}: is no Parquet file any more ({str(error)[:80]});"
                " run again with --discard of the step that wrote it"
            ) from error

    def tables(self, keys: list[str], columns: list[str] | None = None) -> Iterator[pa.Table]:
        """The row groups of many Parquet files, one after another."""
        for key in keys:
            with self.parquet(key) as file:
                for index in range(file.num_row_groups):
                    yield file.read_row_group(index, columns=columns)

    @_guarded
    def download(self, prefix: str, folder: Path) -> Path:
        """Copy all below `prefix` into a local folder; returns the folder."""
        for key in self.listing(prefix):
            target = folder / key[len(prefix) + 1 :]
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(self.read(key))
        return folder

    # Writing ------------------------------------------------------------------------------------

    @_guarded
    def put_new(self, key: str, data: bytes | memoryview | pa.Buffer) -> None:
        """Write data under a name that nobody else uses, durably, and check its size."""
        view = memoryview(data)
        path = f"{self._root}/{key}"
        if self.local:
            self._write_local(path, view)
        else:
            self._fs.pipe_file(path, bytes(view))
            if (size := self.size(key)) != view.nbytes:
                raise OSError(errno.EIO, f"stored {size} of {view.nbytes} bytes")

    @_guarded
    def put(self, key: str, data: bytes) -> None:
        """Replace `key` as a whole. For what nobody's correctness hangs on: progress, pages."""
        path = f"{self._root}/{key}"
        if not self.local:
            self._fs.pipe_file(path, data)
            return
        temporary = f"{path}.{attempt_name()}.tmp"
        self._write_local(temporary, memoryview(data))
        os.replace(temporary, path)

    @_guarded
    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Write `key` unless it exists: of racing writers one wins, and readers see all of it or
        nothing.

        Returns whether `key` now holds `data`: also when an earlier try of ours got through
        unnoticed.
        """
        path = f"{self._root}/{key}"
        if self.local:
            temporary = f"{path}.{attempt_name()}.tmp"
            self._write_local(temporary, memoryview(data))
            try:
                os.link(temporary, path)
            except FileExistsError:
                return self.read(key) == data
            finally:
                os.unlink(temporary)
            self._sync_folder(os.path.dirname(path))
            return True
        try:
            self._fs.pipe_file(path, data, mode="create")
        except FileExistsError:
            return self.read(key) == data
        return True

    @_guarded
    def delete(self, key: str) -> None:
        """Remove `key`; nothing happens where it is not there."""
        try:
            self._fs.rm_file(f"{self._root}/{key}")
        except FileNotFoundError:
            return

    def probe(self) -> None:
        """Raise `StorageError` unless this storage can be written and honours put-if-absent."""
        key = f"probe/{attempt_name()}"
        try:
            first, second = self.put_if_absent(key, b"first"), self.put_if_absent(key, b"second")
        finally:
            self.delete(key)
        if not first or second:
            raise StorageError(
                f"storage {self.url} overwrites where it must refuse (put-if-absent): two runs"
                " could mix;"
                " choose a local disk or S3-compatible storage with conditional writes"
            )

    def _write_local(self, path: str, view: memoryview) -> None:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        try:
            with open(path, "wb") as file:
                file.write(view)
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            # A torn file must not stay behind under any name.
            if os.path.lexists(path):
                os.unlink(path)
            raise
        if os.path.getsize(path) != view.nbytes:
            raise OSError(errno.EIO, f"stored {os.path.getsize(path)} of {view.nbytes} bytes")

    @staticmethod
    def _sync_folder(folder: str) -> None:
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
