"""The store: the only owner of paths, on local disk and on S3-compatible storage alike (fsspec).

Layout under the storage root:

    steps/<kind>/<key>/manifest.json       what a finished step leaves behind (put if absent,
                                           written last)
    steps/<kind>/<key>/parts/…             data of a step, under names that contain their digest
    steps/<kind>/<key>/weights/…           what a fit has trained, named in the same way
    steps/<kind>/<key>/commits/…           one record per committed shard (`engine.core.shards`)
    generated/<generator key>/…            shards of generated images, shared by requests of every
                                           size
    work/<key>/…                           checkpoints and progress of a fit; may be deleted when it
                                           is done
    previews/<attempt>/…                   images of a preview; may be deleted when it is done
    pages/<study>/…                        pages and sheets for people; may be deleted at any time

Two operations carry all promises: `put_if_absent` (exactly one of many racing writers wins, and
what it wrote is whole) and `put_part` (data under a name that contains the digest of its content,
so that two writers of one name write the same bytes). Neither "it exists" nor "it opens" is ever
taken for "it is complete": readers start from a commit record or a manifest. A part is compared
with the digest in its name the first time that a process reads it.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import os
import random
import re
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeAlias, TypeVar

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from engine.core.errors import DamageError, StorageError, StudyError

P = ParamSpec("P")
T = TypeVar("T")
# Anything that has the buffer protocol: what pyarrow, safetensors and json produce.
Data: TypeAlias = "bytes | bytearray | memoryview | pa.Buffer"

ATTEMPTS = 5
_TEMPORARY = ".tmp"
# Hex digits of the SHA-256 in the name of a part: 128 bits.
_NAMED_DIGITS = 32
_NAMED = re.compile(r"\.([0-9a-f]{32})\.[A-Za-z0-9]+$")
# Parts that this process has compared with their digest, as (URL of the storage, key).
_verified: set[tuple[str, str]] = set()
_CLIENTS = ("botocore", "aiobotocore", "aiohttp", "gcsfs", "google", "azure", "adlfs")
_TRANSIENT = (errno.EIO, errno.EBUSY, errno.ETIMEDOUT, errno.ECONNRESET, errno.EAGAIN)


def is_transient(error: OSError) -> bool:
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
                if isinstance(error, FileExistsError):
                    raise
                if reading and isinstance(error, FileNotFoundError):
                    raise _absence(operation.__name__, args, error) from error
                if is_transient(error) and attempt + 1 < ATTEMPTS:
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


def _absence(operation: str, args: tuple[Any, ...], error: FileNotFoundError) -> Exception:
    """What to raise for a key that is not there: a part is only read where a record names it."""
    store, key = args[0], str(args[1]) if len(args) > 1 else ""
    if named_digest(key) is None or operation not in ("read", "parquet"):
        return error
    return DamageError(f"{store.location(key)} is missing", key)


def _fault(operation: str, args: tuple[Any, ...], reason: str) -> StorageError:
    store, key = args[0], args[1] if len(args) > 1 else ""
    return StorageError(
        f"storage {getattr(store, 'url', '')}: cannot {operation.replace('_', ' ')} {key!s}:"
        f" {reason or 'no reason given'}; nothing is half-committed; fix it and run again"
    )


def attempt_name() -> str:
    """A name that no other attempt, process or machine uses."""
    return uuid.uuid4().hex[:16]


def named_digest(key: str) -> str | None:
    """The digest that the name of a part contains; None for any other key."""
    match = _NAMED.search(key)
    return match[1] if match else None


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

    def part(self, folder: str, name: str, sha256: str, suffix: str = "parquet") -> str:
        """Key of the part with this SHA-256 (64 hex digits)."""
        return f"{folder}/{name}.{sha256[:_NAMED_DIGITS]}.{suffix}"

    def parts(self, prefix: str) -> str:
        """Folder of the parts of a step or of a set of shards."""
        return f"{prefix}/parts"

    def generated(self, generator_key: str) -> str:
        """Prefix of the shards of one generator."""
        return f"generated/{generator_key}"

    def work(self, key: str) -> str:
        """Prefix of checkpoints and progress of a fit."""
        return f"work/{key}"

    def preview(self, attempt: str) -> str:
        """Prefix of the images of one preview."""
        return self.join("previews", attempt)

    def step_key(self, manifest_key: str) -> str:
        """The key of the step whose manifest lies there."""
        return manifest_key.rpartition("/")[0].rpartition("/")[2]

    def area(self, key: str) -> str:
        """The part of the layout that a key belongs to: steps, generated, work, pages …"""
        return key.partition("/")[0]

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
        """The content of `key`. Raises `FileNotFoundError`, and `DamageError` where a part is
        missing or does not match its digest."""
        return self._verified_content(key)

    def _verified_content(self, key: str) -> bytes:
        digest = named_digest(key)
        # A transfer may have failed where the stored bytes are sound: read twice before judging.
        for _ in range(2):
            data = bytes(self._fs.cat_file(f"{self._root}/{key}"))
            if digest is None or (self.url, key) in _verified:
                return data
            if self._matches(data, digest):
                _verified.add((self.url, key))
                return data
        raise self._mismatch(key)

    @staticmethod
    def _matches(data: bytes, digest: str) -> bool:
        return hashlib.sha256(data).hexdigest().startswith(digest)

    def _verify_local(self, key: str) -> None:
        """Compare a part on local disk with its digest, unless this process has done so."""
        digest = named_digest(key)
        if digest is None or (self.url, key) in _verified:
            return
        with open(f"{self._root}/{key}", "rb", buffering=0) as file:
            if not hashlib.file_digest(file, "sha256").hexdigest().startswith(digest):
                raise self._mismatch(key)
        _verified.add((self.url, key))

    def _mismatch(self, key: str) -> DamageError:
        return DamageError(f"{self.location(key)} is damaged: it does not match its digest", key)

    @_guarded
    def exists(self, key: str) -> bool:
        return bool(self._fs.exists(f"{self._root}/{key}"))

    @_guarded
    def size(self, key: str) -> int:
        """Bytes of `key`. Raises `FileNotFoundError`."""
        self._fs.invalidate_cache()
        return int(self._fs.size(f"{self._root}/{key}"))

    @_guarded
    def sha256(self, key: str) -> str:
        """SHA-256 of what is stored at `key` now, in hex. Raises `FileNotFoundError`."""
        if self.local:
            with open(f"{self._root}/{key}", "rb", buffering=0) as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        return hashlib.sha256(self._fs.cat_file(f"{self._root}/{key}")).hexdigest()

    @_guarded
    def listing(self, prefix: str) -> list[str]:
        """All keys below `prefix`, sorted; none where there is no such prefix.

        Temporary files of writers on local disk are left out: they may be gone in a moment.
        """
        if self.local:
            return [key for key in self._local_files(prefix) if not key.endswith(_TEMPORARY)]
        start = len(self._root) + 1
        return sorted(path[start:] for path in self._fs.find(f"{self._root}/{prefix}"))

    def _local_files(self, prefix: str) -> list[str]:
        """Keys of all files below a prefix of a local store, temporary ones too."""
        walk = os.walk(f"{self._root}/{prefix}")
        start = len(self._root) + 1
        return sorted(f"{folder}/{name}"[start:] for folder, _, names in walk for name in names)

    @_guarded
    def parquet(self, key: str) -> pq.ParquetFile:
        """Open a Parquet file; local ones are mapped into memory. Raises as `read` does."""
        try:
            if self.local:
                self._verify_local(key)
                return pq.ParquetFile(pa.memory_map(f"{self._root}/{key}"))
            if named_digest(key) and (self.url, key) not in _verified:
                # All of it has to come here anyway, to be compared with its digest.
                return pq.ParquetFile(pa.BufferReader(self._verified_content(key)))
            file = self._fs.open(f"{self._root}/{key}", "rb", cache_type="readahead")
            return pq.ParquetFile(file)
        except pa.ArrowInvalid as error:
            raise DamageError(
                f"{self.location(key)} is not a readable Parquet file ({str(error)[:80]})", key
            ) from error

    def tables(self, keys: list[str], columns: list[str] | None = None) -> Iterator[pa.Table]:
        """The row groups of many Parquet files, one after another."""
        for key in keys:
            with self.parquet(key) as file:
                for index in range(file.num_row_groups):
                    yield file.read_row_group(index, columns=columns)

    @_guarded
    def changed(self, prefix: str) -> dict[str, float]:
        """All keys below `prefix`, temporary files among them, and when each was last written, in
        seconds since 1970."""
        if self.local:
            found = {}
            for key in self._local_files(prefix):
                try:
                    found[key] = os.stat(f"{self._root}/{key}").st_mtime
                except FileNotFoundError:
                    continue  # removed since it was listed
            return found
        start = len(self._root) + 1
        entries = self._fs.find(f"{self._root}/{prefix}", detail=True)
        return {path[start:]: entry["LastModified"].timestamp() for path, entry in entries.items()}

    # Writing ------------------------------------------------------------------------------------

    def put_part(self, folder: str, name: str, suffix: str, data: Data) -> tuple[str, str]:
        """Write data under a name that contains its digest; returns its key and SHA-256.

        Equal data of one name has one key, whoever writes it: a part that is made again takes the
        place of the one before.
        """
        sha256 = hashlib.sha256(data).hexdigest()
        key = self.part(folder, name, sha256, suffix)
        self.put_new(key, data)
        # Its content may be another than this process has seen there.
        _verified.discard((self.url, key))
        return key, sha256

    @_guarded
    def put_new(self, key: str, data: Data) -> None:
        """Write data under a name that only equal data is written to, durably, and check its
        size."""
        view = memoryview(data)
        if self.local:
            self._replace_local(f"{self._root}/{key}", view)
            return
        self._fs.pipe_file(f"{self._root}/{key}", bytes(view))
        if (size := self.size(key)) != view.nbytes:
            raise OSError(errno.EIO, f"stored {size} of {view.nbytes} bytes")

    @_guarded
    def put(self, key: str, data: Data) -> None:
        """Replace `key` as a whole. For what no result depends on: progress, pages."""
        path = f"{self._root}/{key}"
        if self.local:
            self._replace_local(path, memoryview(data))
        else:
            self._fs.pipe_file(path, bytes(memoryview(data)))

    @_guarded
    def put_if_absent(self, key: str, data: Data) -> bool:
        """Write `key` unless it exists: of racing writers one wins, and readers see all of it or
        nothing.

        Returns whether `key` now holds `data`: also when an earlier try of ours got through
        unnoticed.
        """
        path, data = f"{self._root}/{key}", bytes(memoryview(data))
        if self.local:
            temporary = f"{path}.{attempt_name()}{_TEMPORARY}"
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

    @_guarded
    def delete_if_older(self, key: str, limit: float) -> bool:
        """Remove `key` unless something has written it since `limit` (seconds since 1970); whether
        it was removed."""
        path = f"{self._root}/{key}"
        try:
            if self._fs.modified(path).timestamp() >= limit:
                return False
            self._fs.rm_file(path)
        except FileNotFoundError:
            return False
        return True

    def delete_all(self, prefix: str) -> None:
        """Remove all that lies below `prefix`."""
        for key in self.listing(prefix):
            self.delete(key)

    def probe(self) -> None:
        """Raise `StorageError` unless this storage can be written and honours put-if-absent."""
        key = f"probe/{attempt_name()}"
        # A write that fails leaves nothing to delete, and its error is the one to report.
        first, second = self.put_if_absent(key, b"first"), self.put_if_absent(key, b"second")
        self.delete(key)
        if not first or second:
            raise StorageError(
                f"storage {self.url} overwrites where it must refuse (put-if-absent): two runs"
                " could mix;"
                " choose a local disk or S3-compatible storage with conditional writes"
            )

    def _replace_local(self, path: str, view: memoryview) -> None:
        temporary = f"{path}.{attempt_name()}{_TEMPORARY}"
        self._write_local(temporary, view)
        # Whoever reads the old file goes on reading it; nobody sees a half-written one.
        os.replace(temporary, path)
        self._sync_folder(os.path.dirname(path))

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
