"""The store: the only owner of paths, on local disk and on S3-compatible storage alike (fsspec).

Layout under the storage root:

    steps/<kind>/<key>/manifest.json       record of a finished step (put if absent, written last)
    steps/<kind>/<key>/parts/…             data of a step, under names that contain its digest
    steps/<kind>/<key>/weights/…           weights of a fit, named in the same way
    steps/<kind>/<key>/commits/…           one record per committed shard (`engine.core.shards`)
    generated/<generator key>/…            shards of generated images, shared by requests of every
                                           size
    work/<key>/…                           checkpoints and progress of a fit; may be deleted when it
                                           is done
    previews/<attempt>/…                   images of a preview; may be deleted when it is done
    pages/<study>/…                        pages and image sheets for users; may be deleted at any
                                           time

All guarantees rest on two operations: `put_if_absent` (exactly one of many racing writers wins, and
readers see its data whole) and `put_part` (data under a name that contains its digest, so that two
writers of one name write the same bytes). A file that exists, or opens, may still be incomplete:
readers start from a commit record or a manifest. A process compares a part with the digest in its
name on the first read.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from typing import Any, TypeAlias

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from engine.core.errors import DamageError, StorageError, StudyError, brief
from engine.core.names import attempt_name, named_digest, part_name
from engine.core.paths import expanded, unset_variable
from engine.core.storage_faults import guarded

# Anything with the buffer protocol, as pyarrow, safetensors and json produce it.
Data: TypeAlias = "bytes | bytearray | memoryview | pa.Buffer"

_TEMPORARY = ".tmp"
# Parts that this process has verified, as (URL of the storage, key).
_verified: set[tuple[str, str]] = set()


class Store:
    """Files under one root. Keys are relative, with forward slashes. Picklable; each process opens
    its own connection."""

    def __init__(self, url: str) -> None:
        protocol = fsspec.utils.get_protocol(url)
        self.local = protocol in ("file", "local")
        if self.local and (name := unset_variable(url)):
            raise StudyError(f"profile: storage: {url}: the variable {name} is not set; set it")
        self.url = (
            os.path.abspath(expanded(url.removeprefix("file://")))
            if self.local
            else url.rstrip("/")
        )
        try:
            self._open()
        except Exception as error:  # an unknown protocol or a missing library
            raise StudyError(
                f"profile: storage: cannot open {url!r}: {brief(error)}; name a local folder, or a"
                " URL with an installed fsspec driver"
            ) from None

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
        """Prefix of a step's manifest and data."""
        return f"steps/{kind}/{key}"

    def manifest(self, kind: str, key: str) -> str:
        return f"{self.step(kind, key)}/manifest.json"

    def part(self, folder: str, name: str, sha256: str, suffix: str = "parquet") -> str:
        """Key of the part with this SHA-256 (64 hex digits)."""
        return self.join(folder, part_name(name, sha256, suffix))

    def parts(self, prefix: str) -> str:
        """Folder of the parts of a step or a set of shards."""
        return f"{prefix}/parts"

    def generated(self, generator_key: str) -> str:
        """Prefix of the shards of one generator."""
        return f"generated/{generator_key}"

    def work(self, key: str) -> str:
        """Prefix of the checkpoints and progress of a fit."""
        return f"work/{key}"

    def preview(self, attempt: str) -> str:
        """Prefix of the images of one preview."""
        return self.join("previews", attempt)

    def step_key(self, manifest_key: str) -> str:
        """The key of the step that has its manifest there."""
        return manifest_key.rpartition("/")[0].rpartition("/")[2]

    def area(self, key: str) -> str:
        """The top-level folder of a key: steps, generated, work, pages …"""
        return key.partition("/")[0]

    def openings(self) -> str:
        """Prefix of the records of all openings of test."""
        return "openings"

    def opening(self, opener: str) -> str:
        """Key of the record of one opening of test."""
        return self.join(self.openings(), f"{opener}.parquet")

    def tracking(self, server: str, what: str) -> str:
        """Key of the record that a result was logged to a server."""
        return self.join("tracking", server, f"{what}.json")

    def tracking_file(self) -> str:
        """Key of MLflow's database in a local storage."""
        return self.join("mlflow", "mlflow.db")

    def tensorboard(self, study: str, *run: str) -> str:
        """Prefix of a study's TensorBoard logs, or of one run's."""
        return self.join("tensorboard", study, *run)

    def page(self, study: str, name: str) -> str:
        """Key of a page or image sheet for users."""
        return f"pages/{study}/{name}"

    def join(self, *parts: str) -> str:
        return "/".join(parts)

    def location(self, key: str) -> str:
        """The full path or URL of a key."""
        return f"{self._root}/{key}" if self.local else f"{self.url}/{key}"

    # Reading ------------------------------------------------------------------------------------

    @guarded
    def read(self, key: str) -> bytes:
        """The content of `key`. Raises `FileNotFoundError`, or `DamageError` if a part is missing
        or does not match its digest."""
        return self._verified_content(key)

    def _verified_content(self, key: str) -> bytes:
        digest = named_digest(key)
        # Read twice before reporting damage: the transfer may have failed, not the storage.
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
        """Compare a part on local disk with its digest, once per process."""
        digest = named_digest(key)
        if digest is None or (self.url, key) in _verified:
            return
        with open(f"{self._root}/{key}", "rb", buffering=0) as file:
            if not hashlib.file_digest(file, "sha256").hexdigest().startswith(digest):
                raise self._mismatch(key)
        _verified.add((self.url, key))

    def _mismatch(self, key: str) -> DamageError:
        return DamageError(f"{self.location(key)} is damaged: it does not match its digest", key)

    @guarded
    def exists(self, key: str) -> bool:
        return bool(self._fs.exists(f"{self._root}/{key}"))

    @guarded
    def size(self, key: str) -> int:
        """Bytes of `key`. Raises `FileNotFoundError`."""
        self._fs.invalidate_cache()
        return int(self._fs.size(f"{self._root}/{key}"))

    @guarded
    def sha256(self, key: str) -> str:
        """SHA-256 (hex) of the bytes stored at `key`. Raises `FileNotFoundError`."""
        with self._fs.open(f"{self._root}/{key}", "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    @guarded
    def listing(self, prefix: str) -> list[str]:
        """All keys below `prefix`, sorted; empty if there are none. Excludes the temporary files of
        writers on local disk, which may vanish at any moment."""
        if self.local:
            return [key for key in self._local_files(prefix) if not key.endswith(_TEMPORARY)]
        start = len(self._root) + 1
        return sorted(path[start:] for path in self._fs.find(f"{self._root}/{prefix}"))

    def _local_files(self, prefix: str) -> list[str]:
        """Keys of all files below a prefix of a local store, temporary files included."""
        walk = os.walk(f"{self._root}/{prefix}")
        start = len(self._root) + 1
        return sorted(f"{folder}/{name}"[start:] for folder, _, names in walk for name in names)

    @guarded
    def parquet(self, key: str) -> pq.ParquetFile:
        """Open a Parquet file; local ones are mapped into memory. Raises as `read` does."""
        try:
            if self.local:
                self._verify_local(key)
                return pq.ParquetFile(pa.memory_map(f"{self._root}/{key}"))
            if named_digest(key) and (self.url, key) not in _verified:
                # Verifying the digest needs the whole file anyway.
                return pq.ParquetFile(pa.BufferReader(self._verified_content(key)))
            file = self._fs.open(f"{self._root}/{key}", "rb", cache_type="readahead")
            return pq.ParquetFile(file)
        except pa.ArrowInvalid as error:
            raise DamageError(
                f"{self.location(key)} is not a readable Parquet file ({str(error)[:80]})", key
            ) from error

    def tables(self, keys: list[str], columns: list[str] | None = None) -> Iterator[pa.Table]:
        """The row groups of many Parquet files, one after the other."""
        for key in keys:
            with self.parquet(key) as file:
                for index in range(file.num_row_groups):
                    yield file.read_row_group(index, columns=columns)

    @guarded
    def modified_times(self, prefix: str) -> dict[str, float]:
        """All keys below `prefix`, temporary files included, and the time of their last write in
        seconds since 1970."""
        if self.local:
            times = {}
            for key in self._local_files(prefix):
                try:
                    times[key] = os.stat(f"{self._root}/{key}").st_mtime
                except FileNotFoundError:
                    continue  # removed since it was listed
            return times
        start = len(self._root) + 1
        entries = self._fs.find(f"{self._root}/{prefix}", detail=True)
        return {path[start:]: entry["LastModified"].timestamp() for path, entry in entries.items()}

    # Writing ------------------------------------------------------------------------------------

    def put_part(self, folder: str, name: str, suffix: str, data: Data) -> tuple[str, str]:
        """Write data under a name that contains its digest; returns its key and SHA-256.

        Equal data under one name has one key, whoever writes it. Writing a damaged part again
        therefore replaces it.
        """
        sha256 = hashlib.sha256(data).hexdigest()
        key = self.part(folder, name, sha256, suffix)
        self.put_new(key, data)
        # The stored bytes may differ from those that this process verified.
        _verified.discard((self.url, key))
        return key, sha256

    @guarded
    def put_new(self, key: str, data: Data) -> None:
        """Write data durably and check its size. The key must be one that only equal data is
        written to."""
        view = memoryview(data)
        if self.local:
            self._replace_local(f"{self._root}/{key}", view)
            return
        self._fs.pipe_file(f"{self._root}/{key}", bytes(view))
        if (size := self.size(key)) != view.nbytes:
            raise OSError(errno.EIO, f"stored {size} of {view.nbytes} bytes")

    @guarded
    def put(self, key: str, data: Data) -> None:
        """Replace `key` as a whole. Only for data that no result depends on: progress, pages."""
        path = f"{self._root}/{key}"
        if self.local:
            self._replace_local(path, memoryview(data))
        else:
            self._fs.pipe_file(path, bytes(memoryview(data)))

    @guarded
    def put_if_absent(self, key: str, data: Data) -> bool:
        """Write `key` unless it exists. Exactly one of several racing writers wins, and readers see
        all of its data or nothing.

        Returns whether `key` now holds `data`, which is also true if an earlier attempt succeeded
        without a reply.
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

    @guarded
    def delete(self, key: str) -> None:
        """Remove `key` if it exists."""
        try:
            self._fs.rm_file(f"{self._root}/{key}")
        except FileNotFoundError:
            return

    @guarded
    def delete_if_older(self, key: str, limit: float) -> bool:
        """Remove `key` if its last write was before `limit` (seconds since 1970); returns whether
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
        """Remove all keys below `prefix`."""
        for key in self.listing(prefix):
            self.delete(key)

    def probe(self) -> None:
        """Raise `StorageError` unless this storage is writable and honours put-if-absent."""
        key = f"probe/{attempt_name()}"
        # Outside of try/finally: a failed write leaves nothing to delete, and its error counts.
        first, second = self.put_if_absent(key, b"first"), self.put_if_absent(key, b"second")
        self.delete(key)
        if not first or second:
            raise StorageError(
                f"storage {self.url} overwrites existing keys in put-if-absent, so two runs could"
                " mix; use a local disk or S3-compatible storage with conditional writes"
            )

    def _replace_local(self, path: str, view: memoryview) -> None:
        temporary = f"{path}.{attempt_name()}{_TEMPORARY}"
        self._write_local(temporary, view)
        # Readers of the old file keep it; nobody sees a half-written file.
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
            # No partial file may stay behind under any name.
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
