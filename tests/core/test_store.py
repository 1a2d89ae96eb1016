from __future__ import annotations

import errno
import os
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engine.core import store as module
from engine.core.errors import DamageError, StorageError, StudyError
from engine.core.names import named_digest
from engine.core.store import Store


def forget_verified() -> None:
    """Let this process verify parts again, as another process would."""
    module._verified.clear()


def test_read_returns_what_was_put(store: Store) -> None:
    store.put_new("a/b", b"data")
    assert store.read("a/b") == b"data"
    assert store.exists("a/b")
    assert store.size("a/b") == 4
    assert store.listing("a") == ["a/b"]


def test_missing_key_differs_from_a_failure(store: Store) -> None:
    with pytest.raises(FileNotFoundError):
        store.read("nothing/here")
    assert not store.exists("nothing/here")
    assert store.listing("nothing") == []


def test_temporary_files_are_not_listed(tmp_path) -> None:
    store = Store(str(tmp_path))
    store.put("looks/1.png", b"picture")
    (tmp_path / "looks" / "2.png.0123456789abcdef.tmp").write_bytes(b"half")
    assert store.listing("looks") == ["looks/1.png"]
    # Needed by garbage collection.
    assert sorted(store.modified_times("looks")) == [
        "looks/1.png", "looks/2.png.0123456789abcdef.tmp"
    ]  # fmt: skip


def test_put_if_absent_keeps_the_first(store: Store) -> None:
    assert store.put_if_absent("record", b"first")
    assert not store.put_if_absent("record", b"second")
    assert store.read("record") == b"first"


def test_put_if_absent_recognises_its_own_earlier_attempt(store: Store) -> None:
    assert store.put_if_absent("record", b"mine")
    assert store.put_if_absent("record", b"mine")


def test_one_of_sixteen_concurrent_writers_wins(store: Store) -> None:
    wins: list[int] = []
    start = threading.Barrier(16)

    def race(number: int) -> None:
        mine = Store(store.url)
        start.wait()
        if mine.put_if_absent("race", f"{number}".encode()):
            wins.append(number)

    threads = [threading.Thread(target=race, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wins) == 1
    assert store.read("race") == str(wins[0]).encode()


def test_put_replaces_atomically(store: Store) -> None:
    store.put("pages/x", b"old and long")
    store.put("pages/x", b"new")
    assert store.read("pages/x") == b"new"
    # No temporary file is left.
    assert list(store.modified_times("pages")) == ["pages/x"]


def test_delete_ignores_missing_keys(store: Store) -> None:
    store.put_new("x", b"1")
    store.delete("x")
    store.delete("x")
    assert not store.exists("x")


def test_parquet_round_trip(store: Store) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"n": list(range(10))}), sink, row_group_size=4)
    store.put_new("t.parquet", sink.getvalue())
    with store.parquet("t.parquet") as file:
        assert file.num_row_groups == 3
        assert file.read_row_group(1)["n"].to_pylist() == [4, 5, 6, 7]
    assert [table.num_rows for table in store.tables(["t.parquet"])] == [4, 4, 2]


def put_parquet(store: Store) -> str:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"n": list(range(1000))}), sink)
    key, sha256 = store.put_part("steps/x/parts", "t", "parquet", sink.getvalue())
    assert named_digest(key) == sha256[:32]
    assert store.sha256(key) == sha256
    return key


def test_part_is_read_by_its_key(store: Store) -> None:
    key = put_parquet(store)
    with store.parquet(key) as file:
        assert file.metadata.num_rows == 1000
    assert store.read(key)[:4] == b"PAR1"
    assert [table.num_rows for table in store.tables([key], ["n"])] == [1000]


@pytest.mark.parametrize("how", ["read", "parquet", "tables"])
def test_flipped_bit_in_a_part_is_detected(store: Store, how: str) -> None:
    key = put_parquet(store)
    data = bytearray(store.read(key))
    data[len(data) // 2] ^= 1
    store.put(key, data)
    forget_verified()
    with pytest.raises(DamageError, match="does not match its digest") as caught:
        list(getattr(store, how)([key] if how == "tables" else key))
    assert caught.value.key == key
    assert key in str(caught.value)


@pytest.mark.parametrize("how", ["read", "parquet"])
def test_missing_part_is_damage(store: Store, how: str) -> None:
    key = put_parquet(store)
    store.delete(key)
    with pytest.raises(DamageError, match="is missing") as caught:
        getattr(store, how)(key)
    assert caught.value.key == key


def test_rewritten_part_is_verified_again(store: Store) -> None:
    key = put_parquet(store)
    store.read(key)
    assert put_parquet(store) == key
    store.put(key, b"something else")
    with pytest.raises(DamageError):
        store.read(key)


def test_part_is_verified_once_per_process(tmp_path) -> None:
    class Counting(Store):
        hashed = 0

        def _mismatch(self, key: str) -> DamageError:
            self.hashed += 1
            return super()._mismatch(key)

    store = Counting(str(tmp_path))
    key = put_parquet(store)
    store.parquet(key).close()
    # Later changes of the file are detected by the next process.
    store.put(key, store.read(key)[:-1] + b"x")
    store.read(key)
    assert store.hashed == 0


def test_damage_error_from_another_process_keeps_its_key() -> None:
    error = pickle.loads(pickle.dumps(DamageError("it is damaged", "steps/x")))
    assert (str(error), error.key, error.named) == ("it is damaged", "steps/x", False)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview, pa.py_buffer])
def test_any_buffer_can_be_stored(store: Store, kind: Callable[[bytes], Any]) -> None:
    store.put("a", kind(b"data"))
    store.put_new("b", kind(b"data"))
    assert store.put_if_absent("c", kind(b"data"))
    key, _ = store.put_part("parts", "d", "bin", kind(b"data"))
    assert [store.read(name) for name in ("a", "b", "c", key)] == [b"data"] * 4


def test_pickled_store_opens_the_same_place(store: Store) -> None:
    store.put_new("k", b"v")
    assert pickle.loads(pickle.dumps(store)).read("k") == b"v"


def test_probe_leaves_nothing_behind(store: Store) -> None:
    store.probe()
    assert store.listing("probe") == []


class Overwriting(Store):
    """Storage without put-if-absent."""

    def put_if_absent(self, key: str, data: bytes) -> bool:
        self.put(key, data)
        return True


def test_probe_rejects_storage_that_overwrites(tmp_path) -> None:
    with pytest.raises(StorageError, match="put-if-absent"):
        Overwriting(str(tmp_path)).probe()


def test_read_only_folder_is_one_line_with_its_path(tmp_path, monkeypatch) -> None:
    if os.geteuid() == 0:  # root can write everywhere, so make the folder a file
        (tmp_path / "root").write_bytes(b"")
    else:
        (tmp_path / "root").mkdir(mode=0o500)
    with pytest.raises(StorageError) as caught:
        Store(str(tmp_path / "root")).probe()
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


class ReadOnly(Store):
    """Rejects every change, like a disk mounted read-only."""

    def _write_local(self, path: str, view: memoryview) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    def delete(self, key: str) -> None:
        raise StorageError("cannot delete")


def test_read_only_storage_reports_the_write_error(tmp_path) -> None:
    with pytest.raises(StorageError, match=r"cannot put if absent .*Read-only file system"):
        ReadOnly(str(tmp_path)).probe()


class Full(Store):
    """A disk that is full after some bytes."""

    def _write_local(self, path: str, view: memoryview) -> None:
        super()._write_local(path, view[:3])
        os.unlink(path)
        raise OSError(errno.ENOSPC, "No space left on device")


def test_full_disk_stops_cleanly(tmp_path) -> None:
    full = Full(str(tmp_path))
    with pytest.raises(StorageError, match="No space left on device"):
        full.put_if_absent("record", b"long data")
    assert full.listing("") == []


class Flaky(Store):
    """Fails twice like a network, then works."""

    failures = 2

    def _write_local(self, path: str, view: memoryview) -> None:
        if self.failures:
            self.failures -= 1
            raise TimeoutError("timed out")
        super()._write_local(path, view)


def test_timeout_is_retried(tmp_path) -> None:
    flaky = Flaky(str(tmp_path))
    flaky.put_new("k", b"v")
    assert flaky.read("k") == b"v"


def test_rejected_credentials_are_one_line(s3_endpoint: str) -> None:
    with pytest.raises(StorageError) as caught:
        Store("s3://no-such-bucket-of-ours/x").probe()
    assert "no-such-bucket-of-ours" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("url", ["nosuch://bucket/runs", "gs://bucket/runs"])
def test_unusable_storage_is_one_line_that_names_the_field(url: str) -> None:
    with pytest.raises(StudyError, match="profile: storage"):
        Store(url)
